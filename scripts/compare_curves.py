"""Evaluation curves of several RL runs -> one picture: accuracy and tokens per step, against steps and seconds.

    python scripts/compare_curves.py reveal=outputs/a reveal=outputs/b trajectory=outputs/c --output curves.png

Runs of one label (seeds) share a colour; the thick line is their mean at the steps that all of them have. Prints the
last evaluation of each run as a Markdown table.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from dirl.show.metric_table import read_metrics
from dirl.show.pictures import STYLE

Curve = list[tuple[int, float, float, float]]  # step, seconds of training so far, accuracy, tokens per step


def read_curve(run: Path) -> Curve:
    """The evaluations of a run; the time they took themselves is not counted."""
    curve, seconds = [], 0.0
    for row in read_metrics(run / "metrics.jsonl"):
        seconds += row["timing_s/step"]
        if "eval/accuracy" in row:
            curve.append((row["step"], seconds, row["eval/accuracy"], row["eval/tokens_per_step"]))
    if not curve:
        raise SystemExit(f"{run}: no evaluations in metrics.jsonl; set eval_steps and eval.path")
    return curve


def mean_curve(curves: list[Curve]) -> Curve:
    """Means over runs at the steps that all of them have."""
    rows = zip(*curves, strict=False)  # a run that ended early ends the mean
    return [
        (row[0][0], *(sum(point[i] for point in row) / len(row) for i in (1, 2, 3)))  # type: ignore[misc]
        for row in rows
        if len({point[0] for point in row}) == 1
    ]


def plot(curves: dict[str, list[Curve]], output: Path) -> None:
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, (value, title) in enumerate(((2, "accuracy (sampled)"), (3, "tokens per step"))):
        for column, (clock, name) in enumerate(((0, "optimizer step"), (1, "seconds of training"))):
            panel = axes[row][column]
            for colour, (label, runs) in enumerate(curves.items()):
                for run in runs:
                    panel.plot([p[clock] for p in run], [p[value] for p in run], color=f"C{colour}", alpha=0.3)
                mean = mean_curve(runs)
                panel.plot(
                    [p[clock] for p in mean], [p[value] for p in mean], color=f"C{colour}", linewidth=2.5, label=label
                )
            panel.set_title(title)
            panel.set_xlabel(name)
    axes[0][0].legend()
    figure.savefig(output, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="label=RUN_DIR")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    curves: dict[str, list[Curve]] = defaultdict(list)
    print("| | run | step | seconds of training | accuracy | tokens per step |\n| --- | --- | --- | --- | --- | --- |")
    for argument in options.runs:
        label, separator, run = argument.partition("=")
        if not separator:
            parser.error(f"{argument!r} is not label=RUN_DIR")
        curve = read_curve(Path(run))
        curves[label].append(curve)
        step, seconds, accuracy, speed = curve[-1]
        cells = [label, f"{Path(run).parent.name}/{Path(run).name}", str(step), f"{seconds:.0f}", f"{accuracy:.3f}"]
        print(f"| {' | '.join([*cells, f'{speed:.2f}'])} |")
    with matplotlib.rc_context(STYLE):
        plot(curves, options.output)


if __name__ == "__main__":
    main()
