"""The same three steps of SFT and of RL under every backend and every split into micro-batches.

Real launches with the shipped configs/accelerate/*.yaml through scripts/launch.sh, two processes on CPUs. This file is
also the script that the processes run: `test_backends.py OUT`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.model.lora import LoraConfig
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.critic import CriticConfig
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.full_parameters import full_state_dict
from dirl.training.optimizer import Learner, Loss, StepOutcome
from tests.launching import launch_script

# Micro-batches a rank makes of eight documents, or of four groups of two: 8 documents at once, 4 and 4, one by one.
BUDGETS = {"1x8": 4096, "2x4": 260, "8x1": 64}
RL_BUDGETS = {"1x8": 4096, "2x4": 420, "8x1": 112}
OPTIMIZER: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-2,  # a large one keeps Adam from blowing rounding errors up to whole steps
    "lr_scheduler_type": "linear",
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}


def prefers_even(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    """A reward with spread on the completions of an untrained model."""
    return [float(len(completion) % 2 == 0) for completion in completions]


def sft_trainer(output_dir: Path, budget: int) -> SFTTrainer:
    model, tokenizer = tiny()
    documents = [
        Document(list(range(1, 6)), list(range(40, 40 + length))) for length in (15, 26, 17, 19, 22, 24, 16, 25)
    ]
    config = SFTConfig(
        output_dir=str(output_dir),
        global_batch_size=8,
        max_tokens_per_micro_batch=budget,
        data=SFTDataConfig(num_heldout=0),
        **OPTIMIZER,
    )
    return SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents)


def lora_trainer(output_dir: Path, budget: int) -> RLTrainer:
    return rl_trainer(output_dir, budget, LoraConfig(r=4))


def rl_trainer(output_dir: Path, budget: int, lora: LoraConfig | None = None) -> RLTrainer:
    model, tokenizer = tiny()
    config = RLConfig(
        output_dir=str(output_dir),
        objective=ObjectiveConfig(likelihood="trajectory", beta=0.1),
        lora=lora or LoraConfig(),
        max_tokens_per_micro_batch=budget,
        rollout=RolloutConfig(prompts_per_step=4, num_generations=2, dynamic_sampling=False, max_completion_length=20),
        reward=RewardConfig(functions=[f"{__file__}:prefers_even"]),
        **OPTIMIZER,
    )
    problems = [Problem("?" * length, "0", {}) for length in (1, 2, 5, 7)]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def critic_trainer(output_dir: Path, budget: int) -> RLTrainer:
    """Two passes over each batch; a second model beside the policy, with another schedule and another clipping."""
    trainer = rl_trainer(output_dir, budget)
    critic = CriticConfig(
        learning_rate=3e-3, lr_scheduler_type="cosine", warmup_steps=1, weight_decay=0.2, max_grad_norm=0.05
    )
    config = replace(
        trainer.config,
        max_steps=6,
        num_iterations=2,
        critic=critic,
        objective=ObjectiveConfig(likelihood="trajectory", advantage="gae", gae_gamma=0.99, gae_lambda=0.9),
    )
    problems = [prompt.problem for prompt in trainer.collector.prompts]
    model, tokenizer = tiny()
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def shared_critic_trainer(output_dir: Path, budget: int) -> RLTrainer:
    """The critic on the policy's frozen weights, where they are whole; else on a copy of them."""
    trainer = lora_trainer(output_dir, budget)
    config = replace(
        trainer.config,
        critic=CriticConfig(
            backbone="copy" if trainer.distributed.is_sharded else "shared", learning_rate=1e-2, max_grad_norm=0.1
        ),
        objective=ObjectiveConfig(likelihood="trajectory", advantage="gae", beta=0.1),
    )
    problems = [prompt.problem for prompt in trainer.collector.prompts]
    model, tokenizer = tiny()
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def carrying_trainer(output_dir: Path, budget: int) -> RLTrainer:
    """Two passes over each batch, groups that wait for the next step, and ranks that have none."""
    trainer = rl_trainer(output_dir, budget)
    config = replace(
        trainer.config,
        max_steps=6,
        num_iterations=2,
        learning_rate=1e-3,
        rollout=replace(trainer.config.rollout, prompts_per_step=1, oversampling=3.0, dynamic_sampling=True),
    )
    problems = [prompt.problem for prompt in trainer.collector.prompts]
    model, tokenizer = tiny()
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def count_micro_batches(learner: Learner) -> list[int]:
    counts: list[int] = []
    update = learner.update

    def counted(losses: Sequence[Callable[[], Loss]], empty_loss: Callable[[], Loss]) -> StepOutcome:
        counts.append(len(losses))
        return update(losses, empty_loss)

    learner.update = counted  # type: ignore[method-assign]
    return counts


