"""Two processes make the same run as one, also where one of them has nothing to train on.

This file is also the script that the processes run: `python -m torch.distributed.run ... test_processes.py CASE OUT`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

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
from tests.oracle import sharp_tiny_model

ROOT = Path(__file__).parents[2]
# idle: one document or prompt a step, so that one of two ranks has none; thresholds: a policy chooses them
# full: full attention, shifted; blocks: shifted predictions in blocks that a stage of SFT enlarges
CASES = (
    "usual",
    *(pytest.param(name, marks=pytest.mark.matrix) for name in ("idle", "thresholds", "full", "blocks")),
)
STAGES: dict[str, list[dict[str, Any]]] = {
    "usual": [{"from_step": 1, "data.max_length": 20, "global_batch_size": 4}],
    "blocks": [{"from_step": 1, "model.block_length": 4}],
}


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    """A reward with spread on the completions of an untrained model."""
    return [float(len(completion) % 2 == 0) for completion in completions]


def base(case: str) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    if case in ("full", "blocks"):
        return sharp_tiny_model(block_length=0 if case == "full" else 2, shift=1, sharpness=9.0)
    return tiny()


def train(case: str, output_dir: Path) -> None:
    """3 SFT steps, then 2 RL steps on the same weights; writes metrics.json and weights.pt."""
    is_idle = case == "idle"
    model, tokenizer = base(case)
    documents = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 22)]
    if case == "usual":  # a text that is cut, and documents that are too long
        documents += [Document([], list(range(30, 70))), Document([1], [9] * 40), Document([2], [8] * 40)]
    # A large epsilon keeps Adam from blowing rounding errors up to whole steps.
    sft = SFTTrainer(
        SFTConfig(
            output_dir=str(output_dir / "sft"),
            max_steps=3,
            global_batch_size=1 if is_idle else 5,
            learning_rate=1e-2,
            adam_epsilon=1e-2,
            max_tokens_per_micro_batch=64,
            data=SFTDataConfig(num_heldout=1 if is_idle else 3, max_length=26),
            autoregressive_weight=0.2 if case == "usual" else 0.0,
            stages=STAGES.get(case, []),
        ),
        model=model,
        tokenizer=tokenizer,
        documents=documents,
    )
    sft.train()
    rl = RLTrainer(
        RLConfig(
            output_dir=str(output_dir / "rl"),
            max_steps=4,
            num_iterations=2,
            learning_rate=3e-3,  # at 1e-2 the second step's KL amplifies rounding beyond the bound
            adam_epsilon=1e-2,
            objective=ObjectiveConfig(likelihood="trajectory", beta=0.1, scale_rewards="batch"),
            max_tokens_per_micro_batch=256,
            rollout=RolloutConfig(
                prompts_per_step=1 if is_idle else 3,
                num_generations=4,
                max_completion_length=12,
                max_sampling_rounds=3,
                threshold_policy=[0.01, 0.9] if case == "thresholds" else [],
            ),
            reward=RewardConfig(functions=[f"{__file__}:even_length"]),
        ),
        model=sft.model,
        tokenizer=tokenizer,
        problems=[Problem("?" * length, "0", {}) for length in range(1, 8)],
    )
    rl.train()
    if rl.distributed.is_main:
        record = {"world_size": rl.distributed.world_size, **read_metrics(output_dir)}
        (output_dir / "metrics.json").write_text(json.dumps(record), encoding="utf-8")
        torch.save(rl.model.state_dict(), output_dir / "weights.pt")
    rl.distributed.close()


def read_metrics(output_dir: Path) -> dict[str, list[dict[str, float]]]:
    return {
        kind: [json.loads(line) for line in (output_dir / kind / "metrics.jsonl").read_text().splitlines()]
        for kind in ("sft", "rl")
    }


def launch(case: str, num_processes: int, output_dir: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    output_dir.mkdir()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    if num_processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc_per_node", str(num_processes), __file__]
    done = subprocess.run(
        [*command, case, str(output_dir)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    record = json.loads((output_dir / "metrics.json").read_text(encoding="utf-8"))
    return record, torch.load(output_dir / "weights.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case: str, tmp_path: Path) -> None:
    one, weights_of_one = launch(case, 1, tmp_path / "one")
    two, weights_of_two = launch(case, 2, tmp_path / "two")
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert [len(one["sft"]), len(one["rl"])] == [3, 2]
    for kind, names in {
        "sft": ("loss", "grad_norm", "num_tokens"),
        "rl": ("loss", "grad_norm", "reward", "kl", "entropy", "groups/kept", "num_completion_tokens"),
    }.items():
        if case == "thresholds" and kind == "rl":
            names = (*names, "threshold/mean", "threshold/entropy", "threshold/grad_norm")
        for row, other in zip(one[kind], two[kind], strict=True):
            assert [row[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-5, abs=1e-5)
            assert row["grad_norm"] > 0
    assert one["sft"][-1]["eval/loss"] == pytest.approx(two["sft"][-1]["eval/loss"], rel=1e-5)
    start = base(case)[0].state_dict()
    for name, weight in weights_of_one.items():
        torch.testing.assert_close(weights_of_two[name], weight, rtol=0, atol=1e-5)
    assert max(float((weights_of_one[name] - start[name]).abs().max()) for name in start) > 1e-3


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
