"""Two processes that are stopped by a signal on one rank, or meet NaN on one rank, under real launches.

This file is also the script that the processes run: `test_interruption.py TASK OUT`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.diffusion.noising import NoiseConfig
from dirl.errors import RunInterrupted, UserError
from dirl.model.checkpoint import load
from dirl.model.lora import LoraConfig
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.critic import CriticConfig
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig, RLDataConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.full_parameters import full_state_dict
from dirl.training.optimizer import Loss, StepOutcome, TrainingDiverged
from dirl.training.run_identity import check_identity
from tests.launching import launch_script

STEPS: dict[str, Any] = {"max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 1, "max_tokens_per_micro_batch": 128}
DOCUMENTS = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 22)]


def prefers_even(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def sft_trainer(output_dir: Path, **changes: Any) -> SFTTrainer:
    model, tokenizer = tiny()
    config = SFTConfig(
        output_dir=str(output_dir), global_batch_size=5, **{"data": SFTDataConfig(num_heldout=2), **STEPS, **changes}
    )
    return SFTTrainer(config, model=model, tokenizer=tokenizer, documents=DOCUMENTS)


def critic_trainer(output_dir: Path, **changes: Any) -> RLTrainer:
    """Two models, each with an optimizer and a schedule of its own."""
    objective = ObjectiveConfig(likelihood="trajectory", advantage="gae", gae_lambda=0.9)
    critic = CriticConfig(learning_rate=1e-3, lr_scheduler_type="linear", critic_only_steps=1)
    return rl_trainer(output_dir, objective=objective, critic=critic, **changes)


def rl_trainer(output_dir: Path, **changes: Any) -> RLTrainer:
    model, tokenizer = tiny()
    config = RLConfig(
        output_dir=str(output_dir),
        **{
            "rollout": RolloutConfig(
                prompts_per_step=3, num_generations=4, max_completion_length=12, max_sampling_rounds=3, oversampling=1.5
            ),
            "reward": RewardConfig(functions=[f"{__file__}:prefers_even"]),
            "objective": ObjectiveConfig(likelihood="trajectory"),
            **STEPS,
            **changes,
        },
    )
    return RLTrainer(
        config,
        model=model,
        tokenizer=tokenizer,
        problems=[Problem("?" * length, "0", {}) for length in range(1, 12)],
    )


def stop_in_second(function: Callable[..., Any], *, rank: int) -> Callable[..., Any]:
    """The function, which sends SIGTERM to its own process (on rank 1 of 2) in the middle of its third call."""
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **named)

    return wrapped


def train_each(output_dir: Path, kinds: Sequence[str], *, is_stopped: bool) -> None:
    for kind in kinds:
        trainer: Any = MAKE[kind](output_dir / kind)
        if is_stopped and kind == "sft":  # while it trains
            trainer.learner.update = stop_in_second(trainer.learner.update, rank=trainer.distributed.rank)
        elif is_stopped:  # while it rolls out
            trainer.engine.generate = stop_in_second(trainer.engine.generate, rank=trainer.distributed.rank)
        try:
            trainer.train()
        except RunInterrupted as stop:
            if trainer.distributed.is_main:
                amid = trainer.collector.is_amid if kind != "sft" else False
                is_final = (output_dir / kind / "final").exists()
                record = [str(stop), trainer.steps_done, amid, is_final]
                (output_dir / f"{kind}_stopped.json").write_text(json.dumps(record))


def meet_nan(output_dir: Path) -> None:
    """A loss, then a gradient, that is not a number on rank 1 only; then three losses in a row."""
    trainer = sft_trainer(output_dir / "nan")
    inner = trainer.distributed.unwrap(trainer.learner.module).model
    poison = torch.tensor(float("nan"))
    update = trainer.learner.update
    plan = ["loss", "gradient", "", "loss", "loss", "loss"]

    def poisoned(losses: Sequence[Callable[[], Loss]], empty_loss: Callable[[], Loss]) -> StepOutcome:
        how = plan.pop(0) if trainer.distributed.rank == 1 else ""

        def spoil(compute: Callable[[], Loss]) -> Callable[[], Loss]:
            def spoilt() -> Loss:
                loss = compute()
                value = loss.value
                if how == "gradient":  # a finite loss whose gradient is not
                    value = value + (value - value.detach()) * 0.0
                    value.register_hook(lambda gradient: gradient * poison)
                return replace(loss, value=value * poison if how == "loss" else value)

            return spoilt

        return update([spoil(losses[0]), *losses[1:]], empty_loss)

    trainer.learner.update = poisoned  # type: ignore[method-assign]
    rows, moved = [], []
    before = full_state_dict(inner, keep=True)
    for _ in range(3):
        rows.append(trainer.step())
        after = full_state_dict(inner, keep=True)
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in after))
        before = after
    diverged_at = 0
    try:
        for attempt in (1, 2, 3):
            diverged_at = attempt
            trainer.step()
    except TrainingDiverged:
        after = full_state_dict(inner, keep=True)
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in after))
    if trainer.distributed.is_main:
        record = {"skipped": [row["skipped_steps"] for row in rows], "moved": moved, "diverged_at": diverged_at}
        (output_dir / "nan.json").write_text(json.dumps(record), encoding="utf-8")


def hang(output_dir: Path) -> None:
    """Rank 1 never comes back from the update of its second step."""
    trainer = rl_trainer(output_dir / "hang", phase_timeout=4)
    update, rank = trainer.learner.update, trainer.distributed.rank

    def hanging(*arguments: Any) -> StepOutcome:
        if rank == 1 and trainer.steps_done == 1:
            time.sleep(600)
        return update(*arguments)

    trainer.learner.update = hanging  # type: ignore[method-assign]
    trainer.train()


def launch(backend: str, task: str, output_dir: Path, num_processes: int = 2) -> subprocess.CompletedProcess[str]:
    return launch_script(__file__, task, str(output_dir), backend=backend, num_processes=num_processes, timeout=400)


def numbers(output_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = ("timing_s/", "perf/", "time")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]


MAKE = {"sft": sft_trainer, "rl": rl_trainer, "critic": critic_trainer}
LAUNCHES = ["whole", "stopped", "resumed"]
MATRIX = ("ddp", "zero1", "zero2", "zero3", "zero3_hpz", "fsdp2")
CASES = [
    pytest.param("ddp", ["at_once"], ["rl"], id="at once"),  # in the processes of one launch
    *(pytest.param(name, LAUNCHES, [*MAKE], id=name, marks=pytest.mark.matrix) for name in MATRIX),
]


@pytest.mark.parametrize(("backend", "tasks", "kinds"), CASES)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    backend: str, tasks: list[str], kinds: list[str], tmp_path: Path
) -> None:
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs the deepspeed extra")
    for task in tasks:
        done = launch(backend, task, tmp_path)
        assert done.returncode == 0, done.stderr[-5000:]
    for kind in kinds:
        said, step, is_amid, is_final = json.loads((tmp_path / "parts" / f"{kind}_stopped.json").read_text())
        assert "the same command continues" in said and not is_final
        # RL in the middle of rollouts, which the checkpoint keeps.
        assert (step == 3 and not is_amid) if kind == "sft" else (step < 3 and is_amid)
        assert [row["step"] for row in numbers(tmp_path / "whole" / kind)] == [1, 2, 3, 4]
        assert numbers(tmp_path / "parts" / kind) == numbers(tmp_path / "whole" / kind)
        ours, theirs = (load(str(tmp_path / part / kind / "final"))[0].state_dict() for part in ("parts", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    nan = json.loads((tmp_path / "whole/nan.json").read_text())
    assert nan["skipped"] == [1.0, 1.0, 0.0] and nan["diverged_at"] == 3
    first, second, third, last = nan["moved"]
    assert (first, second, last) == (0.0, 0.0, 0.0) and third > 0
    skipped = [json.loads(line) for line in (tmp_path / "whole/nan/skipped_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in skipped] == [1, 2, 4, 5, 6]
    assert all(len(row["documents"]) == 5 for row in skipped)


def test_a_stuck_rank_ends_the_run_and_names_rank_and_phase(tmp_path: Path) -> None:
    done = launch("ddp", "hang", tmp_path / "hang")
    assert done.returncode != 0
    # Both are in it, and either clock may ring first; not 'step', which began before it.
    assert re.search(r"dirl: error: rank [01] has been in phase 'train' for", done.stderr)


def test_another_model_is_an_error_that_says_so(tmp_path: Path) -> None:
    sft_trainer(tmp_path, max_steps=1).train()
    model, tokenizer = tiny()
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=True)
    config = SFTConfig(output_dir=str(tmp_path), data=SFTDataConfig(num_heldout=2), **STEPS)
    with pytest.raises(UserError, match=r"step_000001 holds another model: .* resume with the model.path"):
        SFTTrainer(config, model=model, tokenizer=tokenizer, documents=DOCUMENTS).train()


def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    sft_trainer(tmp_path, max_steps=1).train()
    trainer = sft_trainer(tmp_path)
    model, tokenizer = tiny(seed=1)
    other = SFTTrainer(trainer.config, model=model, tokenizer=tokenizer, documents=DOCUMENTS)
    with pytest.raises(UserError, match=r"step_000001 is of a run that started from other weights"):
        other.train()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("noise.weight", {"noise": NoiseConfig(weight="even")}),
        ("seed", {"seed": 1}),
        ("lora.r", {"lora": LoraConfig(r=2)}),
        ("data.max_length", {"data": SFTDataConfig(num_heldout=2, max_length=500)}),
    ],
)
def test_what_sft_is_may_not_change(key: str, change: dict[str, Any], tmp_path: Path) -> None:
    sft_trainer(tmp_path, max_steps=1).train()
    with pytest.raises(UserError, match=rf"step_000001 was written with {re.escape(key)}=.*, this run has"):
        sft_trainer(tmp_path, **change).train()


def test_what_rl_is_may_not_change(tmp_path: Path) -> None:
    trainer = rl_trainer(tmp_path, max_steps=1)
    trainer.train()
    rollout, kept = trainer.config.rollout, trainer.config.reward
    for key, change in {
        "reward.functions": {"reward": RewardConfig(functions=["tokens_per_step"])},
        "reward.weights": {"reward": replace(kept, weights=[2.0])},
        "objective.epsilon": {"objective": ObjectiveConfig(likelihood="trajectory", epsilon=0.1)},
        "rollout.temperature": {"rollout": replace(rollout, temperature=0.5)},
        "data.suffix": {"data": RLDataConfig(suffix="!")},
    }.items():
        with pytest.raises(UserError, match=rf"step_000001 was written with {re.escape(key)}=.*, this run has"):
            rl_trainer(tmp_path, **change).train()
    more = rl_trainer(tmp_path, max_steps=2, rollout=replace(rollout, num_generations=2))  # a choice of the way there
    said: list[str] = []
    more.terminal.say = said.append  # type: ignore[method-assign]
    more.train()
    assert more.steps_done == 2
    (told,) = [line for line in said if line.startswith("other settings than before step 1: ")]
    assert "rollout.num_generations 4 -> 2" in told


def test_another_number_of_processes_or_backend() -> None:
    saved = {"parameters_digest": "a", "num_trained_tensors": 2, "num_parameters": 9, "backend": "ddp", "world_size": 2}
    for backend, world_size in (("plain", 1), ("ddp", 8)):
        check_identity(Path("step_1"), saved, {**saved, "backend": backend, "world_size": world_size})
    with pytest.raises(UserError, match=r"written under ddp, .* under zero1: launch with the ACCELERATE_CONFIG"):
        check_identity(Path("step_1"), saved, {**saved, "backend": "zero1"})
    for backend in ("zero2", "fsdp2"):
        with pytest.raises(UserError, match=r"launch with NUM_PROCESSES=2"):
            check_identity(
                Path("step_1"), {**saved, "backend": backend}, {**saved, "backend": backend, "world_size": 4}
            )


def test_other_data_are_an_error_that_says_so(tmp_path: Path) -> None:
    sft_trainer(tmp_path, max_steps=1).train()
    model, tokenizer = tiny()
    config = SFTConfig(output_dir=str(tmp_path), data=SFTDataConfig(num_heldout=2), **STEPS)
    documents = [Document([1, 2, 3], list(range(50, 50 + length))) for length in range(9, 22)]
    with pytest.raises(UserError, match="data_fingerprint"):
        SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents).train()


def main(task: str, output_dir: Path) -> None:
    if task == "hang":
        hang(output_dir)
        return
    for name in LAUNCHES if task == "at_once" else [task]:
        folder = output_dir / ("whole" if name == "whole" else "parts")
        train_each(folder, ["rl"] if task == "at_once" else [*MAKE], is_stopped=name == "stopped")
        if name == "whole":
            meet_nan(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
