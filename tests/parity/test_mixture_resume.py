"""Runs on several sources under one and two processes: the same data, and a run in two halves is the whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dirl.data.problems import Origin, Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.sft_data import SFTDataConfig
from dirl.sft.train import SFTConfig, SFTTrainer

ROOT = Path(__file__).parents[2]
WHOLE = 6  # optimizer steps of either stage; half of them end amid an epoch of each source
STEPS: dict[str, Any] = {"learning_rate": 1e-3, "adam_epsilon": 1e-2, "lr_scheduler_type": "constant"}


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def train(folder: Path, max_steps: int) -> None:
    """SFT on two files, 3 to 1, and RL on problems of two sources, 1 to 2; what stands in the folder goes on."""
    model, tokenizer = tiny()
    sources: list[dict[str, object]] = [
        {"path": f"{folder}/{n}.jsonl", "weight": weight} for n, weight in ((7, 3), (5, 1))
    ]
    data = SFTDataConfig(sources=sources, num_heldout=2)
    sft = SFTConfig(output_dir=f"{folder}/sft", max_steps=max_steps, global_batch_size=4, data=data, **STEPS)
    SFTTrainer(sft, model=model, tokenizer=tokenizer).train()
    rl = RLConfig(
        output_dir=f"{folder}/rl",
        max_steps=max_steps,
        rollout=RolloutConfig(prompts_per_step=3, num_generations=2, max_completion_length=8, dynamic_sampling=False),
        reward=RewardConfig(functions=[f"{__file__}:even_length"]),
        **STEPS,
    )
    problems = [Problem("?" * n, "0", {}, Origin("a", n, n % 2, 1.0 + n % 2)) for n in range(1, 10)]
    trainer = RLTrainer(rl, model=tiny()[0], tokenizer=tokenizer, problems=problems)
    trainer.train()
    trainer.distributed.close()


def launch(folder: Path, num_processes: int, max_steps: int) -> list[dict[str, float]]:
    """The lines of both runs once so many steps are done."""
    folder.mkdir(exist_ok=True)
    for num in (7, 5):
        rows = [{"prompt": f"{n}+{num}=", "completion": "x" * (n + num)} for n in range(num)]
        (folder / f"{num}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable]
    if num_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [__file__, str(folder), str(max_steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line for kind in ("sft", "rl") for line in (folder / kind / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "num_tokens", "reward", "completions/mean_length")
    return [{name: value for name, value in json.loads(line).items() if name in kept} for line in lines]


@pytest.mark.slow
def test_halves_are_the_whole_and_two_processes_are_one(tmp_path: Path) -> None:
    wholes = []
    for num_processes in (1, 2):
        whole = launch(tmp_path / f"whole{num_processes}", num_processes, WHOLE)
        launch(tmp_path / f"halves{num_processes}", num_processes, WHOLE // 2)
        assert launch(tmp_path / f"halves{num_processes}", num_processes, WHOLE) == whole
        assert len(whole) == 2 * WHOLE
        wholes.append(whole)
    for one, two in zip(*wholes, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
