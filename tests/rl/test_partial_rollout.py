"""Partial rollouts: no prompt is lost or comes twice, each token is what its weights gave, no step waits for the last.

This file is also a script that kills its own runs: `test_partial_rollout.py OUT`. With processes: `... OUT two`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dirl.data.problems import Problem
from dirl.errors import UserError
from dirl.model.checkpoint import load
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.collector import Collected, Collector
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollout_group import RolloutGroup, render_prompts
from dirl.rl.rollouts import RolloutConfig, Rollouts
from dirl.rl.train import RLTrainer
from dirl.rollout.engine import Completion, EngineConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import logprobs
from dirl.rollout.watch import Observer
from dirl.training.distributed import Distributed
from dirl.training.interruption import StopAsked
from dirl.training.metrics import Timings
from dirl.training.seeds import stable_seed
from tests.launching import launch_script
from tests.oracle import make_extreme
from tests.parity.test_interruption import numbers
from tests.rl import test_ahead
from tests.rl.test_ahead import watched

ROOT = Path(__file__).parents[2]
PROBLEMS = [Problem("?" * (1 + n % 7), str(n), {}) for n in range(12)]
PARTIAL = RolloutConfig(
    prompts_per_step=3,
    num_generations=2,
    max_completion_length=160,
    confidence_threshold=0.0,  # a block a pass
    partial=True,
    oversampling=3.0,
    max_partial_age=3,
    max_cached_tokens=100_000,  # whatever memory is free
)


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def long_tailed(factor: float = 4.0) -> Any:
    """A model whose completions have 1 or 2 blocks, or up to 40; with a smaller factor more of them are long."""
    model, tokenizer = tiny()
    make_extreme(model, [tokenizer.eos_token_id], factor)
    return model, tokenizer


class Passes(Observer):
    """Counts denoising passes."""

    count = 0

    def stepped(self, frames: object) -> None:
        self.count += 1


def collector(config: RolloutConfig, should_stop: Callable[[], bool] = lambda: False) -> tuple[Collector, Passes]:
    model, tokenizer = long_tailed()
    prompts, _ = render_prompts(PROBLEMS, tokenizer, system_prompt="", suffix="", max_length=100)
    engine = TorchEngine(model, tokenizer, EngineConfig(max_cached_tokens=100_000), observer=(passes := Passes()))
    rubric = Rubric(RewardConfig(functions=["tests.rl.test_partial_rollout:even_length"]))
    rollouts = Rollouts(engine, rubric, config, Timings(), (model.scheme, 128))
    return Collector(prompts, rollouts, Distributed(), 0, should_stop=should_stop), passes


def trainer(output_dir: Path, **changes: Any) -> RLTrainer:
    model, tokenizer = long_tailed(changes.pop("factor", 4.0))
    rollout = replace(PARTIAL, dynamic_sampling=False, **{"max_completion_length": 60, **changes.pop("rollout", {})})
    config: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-2, "save_steps": 0, "max_logp_difference": 0.01}
    return RLTrainer(
        RLConfig(
            output_dir=str(output_dir),
            reward=RewardConfig(functions=["tests.rl.test_partial_rollout:even_length"]),
            rollout=rollout,
            **(config | changes),
        ),
        model=model,
        tokenizer=tokenizer,
        problems=PROBLEMS,
    )


def numbers_of(ours: Collector) -> list[int]:
    return [group.number for group in ours.waiting] + [one.taken.number for one in ours.in_flight]


def test_a_step_does_not_wait_for_the_longest() -> None:
    """In forward passes: with a long tail less than half of those that waiting takes, for as many groups."""
    (partly, passes), (whole, all_passes) = (
        collector(replace(PARTIAL, dynamic_sampling=False, **changes))
        for changes in ({}, {"partial": False, "oversampling": 1.0})
    )
    for step in range(12):
        oldest = step - PARTIAL.max_partial_age
        assert len(partly.collect(step, oldest).groups) == len(whole.collect(step).groups) == 3
    assert passes.count * 2 < all_passes.count


@pytest.mark.slow
def test_nothing_is_lost_or_counted_twice_whenever_a_run_is_killed() -> None:
    """200 steps, saved now and then, killed at random, also amid a step: bit for bit those of a run that is not."""
    steps = 200
    whole, _ = collector(PARTIAL)
    expected = [whole.collect(step, step - 3) for step in range(steps)]
    draw = random.Random(3)
    ours, _ = collector(PARTIAL, should_stop=lambda: draw.random() < 0.1)
    saved, step, kills, num_stops = (json.dumps(ours.state_dict()), 0), 0, 0, 0
    found: list[Collected] = []
    while step < steps:
        if draw.random() < 0.1:  # whatever came after the last save is gone
            ours, kills = collector(PARTIAL, should_stop=lambda: draw.random() < 0.1)[0], kills + 1
            ours.load_state_dict(json.loads(saved[0]))
            step = saved[1]
            del found[step:]
        try:
            found.append(ours.collect(step, step - 3))
            step += 1
        except StopAsked:
            num_stops += ours.is_amid
        if draw.random() < 0.3:
            saved = json.dumps(ours.state_dict()), step
    assert kills > 10 and num_stops > 2
    assert found == expected and (ours.waiting, ours.in_flight) == (whole.waiting, whole.in_flight)
    used = [group.number for collected in found for group in collected.everyone]
    assert sorted(used + numbers_of(ours)) == list(range(ours._num_taken))
    assert max(now - group.sampled_at for now, one in enumerate(found) for group in one.everyone) >= 3

    groups = [group for collected in found for group in collected.everyone]
    engine = ours.rollouts.engine
    at_once = engine.generate(
        [group.prompt.token_ids for group in groups for _ in range(2)],
        PARTIAL,
        [stable_seed(group.seed, place) for group in groups for place in range(2)],
    )
    assert_same_but_rounding(at_once, [completion for group in groups for completion in group.completions])


def assert_same_but_rounding(some: Sequence[Completion], others: Sequence[Completion]) -> None:
    for one, other in zip(some, others, strict=True):
        assert replace(one, logprobs=None, sampled_at=[]) == replace(other, logprobs=None, sampled_at=[])
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_every_token_is_what_its_weights_give(tmp_path: Path) -> None:
    """An oracle that keeps the weights of every version decodes each part of a completion again, and replays it."""
    several = {"prompts_per_step": 2, "confidence_threshold": 0.1, "max_completion_length": 100}
    ours = trainer(tmp_path, max_steps=8, learning_rate=1e-3, rollout=several, factor=2.0)
    versions, steps = watched(ours)
    ours.train()
    groups = [group for of_step in steps for group in of_step]
    assert len(groups) == len({group.number for group in groups}) == 8 * 2
    num_parts = []
    for group in groups:
        assert group.sampled_at == min(completion.sampled_at[0] for completion in group.completions)
        for place, completion in enumerate(group.completions):
            assert len(completion.sampled_at) == len(completion.token_ids)
            assert completion.sampled_at == sorted(completion.sampled_at)
            parts = sorted(set(completion.sampled_at))
            num_parts.append(len(parts))
            for version in parts:
                check_part(versions[version], ours.tokenizer, group, place, version, ours.config.rollout)
    assert max(num_parts) >= 3


def check_part(model: Any, tokenizer: Any, group: RolloutGroup, place: int, version: int, sampling: Any) -> None:
    """The tokens of one version, from all tokens before them."""
    completion = group.completions[place]
    start = completion.sampled_at.index(version)
    count = completion.sampled_at.count(version)
    prompt_ids = group.prompt.token_ids + completion.token_ids[:start]
    upto = replace(sampling, max_completion_length=count + model.config.block_size)  # further tokens are others'
    (again,) = TorchEngine(model, tokenizer).generate([prompt_ids], upto, [stable_seed(group.seed, place)])
    part = slice(start, start + count)
    assert again.token_ids[:count] == completion.token_ids[part]
    assert again.step_map[:count] == completion.step_map[part]
    with torch.no_grad():
        (logprob_R,) = logprobs(model, [completion], sampling)
    assert completion.logprobs is not None
    assert completion.logprobs[part] == pytest.approx(logprob_R[part].tolist(), abs=2e-5)


@pytest.mark.parametrize("likelihood", ["reveal", "trajectory"])
@pytest.mark.parametrize("correction", ["none", "token_truncate"])
def test_an_action_knows_its_weights_and_what_they_gave_it(tmp_path: Path, correction: Any, likelihood: Any) -> None:
    several = {"confidence_threshold": 0.1} if likelihood == "trajectory" else {}  # steps with holds
    objective = ObjectiveConfig(importance_sampling_correction=correction, likelihood=likelihood)
    ours = trainer(tmp_path, objective=objective, rollout=several)
    tables: list[tuple[int, Sequence[RolloutGroup], Any]] = []
    table = ours.updater._table

    def kept(groups: Sequence[RolloutGroup], advantages: Any, now: int, iteration: int) -> Any:
        found = table(groups, advantages, now, iteration)
        tables.extend((now, groups, batch) for batch in found)
        return found

    ours.updater._table = kept  # type: ignore[method-assign]
    ours.begin()
    rows = [ours.step() for _ in range(6)]
    num_mixed = num_moved = 0
    for now, groups, batch in tables:
        completions = [completion for group in groups for completion in group.completions]
        actions = batch.packed.actions
        at = list(zip(batch.completion_T.tolist(), actions.completion_index_T.tolist(), strict=True))
        assert batch.sampled_at_T.tolist() == [completions[number].sampled_at[token] for number, token in at]
        recorded_T = torch.tensor([completions[number].logprobs[token] for number, token in at])
        recorded_T[~actions.is_reveal_T] = torch.tensor(
            [hold for number in dict(at) for hold in completions[number].hold_logprobs or ()]
        )
        assert torch.equal(batch.engine_logprob_T, recorded_T)
        stale_T = batch.sampled_at_T < now
        assert torch.equal(~batch.behavior_logprob_T.isnan(), stale_T)
        if correction == "none":
            assert torch.equal(batch.behavior_logprob_T[stale_T], recorded_T[stale_T])
        num_moved += int((batch.behavior_logprob_T[stale_T] != recorded_T[stale_T]).sum())
        num_mixed += sum(len(set(completion.sampled_at)) > 1 for completion in completions)
    assert num_mixed > 3 and (num_moved > 0) == (correction != "none")
    for now, metrics in enumerate(rows):
        ages = [
            now - then
            for at, groups, _ in tables
            if at == now
            for group in groups
            for completion in group.completions
            for then in completion.sampled_at
        ]
        assert metrics["staleness/mean"] == pytest.approx(sum(ages) / len(ages))
        assert metrics["staleness/max"] == max(ages)
    assert all(metrics.get("sampling/logp_difference/max", 0.0) < 1e-4 for metrics in rows)  # of fresh actions alone


def test_a_group_is_waited_for_once_it_is_old() -> None:
    config = replace(PARTIAL, dynamic_sampling=False, max_partial_age=1)
    ours, passes = collector(config)
    num_waited_for = 0
    for step in range(20):
        due = [one.taken.number for one in ours.in_flight if one.sampled_at <= step - 1]
        before = passes.count
        collected = ours.collect(step, step - 1)
        if passes.count > before:  # else enough groups of the step before were left
            assert set(due).isdisjoint(one.taken.number for one in ours.in_flight)
            assert collected.metrics["partial/waited_for"] == len(due)
            num_waited_for += len(due)
    assert num_waited_for > 0


def test_a_run_that_is_resumed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", save_steps=2)
    whole.train()
    first = trainer(tmp_path / "parts", save_steps=2)
    collect = first.collector.collect

    def killed(step: int, oldest: int) -> Any:
        if step == 5:
            raise KeyboardInterrupt
        return collect(step, oldest)

    first.collector.collect = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path / "parts", save_steps=2)
    second.train()
    assert_same_run(whole, second)


def assert_same_run(one: RLTrainer, other: RLTrainer) -> None:
    weights = other.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in one.model.state_dict().items())
    assert (one.collector.waiting, one.collector.in_flight) == (other.collector.waiting, other.collector.in_flight)


def test_what_fails_amid_a_round_loses_no_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = collector(PARTIAL)
    ours.collect(0)
    before, scored = ours._num_taken, ours.rollouts.scored
    monkeypatch.setattr(ours.rollouts, "scored", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.collect(1)
    monkeypatch.setattr(ours.rollouts, "scored", scored)
    used = [group.number for group in ours.collect(1).everyone]
    assert set(range(before, ours._num_taken)) <= {*used, *numbers_of(ours)}


def test_a_stage_begins_prompts_in_flight_anew() -> None:
    ours, _ = collector(PARTIAL)
    step = 0
    while not (ours.waiting and any(one.completions for one in ours.in_flight)):
        ours.collect(step)
        step += 1
    numbers = sorted(numbers_of(ours))
    ours.begin_stage(ours.rollouts, step)
    assert [one.taken.number for one in ours.in_flight] == numbers and not ours.waiting
    assert not any(one.completions for one in ours.in_flight)
    ours.collect(step)
    kept = ours.in_flight, ours.waiting
    ours.begin_stage(ours.rollouts, step)  # as a run does that is resumed amid the stage
    assert (ours.in_flight, ours.waiting) == kept


@pytest.mark.parametrize("is_partial", [False, True])
def test_a_run_that_changes_its_way_keeps_the_prompts(is_partial: bool) -> None:
    """Of a checkpoint with prompts in flight, and of one with rounds ahead that were interrupted."""
    ways = PARTIAL, replace(PARTIAL, partial=False)
    (before, _), (after, _) = (collector(way) for way in (ways[is_partial], ways[not is_partial]))
    if is_partial:
        before._unasked.append(before._take(0, 5))
    else:
        before.collect(0)
    state = json.loads(json.dumps(before.state_dict()))
    after.load_state_dict(state)
    collected = after.collect(1)
    unused = [one.number for taken in after._unasked for one in taken] + numbers_of(after)
    known = set(range(before._num_taken)) - {group.number for group in before.waiting}
    trained = set() if is_partial else known - {one.taken.number for one in before.in_flight}
    assert known - trained <= {group.number for group in collected.everyone} | set(unused)


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"oversampling": 1.0}, "rollout.oversampling=1 has every prompt in flight waited for"),
        ({"max_staleness": 1}, r"cannot go with rollout\.max_staleness=1"),
        ({"threshold_policy": [0.5, 0.9]}, r"cannot go with rollout\.threshold_policy"),
        ({"mode": "server"}, r"cannot go with rollout\.mode=server"),
        ({"engine": "lmdeploy"}, r"cannot go with rollout\.engine=lmdeploy"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(rollout: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(PARTIAL, **rollout)


@pytest.mark.parametrize("objective", [{"score": "masked"}, {"shrink": 2}, {"views": "masks"}], ids=str)
def test_what_the_engine_does_not_record_is_refused(objective: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"rollout\.partial=true needs what the engine recorded"):
        RLConfig(rollout=PARTIAL, objective=ObjectiveConfig(**objective))


def test_an_engine_or_a_model_that_cannot_go_on_is_refused() -> None:
    ours, _ = collector(PARTIAL)
    old = ours.rollouts

    class Closed:
        generate = None

    for engine, block_length in ((Closed(), 4), (old.engine, 0)):
        with pytest.raises(UserError, match=r"partial=true goes on behind blocks .*; set these, or partial=false"):
            scheme = replace(old.scheme, block_length=block_length)
            Rollouts(engine, old.rubric, PARTIAL, Timings(), (scheme, 128))  # type: ignore[arg-type]


def killed_at_pass(count: int, output_dir: Path) -> None:
    """Train, and be gone in the middle of a rollout."""
    ours = trainer(output_dir, save_steps=1)

    def stepped(frames: object) -> None:
        nonlocal count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    ours.engine.observer.stepped = stepped  # type: ignore[attr-defined]
    ours.train()


def fork(act: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        act()
        os._exit(0)
    finally:
        os._exit(1)


def run_forks(output_dir: Path) -> None:
    """A run that is killed again and again, and then ends, and one that goes through."""
    for count in (12, 5, 9):
        assert os.WTERMSIG(fork(lambda n=count: killed_at_pass(n, output_dir / "killed"))) == signal.SIGKILL  # type: ignore[misc]
    assert fork(lambda: trainer(output_dir / "killed", save_steps=1).train()) == 0
    assert fork(lambda: trainer(output_dir / "whole", save_steps=1).train()) == 0


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_rollouts_goes_on_bit_for_bit(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    expected, weights = (load(str(tmp_path / run / "final"))[0].state_dict() for run in ("whole", "killed"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def train_in_processes(output_dir: Path) -> None:
    """One run with rounds ahead and one in parts; the main process writes which prompts they trained on."""
    used = {}
    for kind, ours in {
        "ahead": test_ahead.trainer(output_dir / "ahead", 1, max_steps=4, adam_epsilon=1e-2),
        "parts": trainer(output_dir / "parts", max_steps=5, save_steps=5),
    }.items():
        _, steps = watched(ours)
        ours.train()
        gather = ours.distributed.gather
        used[kind] = [gather([group.number for group in groups]) for groups in steps]
    if ours.distributed.is_main:
        assert ours.distributed.world_size == 2
        (output_dir / "used.json").write_text(json.dumps(used))
    ours.distributed.close()


@pytest.mark.slow
def test_two_processes_lose_nothing_and_one_goes_on_alone(tmp_path: Path) -> None:
    done = launch_script(__file__, str(tmp_path), "two", backend="ddp", num_processes=2, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    used = json.loads((tmp_path / "used.json").read_text())

    alone = test_ahead.trainer(tmp_path / "alone", 1, max_steps=4, adam_epsilon=1e-2)
    _, steps = watched(alone)
    alone.train()
    assert [sorted(of_step) for of_step in used["ahead"]] == [[g.number for g in groups] for groups in steps]
    weights = load(str(tmp_path / "ahead" / "final"))[0].state_dict()
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)

    ours = trainer(tmp_path / "parts", max_steps=10, save_steps=5)
    _, steps = watched(ours)
    ours.train()
    trained = [n for of_step in used["parts"] for n in of_step] + [g.number for groups in steps for g in groups]
    assert sorted(trained + numbers_of(ours.collector)) == list(range(ours.collector._num_taken))
    assert len(trained) == 10 * 3


if __name__ == "__main__":
    (train_in_processes if sys.argv[2:] == ["two"] else run_forks)(Path(sys.argv[1]))
