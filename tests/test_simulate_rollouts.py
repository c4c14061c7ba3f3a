"""The model of RL steps: closed forms, a slow obvious decoder, and rates that are found again in a run's files."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import rollout_model as model  # noqa: E402
import simulate_rollouts as script  # noqa: E402

from dirl.data.problems import Problem  # noqa: E402
from dirl.model.tiny import tiny  # noqa: E402
from dirl.reward.rubric import RewardConfig  # noqa: E402
from dirl.rl.rl_config import RLConfig  # noqa: E402
from dirl.rl.rollout_group import RolloutGroup  # noqa: E402
from dirl.rl.rollouts import RolloutConfig, TakenPrompt  # noqa: E402
from dirl.rl.train import RLTrainer  # noqa: E402

# 8 completions of 100 tokens, 2 a pass: 50 passes, of 0.01 s up to 4 sequences. Trained at 1000 tokens a second.
RATES = model.Rates(pass_seconds=0.01, train_tokens_per_s=1000.0, knee=4, slots=8, push_seconds=0.25)
EQUAL = model.Workload(lambda random: [100, 100], 4, [model.StepWork(tokens_per_step=2.0, packing=3.0)])
DECODE, TRAIN = 50 * 0.02, 3 * 800 / 1000
IN_TURN = model.Arm("in turn", 1, 1, is_colocated=True)


def seconds_of(arm: model.Arm, rates: model.Rates = RATES, workload: model.Workload = EQUAL) -> list[float]:
    return [step.seconds for step in model.simulate(workload, rates, arm, 8)[3:]]


@pytest.mark.parametrize("train_rate", [1000.0, 10_000.0])
def test_of_equal_lengths_a_step_is_the_sum_of_phases_or_the_longer_one(train_rate: float) -> None:
    rates, train = replace(RATES, train_tokens_per_s=train_rate), TRAIN * 1000 / train_rate
    assert seconds_of(IN_TURN, rates) == pytest.approx([DECODE + train + 0.25] * 5)
    assert seconds_of(replace(IN_TURN, is_colocated=False), rates) == pytest.approx([DECODE + train + 0.25] * 5)
    for staleness in (1, 2, 3):
        arm = model.Arm("ahead", 1, 1, max_staleness=staleness)
        assert seconds_of(arm, rates) == pytest.approx([max(DECODE, train) + 0.25] * 5)
        summary = model.summary_of(model.simulate(EQUAL, rates, arm, 8)[3:])
        whole = max(DECODE, train) + 0.25
        assert summary.trainer_waits == pytest.approx((whole - train - 0.25) / whole)
        assert summary.engine_waits == pytest.approx((whole - DECODE) / whole)
        assert summary.age == staleness


def test_gpus_share_each_phase() -> None:
    two = model.Arm("two", 2, 1, is_colocated=True)  # 4 sequences each: at the knee, half the time of a pass
    assert seconds_of(two) == pytest.approx([DECODE / 2 + TRAIN + 0.25] * 5)
    assert seconds_of(replace(IN_TURN, train_gpus=2)) == pytest.approx([DECODE + TRAIN / 2 + 0.25] * 5)
    # Four groups on three ranks: one has two of them, unless groups are split. On eight, half have none.
    for num_gpus, heaviest in ((3, 2), (8, 1)):
        arm = replace(IN_TURN, train_gpus=num_gpus)
        assert seconds_of(arm) == pytest.approx([DECODE + TRAIN * heaviest / 4 + 0.25] * 5)
        split = DECODE + TRAIN / num_gpus + 0.25
        assert seconds_of(replace(arm, splits_groups=True)) == pytest.approx([split] * 5)
    # Whole groups on eight colocated engines: two sequences each; over servers completions go one by one. Same pass.
    assert seconds_of(replace(IN_TURN, rollout_gpus=8)) == pytest.approx([0.5 + TRAIN + 0.25] * 5)


def passes_one_by_one(passes: Sequence[int], rates: model.Rates, until: float) -> tuple[list[float], list[int]]:
    left, finished_at, clock = list(passes), [math.inf] * len(passes), 0.0
    in_flight: list[int] = []
    while any(left):
        waiting = [n for n in range(len(left)) if left[n] and n not in in_flight and finished_at[n] == math.inf]
        in_flight += waiting[: rates.slots - len(in_flight)]
        seconds = rates.pass_seconds * max(1.0, len(in_flight) / rates.knee)
        if clock + seconds > until + 1e-9:
            break
        clock += seconds
        for n in list(in_flight):
            left[n] -= 1
            if not left[n]:
                finished_at[n] = clock
                in_flight.remove(n)
    return finished_at, left


@pytest.mark.parametrize("seed", range(20))
def test_decoding_equals_one_pass_after_another(seed: int) -> None:
    random = np.random.default_rng(seed)
    passes = random.integers(1, 30, random.integers(1, 25)).tolist()
    rates = replace(RATES, knee=float(random.integers(1, 6)), slots=int(random.integers(1, 9)))
    end = max(model.decode(passes, rates)[0])
    for until in (math.inf, end, *(end * random.random(5))):
        finished_at, left = model.decode(passes, rates, until)
        expected_at, expected_left = passes_one_by_one(passes, rates, until)
        assert left == expected_left
        assert finished_at == pytest.approx(expected_at)


def test_partial_rollouts_do_not_wait_for_the_tail() -> None:
    lengths = iter([35] + [10] * 1000)
    tail = model.Workload(lambda random: [next(lengths)], 4, [model.StepWork()])
    rates = replace(RATES, knee=math.inf, push_seconds=0.0)
    arm = replace(IN_TURN, is_partial=True, oversampling=1.25)
    steps = model.simulate(tail, rates, arm, 6)
    # Five in flight and four wanted: 10 passes a step. The long one has five left after the third step, and is then
    # the first of the four, so that one of 10 passes is too many: the next step begins with it.
    assert [step.engine_seconds for step in steps[:4]] == pytest.approx([0.1] * 4)
    assert [step.tokens for step in steps[:4]] == [40, 40, 40, 65]
    assert [step.age for step in steps[:5]] == [0, 0, 0, 3, 1]
    lengths = iter(([35] + [10] * 3) * 6)
    whole = model.simulate(tail, rates, IN_TURN, 6)
    assert [step.engine_seconds for step in whole] == pytest.approx([0.35] * 6)


def test_what_teaches_nothing_is_replaced() -> None:
    work = replace(EQUAL, steps=[model.StepWork(0.0, 2.0), model.StepWork(1.0, 2.0)], max_sampling_rounds=3)
    nothing, all_of_it = model.simulate(work, RATES, IN_TURN, 2)
    assert nothing.engine_seconds == pytest.approx(3 * DECODE) and nothing.tokens == 0
    assert all_of_it.engine_seconds == pytest.approx(DECODE) and all_of_it.tokens == 800


def write_run(folder: Path, arm: model.Arm, rates: model.Rates, **phases: float) -> Path:
    """The files of a run that the model has made, with lengths of its own in each step."""
    random, rows = np.random.default_rng(0), []
    groups = [random.integers(8, 65, 4).tolist() for _ in range(200)]
    mean = float(np.mean(groups))
    steps = [model.StepWork(0.2 + 0.7 * (n % 5) / 4, 2.0, 3.0) for n in range(40)]
    work = model.Workload(lambda random: groups[random.integers(200)], 8, steps, max_sampling_rounds=4)
    for number, step in enumerate(model.simulate(work, rates, arm, 40, seed=1)):
        prefix = "engine_s" if arm.max_staleness else "timing_s"
        rows.append(
            {
                "step": number + 1,
                "num_tokens": 3 * step.tokens,
                "groups/kept": step.tokens / (4 * mean),
                "groups/dropped_all_wrong": step.tokens / (4 * mean) * (1 / steps[number].useful_share - 1),
                "completions/mean_length": mean,
                "completions/tokens_per_step": 2.0,
                f"{prefix}/rollout": step.engine_seconds,
                "timing_s/train": step.train_seconds - rates.push_seconds,
                "timing_s/update_weights": rates.push_seconds,
                "timing_s/step": step.seconds,
            }
        )
    (folder / "completions").mkdir(parents=True)
    rollout = {"max_staleness": arm.max_staleness, "mode": "server", "oversampling": 1.0, "num_generations": 4}
    rollout |= {"prompts_per_step": 8, "max_sampling_rounds": 4, "max_batch_size": 32}
    (folder / "run.json").write_text(json.dumps({"config": {"rollout": rollout}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [{"group": n, "completion_length": length} for n, group in enumerate(groups) for length in group]
    (folder / "completions/step_000010.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def table(text: str) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [line for line in lines if line[1] != "---"][1:]


def test_rates_are_found_again_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = model.Rates(0.02, 3000.0, 8, 32, train_seconds=0.3, push_seconds=0.05)
    in_turn = write_run(tmp_path / "in_turn", replace(IN_TURN, is_colocated=False), rates)
    ahead = write_run(tmp_path / "ahead", model.Arm("", 1, 1, max_staleness=1), rates)
    found = script.calibrate(script.read_run(in_turn))
    assert found.knee == 8 and found.slots == 32
    assert found.pass_seconds == pytest.approx(0.02, rel=0.1)
    assert (found.train_seconds, found.push_seconds) == pytest.approx((0.3, 0.05), rel=0.05)
    assert found.train_tokens_per_s == pytest.approx(3000, rel=0.02)
    busy = write_run(tmp_path / "busy", model.Arm("", 1, 1, max_staleness=1), rates.slowed(2.0))
    script.main(["--calibrate", str(in_turn), "--predict", f"{ahead},{busy}", "--gpus", "2", "--steps", "8"])
    rows = table(capsys.readouterr().out)
    assert [row[:2] for row in rows[:2]] == [["in_turn", "max_staleness=0"], ["ahead", "max_staleness=1"]]
    for row in rows[:2]:
        assert all(abs(float(cell.split("(")[1].split("%")[0])) < 10 for cell in row[3:])
    assert float(rows[1][2]) < 0.9 * float(rows[0][2])  # the two arms differ by more than that
    own, those, slowed = (float(cell.split()[0]) for cell in rows[2][3:])
    assert (own, slowed) == pytest.approx([float(rows[2][2])] * 2, rel=0.1) and those == pytest.approx(own / 2, rel=0.1)
    assert [row[1] for row in rows[4:]] == [  # after a heading
        "in turn", "in turn, partial", "in turn, apart", "ahead by 1", "ahead by 1, partial",
    ]  # fmt: skip


class Numbers:
    """For the model's random numbers: useful groups by number, as the trainer below has them."""

    def __init__(self) -> None:
        self.number = -1

    def random(self) -> float:
        self.number += 1
        return 0.0 if is_useful(self.number) else 1.0


