"""JSON lines of benchmarks -> Markdown tables.

python scripts/bench_table.py docs/benchmarks/cpu.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]

# benchmark -> (columns that describe the work, columns that were measured)
COLUMNS: dict[str, tuple[list[str], list[str]]] = {
    "train_step": (
        ["model", "liger", "config", "prompt", "completion", "group", "layout", "attention", "padding"],
        [
            "tokens",
            "computed_tiles",
            "seconds_min",
            "ratio",
            "peak_memory_gb",
            "tflops",
            "matmul_tflops",
            "mfu",
            "largest_difference",
        ],
    ),
    "sft_step": (
        ["model", "liger", "documents", "mean_length", "row_length", "layout", "attention", "padding"],
        ["tokens", "seconds_min", "ratio", "peak_memory_gb", "tflops", "mfu"],
    ),
    "rollout": (
        [
            "model",
            "liger",
            "compiled",
            "stop",
            "batch_size",
            "prompt_length",
            "completion_length",
            "unmasking_strategy",
            "tokens_per_step",
        ],
        [
            "engine_tokens_per_s",
            "plain_tokens_per_s",
            "speedup",
            "speedup_median",
            "peak_memory_gb",
            "compared",
            "equal",
        ],
    ),
    "approximate_cache": (
        [
            "model",
            "task",
            "batch_size",
            "prompt_length",
            "completion_length",
            "generation_window",
            "unmasking_strategy",
            "tokens_per_step",
            "approximate_cache",
        ],
        ["seconds_min", "speedup", "logp_difference_mean", "logp_difference_max", "greedy_equal"],
    ),
    "rollouts_ahead": (
        ["mode", "arm", "seed", "steps"],
        [
            "accuracy",
            "accuracy_of_last_three",
            "seconds_to_0.95",
            "seconds_per_step",
            "engine_seconds",
            "trainer_seconds",
            "over_longer_phase",
            "staleness_mean",
        ],
    ),
    "lmdeploy_rl_step": (
        ["model", "step"],
        [
            "timing_s/rollout",
            "timing_s/train",
            "timing_s/update_weights",
            "sampling/logp_difference/mean",
            "sampling/logp_difference/max",
            "peak_memory_gb",
        ],
    ),
    "push": (["model", "dtype", "gigabytes", "weight_transfer"], ["seconds_min", "ratio", "peak_memory_gb"]),
}
PLACE = ["hardware", "cores", "threads", "torch", "transformers", "commit", "date"]


def table(lines: Sequence[Line], columns: Sequence[str]) -> str:
    """Rows in the order of the lines; a column no line has is left out."""
    names = [name for name in columns if any(name in line for line in lines)]
    rows = [names, ["---"] * len(names), *[[cell(line.get(name)) for name in names] for line in lines]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def places(lines: Sequence[Line]) -> str:
    """Where the lines were measured, each place once."""
    found = dict.fromkeys(", ".join(f"{name} {line.get(name)}" for name in PLACE if name in line) for line in lines)
    return "\n".join(f"Measured on: {place}." for place in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    files: list[Path] = parser.parse_args().files
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines() if line]
    for benchmark in dict.fromkeys(line["benchmark"] for line in lines):
        chosen = [line for line in lines if line["benchmark"] == benchmark]
        others = sorted(set().union(*chosen) - {"benchmark", "python", *PLACE})
        described, measured = COLUMNS.get(benchmark, ([], others))
        print(f"### {benchmark}\n\n{table(chosen, [*described, *measured])}\n\n{places(chosen)}\n")


if __name__ == "__main__":
    main()
