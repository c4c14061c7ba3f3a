"""Eight micro-batches of one document or completion make the same optimizer step as one micro-batch of eight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.objective import LossType, ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.optimizer import Learner, Loss, StepOutcome

# With so large an epsilon AdamW's first update is nearly the gradient: Adam's own scale would hide a wrong denominator.
LEARNING_RATE = ADAM_EPSILON = 1e3

SFT = SFTConfig(
    output_dir="unused",
    max_steps=1,
    global_batch_size=8,
    learning_rate=LEARNING_RATE,
    adam_epsilon=ADAM_EPSILON,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    data=SFTDataConfig(num_heldout=0),
)
RL = RLConfig(
    output_dir="unused",
    max_steps=1,
    learning_rate=LEARNING_RATE,
    adam_epsilon=ADAM_EPSILON,
    lr_scheduler_type="constant",
    max_grad_norm=0.0,
    objective=ObjectiveConfig(beta=0.1),
    rollout=RolloutConfig(prompts_per_step=4, num_generations=2, dynamic_sampling=False, max_completion_length=20),
)


def count_micro_batches(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    update = learner.update

    def counted(losses: Sequence[Callable[[], Loss]], empty_loss: Callable[[], Loss]) -> StepOutcome:
        counts.append(len(losses))
        return update(losses, empty_loss)

    monkeypatch.setattr(learner, "update", counted)
    return counts


def assert_same_step(first: torch.nn.Module, second: torch.nn.Module, start: torch.nn.Module) -> None:
    """The tolerance is far below what the step changed."""
    rows = zip(first.parameters(), second.parameters(), start.parameters(), strict=True)
    moved = 0.0
    for a, b, before in rows:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        moved = max(moved, float((a - before).detach().abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("complementary", [False, True])
def test_sft(complementary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Packed lengths between 36 and 60: no two documents fit 64 tokens.
    documents = [
        Document(list(range(1, 6)), list(range(40, 40 + length))) for length in (15, 26, 17, 19, 22, 24, 16, 25)
    ]
    config = replace(SFT, noise=replace(SFT.noise, complementary=complementary))
    trained, metrics = [], []
    for budget, num_micro_batches in ((4096, 1), (100 if complementary else 64, 8)):
        model, tokenizer = tiny()
        trainer = SFTTrainer(
            replace(config, max_tokens_per_micro_batch=budget), model=model, tokenizer=tokenizer, documents=documents
        )
        counts = count_micro_batches(trainer.learner, monkeypatch)
        metrics.append(trainer.step())
        assert counts == [num_micro_batches]
        trained.append(model)
    assert_same_step(trained[0], trained[1], tiny()[0])
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_rl(loss_type: LossType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def first(prompts, completions, **_):\n    return [len(c) % 5 + c.count('e') for c in completions]\n"
    )
    problems = [Problem("?" * length, "0", {}) for length in (1, 2, 5, 7)]
    trained, metrics = [], []
    for budget, num_micro_batches in ((4096, 1), (112, 8)):
        model, tokenizer = tiny()
        config = replace(
            RL,
            objective=replace(RL.objective, loss_type=loss_type),
            max_tokens_per_micro_batch=budget,
            reward=RewardConfig(functions=[f"{reward}:first"]),
        )
        trainer = RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)
        counts = count_micro_batches(trainer.learner, monkeypatch)
        metrics.append(trainer.step())
        assert counts == [num_micro_batches]
        assert metrics[-1]["reward_std"] > 0
        trained.append(model)
    assert_same_step(trained[0], trained[1], tiny()[0])
    for name in ("loss", "grad_norm", "entropy"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-7)