def run_all(output_dir: Path) -> None:
    """Every split, SFT and RL; writes record.json and the weights of each."""
    record: dict[str, Any] = {}
    cases = (
        ("sft", sft_trainer, BUDGETS),
        ("rl", rl_trainer, RL_BUDGETS),
        ("lora", lora_trainer, {"1x8": 4096}),
        ("carried", carrying_trainer, {"1x8": 4096}),
        ("critic", critic_trainer, RL_BUDGETS),
        ("shared", shared_critic_trainer, {"1x8": 4096}),
    )
    for kind, make, budgets in cases:
        for split, budget in budgets.items():
            trainer = make(output_dir / kind / split, budget)
            counts = count_micro_batches(trainer.learner)
            steps = [trainer.step() for _ in range(3)]
            model = trainer.distributed.unwrap(trainer.learner.module).model
            weights = full_state_dict(model, keep=trainer.distributed.is_main)
            for name, learner in list(trainer.learners().items())[1:]:
                module = trainer.distributed.unwrap(learner.module)
                beside = full_state_dict(module, keep=trainer.distributed.is_main)
                weights |= {f"{name}:{key}": tensor for key, tensor in beside.items()}
            if trainer.distributed.is_main:
                torch.save(weights, output_dir / f"{kind}_{split}.pt")
                record[f"{kind}_{split}"] = {"steps": steps, "micro_batches": counts}
            record |= {"world_size": trainer.distributed.world_size, "backend": trainer.distributed.backend}
    if trainer.distributed.is_main:
        (output_dir / "record.json").write_text(json.dumps(record), encoding="utf-8")
    trainer.distributed.close()


def launch(backend: str, num_processes: int, output_dir: Path) -> dict[str, Any]:
    output_dir.mkdir()
    done = launch_script(__file__, str(output_dir), backend=backend, num_processes=num_processes, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((output_dir / "record.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process computes in one micro-batch."""
    folder = tmp_path_factory.mktemp("backends") / "plain"
    record = launch("plain", 1, folder)
    assert (record["world_size"], record["backend"]) == (1, "plain")
    for kind in ("sft", "rl"):
        whole, halves, single = (record[f"{kind}_{split}"]["micro_batches"] for split in BUDGETS)
        assert (whole, halves) == ([1] * 3, [2] * 3)
        assert min(single) >= 7  # two short completions may share a pack
    return folder


def assert_same(folder: Path, reference: Path, run: str) -> None:
    kind = run.split("_")[0]
    ours, theirs = (json.loads((path / "record.json").read_text()) for path in (folder, reference))
    for row, other in zip(ours[run]["steps"], theirs[f"{kind}_1x8"]["steps"], strict=True):
        names = ["loss", "grad_norm", "learning_rate", *(name for name in other if name.startswith("critic/"))]
        # Of RL a group that is cut repeats its prompt, and so has other num_tokens.
        names += ["num_tokens"] if kind == "sft" else ["entropy"]
        names += ["kl"] if "kl" in other else []
        for name in names:
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (run, name)
        assert row["grad_norm"] > 0 and row["skipped_steps"] == 0
    weights, expected = (
        torch.load(path, weights_only=True) for path in (folder / f"{run}.pt", reference / f"{kind}_1x8.pt")
    )
    start = tiny()[0].state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
    assert max(float((expected[name] - start[name]).abs().max()) for name in start if name in expected) > 1e-3
    assert all(float(expected[name].abs().max()) > 1e-4 for name in expected if name == "critic:head.weight")
    assert ("critic:head.weight" in expected) == (kind in ("critic", "shared"))


RUNS = [
    *(f"{kind}_{split}" for kind in ("sft", "rl", "critic") for split in BUDGETS),
    *("lora_1x8", "carried_1x8", "shared_1x8"),
]


@pytest.mark.parametrize("run", RUNS)
def test_accumulation_in_one_process(run: str, one_process: Path) -> None:
    assert_same(one_process, one_process, run)


MATRIX = ("ddp", "zero2", "zero3", "zero3_hpz", "fsdp2")


@pytest.mark.parametrize("backend", ["zero1", *(pytest.param(name, marks=pytest.mark.matrix) for name in MATRIX)])
def test_two_processes_equal_one(backend: str, one_process: Path, tmp_path: Path) -> None:
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs the deepspeed extra")
    record = launch(backend, 2, tmp_path / backend)
    assert (record["world_size"], record["backend"]) == (2, backend.removesuffix("_hpz"))
    for run in RUNS:
        assert_same(tmp_path / backend, one_process, run)


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