def is_useful(number: int) -> bool:
    return number % 5 != 2


def length_of(number: int) -> int:
    """Hundredths of a second that a group decodes."""
    return (12, 31, 7, 55, 20, 9, 40)[number % 7]


def trainer_that_waits(folder: Path, max_staleness: int, train_seconds: float) -> RLTrainer:
    """The real loop, collector and thread; decoding and training are waits."""
    network, tokenizer = tiny()
    rollout = RolloutConfig(
        max_staleness=max_staleness,
        prompts_per_step=3,
        num_generations=2,
        max_completion_length=4,
        max_sampling_rounds=3,
    )
    ours = RLTrainer(
        RLConfig(output_dir=str(folder), max_steps=10, rollout=rollout, reward=RewardConfig(functions=["accuracy"])),
        model=network,
        tokenizer=tokenizer,
        problems=[Problem("?", "0", {})],
    )
    completions = ours.engine.generate([[1], [2]], rollout, [0, 1])

    def roll_out(taken: Sequence[TakenPrompt], step: int) -> tuple[list[RolloutGroup], dict[str, int]]:
        time.sleep(max(length_of(one.number) for one in taken) / 100)
        groups = [
            RolloutGroup(
                prompt=one.prompt,
                completions=completions,
                rewards=[0.0, float(is_useful(one.number))],
                reward_parts={},
                number=one.number,
                sampled_at=step,
            )
            for one in taken
        ]
        return groups, {}

    def update(*_: object) -> dict[str, float]:
        time.sleep(train_seconds)
        return {}

    ours.collector.rollouts.roll_out = roll_out  # type: ignore[method-assign]
    ours.collector.probe = lambda step: None  # type: ignore[method-assign, return-value]
    ours.updater.update = update  # type: ignore[method-assign, assignment]
    return ours


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("train_seconds", [0.2, 0.7])
def test_the_real_trainer_takes_the_steps_of_the_model(
    tmp_path: Path, max_staleness: int, train_seconds: float
) -> None:
    ours = trainer_that_waits(tmp_path, max_staleness, train_seconds)
    ours.begin()
    measured = []
    for _ in range(8):
        start = time.perf_counter()
        ours.step()
        measured.append(time.perf_counter() - start)
    ours.collector.interrupt()
    numbers = itertools.count()
    work = model.Workload(lambda random: [length_of(next(numbers))], 3, [model.StepWork()], max_sampling_rounds=3)
    # Whatever the lengths, training takes the same time.
    rates = model.Rates(0.01, math.inf, train_seconds=train_seconds)
    simulation = model.Simulation(work, rates, model.Arm("", 1, 1, max_staleness=max_staleness))
    simulation.random = Numbers()  # type: ignore[assignment]
    expected = [simulation.step(number).seconds for number in range(8)]
    assert measured == pytest.approx(expected, abs=0.2)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"nowhere/metrics.jsonl: no such file; name the output_dir of an RL run"):
        script.main(["--calibrate", str(tmp_path / "nowhere")])
    run = write_run(tmp_path / "run", IN_TURN, RATES)
    (run / "completions/step_000010.jsonl").unlink()
    with pytest.raises(SystemExit, match="run/completions: no completions; run with completions_steps set"):
        script.main(["--calibrate", str(run)])
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(SystemExit, match="run: not an RL run of at least 4 steps"):
        script.main(["--calibrate", str(run)])
    predict = ["--gpus", "2", "--predict", "a"]
    for arguments, words in (([], "nothing to do"), (predict, "--predict needs --calibrate RUN")):
        with pytest.raises(SystemExit):
            script.main(arguments)
        assert words in capsys.readouterr().err


def test_the_paper_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Four completions of 8192 tokens a GPU: 116 s of decoding, 167 s of training."""
    sizes: list[Any] = ["--prompts-per-step", 8, "--num-generations", 4, "--mean-length", 8192, "--sigma", 0]
    script.main(["--gpus", "8", "--steps", "4", *map(str, sizes)])
    rows = table(capsys.readouterr().out)
    assert rows[0][:4] == ["8", "in turn", "8 in turn", "283"]
    assert rows[0][5] == "41%"
