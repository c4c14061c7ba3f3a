"""results.json of several evaluations -> one table of accuracy and tokens per step.

    python scripts/compare_runs.py "after SFT=outputs/tiny/eval_sft/results.json" "after RL=..." --plots outputs/tiny/rl

A path without `label=` is labelled by its directory. `--plots` plots each run directory's metrics and prints where.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = list[str]


def split_label(argument: str) -> tuple[str, Path]:
    """`label=path` or `path` -> label, path."""
    label, _, path = argument.rpartition("=")
    return label or Path(path).parent.name, Path(path)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The evaluations of one results.json; a missing or foreign file is a one-line error."""
    try:
        results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the results.json of an evaluation ({type(error).__name__}: {error})") from error
    return results


def table_rows(label: str, results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per data set and sampled mode; the greedy accuracy of the same data set stands beside it."""
    greedy = {result["dataset"]: result for result in results if result["mode"] == "greedy"}
    sampled = [result for result in results if result["mode"] != "greedy"]
    alone = [result for name, result in greedy.items() if name not in {other["dataset"] for other in sampled}]
    rows = []
    for result in [*sampled, *alone]:
        is_sampled = result["mode"] != "greedy"
        accuracy = f"{result['avg_at_k']:.3f} (avg@{result['num_samples']})" if is_sampled else "-"
        beside = greedy.get(result["dataset"])
        greedy_accuracy = f"{beside['avg_at_k']:.3f}" if beside else "-"
        rows.append(
            [label, result["dataset"], result["mode"], accuracy, greedy_accuracy, f"{result['tokens_per_step']:.2f}"]
        )
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """Columns as wide as their widest cell."""
    header = ["run", "data set", "mode", "accuracy (sampled)", "accuracy (greedy)", "tokens per step"]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 2 when a file cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="[label=]results.json")
    parser.add_argument("--plots", nargs="*", default=[], metavar="run_dir", type=Path)
    options = parser.parse_args(arguments)
    try:
        pairs = [split_label(argument) for argument in options.results]
        rows = [row for label, path in pairs for row in table_rows(label, read_results(path))]
    except (ValueError, KeyError) as error:
        print(error, file=sys.stderr)
        return 2
    print(format_table(rows))
    if options.plots:
        from dirl.show.pictures import plot_run

        for run_dir in options.plots:
            written = plot_run(run_dir)
            print(f"plots: {run_dir / 'plots'} ({len(written)} files)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
