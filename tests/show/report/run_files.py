"""Directories of runs, written without training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)><!-- \u2028 \U0001f600"


def rl_row(step: int) -> dict[str, Any]:
    """One line of metrics with a number for every panel of an RL run."""
    wave = math.sin(step / 7)
    row: dict[str, Any] = {"step": step, "loss": wave / 100, "reward": 0.6 + wave / 9, "reward_std": 0.3, "kl": 0.01}
    row |= {"rewards/accuracy/mean": 0.6 + wave / 9, "completions/mean_length": 22 + wave, "entropy": 0.05}
    row |= {"completions/tokens_per_step": 2.6, "completions/clipped_ratio": 0.0, "clip_ratio/region_mean": 0.001}
    row |= {"sampling/logp_difference/mean": 1e-7, "grad_norm": 0.1, "learning_rate": 1e-4, "timing_s/step": 2.5}
    row |= {"timing_s/rollout": 1.0, "timing_s/train": 1.4 + wave / 5, "timing_s/reward": 0.1}
    row |= {"perf/rollout_tokens_per_s": 9000.0, "perf/train_tokens_per_s": 8000.0}
    row |= {"groups/kept": 20, "groups/dropped_all_correct": 10, "groups/dropped_all_wrong": 2}
    row |= {f"groups/pass_rate/{name}": 4 for name in ("0", "up_to_25", "up_to_50", "up_to_75", "below_100", "100")}
    if step % 10 == 0:
        row |= {"eval/accuracy": 0.8 + wave / 20, "eval/standard_error": 0.02, "eval/tokens_per_step": 2.7}
    return row


def sft_row(step: int) -> dict[str, Any]:
    """One line of metrics of an SFT run."""
    row: dict[str, Any] = {"step": step, "loss": 3 / step, "grad_norm": 1.0, "timing_s/step": 0.2}
    if step % 5 == 0:
        row |= {"eval/loss": 3 / step, **{f"eval/loss_noise_decile_{d}": d / step for d in range(10)}}
    return row


def completion_row(group: int, reward: float, **changes: Any) -> dict[str, Any]:
    """A completion of 10 tokens in blocks of 4 after a prompt of 6: blocks of 2, 4 and 4 tokens."""
    row: dict[str, Any] = {
        "group": group,
        "question": f"question {group}",
        "answer": "7",
        "reward": reward,
        "rewards": {"accuracy": reward, "length": None},
        "prompt_ids": [1] * 6,
        "token_ids": list(range(10)),
        "token_texts": ["3", "+", "4", "=", "7", "\n", "<", "b", ">", "<|im_end|>"],
        "block_length": 4,
        "step_map": [1, 2, 1, 1, 3, 2, 1, 1, 1, 2],
        "logprobs": [math.log(0.5)] * 10,
        "completion_length": 9,
        "finish_reason": "stop",
        "num_denoising_steps": 7,
        "text": "3+4=7",
    }
    return row | changes


def write_run(
    folder: Path,
    rows: Iterable[Mapping[str, Any]],
    completions: Mapping[int, Iterable[Mapping[str, Any]]] | None = None,
    **config: Any,
) -> Path:
    """A run's directory with its metrics, record and completions (by step)."""
    (folder / "completions").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"date": "2026-01-02", "argv": ["dirl", "rl"], "versions": {"torch": "2"}, "config": config}
    (folder / "run.json").write_text(json.dumps(record))
    for step, lines in (completions or {}).items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "completions" / f"step_{step:06d}.jsonl").write_text(text)
    return folder
