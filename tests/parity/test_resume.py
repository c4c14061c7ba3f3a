"""Two steps, a checkpoint and two more are four steps, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer


class Killed(RuntimeError):
    """The process is gone."""


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def sft_trainer(output_dir: Path) -> SFTTrainer:
    model, tokenizer = tiny()
    config = SFTConfig(
        output_dir=str(output_dir),
        max_steps=4,
        global_batch_size=4,
        learning_rate=1e-3,
        warmup_steps=1,
        save_steps=2,
        data=SFTDataConfig(num_heldout=2),
    )
    documents = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 22)]
    return SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents)


def sft_texts_trainer(output_dir: Path) -> SFTTrainer:
    """With texts that are cut over several steps, and documents that are too long."""
    model, tokenizer = tiny()
    data = SFTDataConfig(num_heldout=2, max_length=14)
    config = replace(sft_trainer(output_dir).config, data=data)
    texts = [Document([], list(range(40, 40 + length))) for length in range(50, 75, 5)]
    too_long = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 16)]
    return SFTTrainer(config, model=model, tokenizer=tokenizer, documents=[*texts, *too_long])


def rl_trainer(output_dir: Path) -> RLTrainer:
    model, tokenizer = tiny()
    config = RLConfig(
        output_dir=str(output_dir),
        max_steps=4,
        learning_rate=1e-3,
        warmup_steps=1,
        save_steps=2,
        objective=ObjectiveConfig(beta=0.1),
        rollout=RolloutConfig(prompts_per_step=3, num_generations=4, max_completion_length=12),
        reward=RewardConfig(functions=[f"{__file__}:even_length"]),
    )
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def threshold_trainer(output_dir: Path) -> RLTrainer:
    """With a policy of thresholds, and groups that wait."""
    plain = rl_trainer(output_dir)
    rollout = replace(plain.config.rollout, threshold_policy=[0.005, 0.9], oversampling=2.0)
    model, tokenizer = tiny()
    config = replace(plain.config, rollout=rollout, objective=ObjectiveConfig(likelihood="trajectory"))
    problems = [prompt.problem for prompt in plain.collector.prompts]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def sft_stages_trainer(output_dir: Path) -> SFTTrainer:
    """A stage begins where the checkpoint is, and one beyond it."""
    plain = sft_texts_trainer(output_dir)
    stages: list[dict[str, object]] = [
        {"from_step": 2, "model.block_length": 2, "data.max_length": 17},
        {"from_step": 3, "model.block_length": 8, "global_batch_size": 6, "noise.complementary": True},
    ]
    model, tokenizer = tiny()
    documents = [document for i in range(12) if (document := plain.documents[i]) is not None]
    return SFTTrainer(replace(plain.config, stages=stages), model=model, tokenizer=tokenizer, documents=documents)


def rl_stages_trainer(output_dir: Path) -> RLTrainer:
    """With groups that wait when the stage begins where the checkpoint is."""
    plain = rl_trainer(output_dir)
    rollout = replace(plain.config.rollout, oversampling=4.0)
    stages: list[dict[str, object]] = [
        {"from_step": 2, "model.block_length": 8, "rollout.max_completion_length": 20},
        {"from_step": 3, "rollout.temperature": 0.7},
    ]
    model, tokenizer = tiny()
    problems = [prompt.problem for prompt in plain.collector.prompts]
    config = replace(plain.config, rollout=rollout, stages=stages)
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def numbers(output_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = ("timing_s/", "perf/", "time")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in rows]


def weights(model: BlockDiffusionModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


MAKERS = (sft_trainer, sft_texts_trainer, sft_stages_trainer, rl_trainer, threshold_trainer, rl_stages_trainer)


@pytest.mark.parametrize("make", MAKERS)
def test_resumed_equals_uninterrupted(
    make: Callable[[Path], SFTTrainer | RLTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole")
    whole.train()

    killed = make(tmp_path / "parts")
    step = killed.step

    def step_until_killed() -> dict[str, float]:
        if killed.steps_done == 3:  # one step beyond the checkpoint: it is done again
            raise Killed
        return step()

    monkeypatch.setattr(killed, "step", step_until_killed)
    with pytest.raises(Killed):
        killed.train()
    after_kill = weights(killed.model)
    torch.manual_seed(123)

    resumed = make(tmp_path / "parts")
    resumed.train()
    assert [row["step"] for row in numbers(tmp_path / "parts")] == [1, 2, 3, 4]
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    expected = weights(whole.model)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed.model).items())
    assert not all(torch.equal(value, expected[name]) for name, value in after_kill.items())
    if make in (sft_stages_trainer, rl_stages_trainer):
        assert [row["stage"] for row in numbers(tmp_path / "parts")] == [0, 0, 1, 2]
    if make is rl_stages_trainer:
        assert numbers(tmp_path / "whole")[1]["groups/carried_over"] > 0
    if make is threshold_trainer:
        heads = [(tmp_path / run / "final" / "threshold_policy.json").read_text() for run in ("whole", "parts")]
        assert heads[0] == heads[1] and any(map(any, json.loads(heads[0])["weight"]))
        assert any(row["groups/carried_over"] for row in numbers(tmp_path / "whole"))
