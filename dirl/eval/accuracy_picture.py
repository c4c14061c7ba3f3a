"""Results of an evaluation -> pictures of accuracy against speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

from dirl.errors import MissingFileError
from dirl.eval.results import ModeResult
from dirl.show.pictures import STYLE, Drawing, Pictures

Point = tuple[float, float, float, str]  # speed, accuracy in %, its standard error, label


def plot_thresholds(eval_dir: str | Path) -> Pictures:
    """Accuracy against tokens per step, one point a threshold; written to plots/thresholds.png.

    Raises:
        MissingFileError: the directory holds no finished evaluation.
    """
    source = Path(eval_dir) / "results.json"
    if not source.is_file():
        raise MissingFileError(f"{source}: no results to plot; give the output_dir of a finished evaluation")
    results = [ModeResult(**row) for row in json.loads(source.read_text(encoding="utf-8"))["results"]]
    path = Path(eval_dir) / "plots" / "thresholds.png"
    plot_accuracy(results, path, sweep_points, "tokens per denoising step")
    return Pictures([path])


def plot_accuracy(
    results: Sequence[ModeResult],
    path: Path,
    points_of: Callable[[Sequence[ModeResult], str], list[Point]],
    quantity: str,
) -> None:
    """Accuracy against a speed: one line a data set, one labelled point a decoding mode."""
    with matplotlib.rc_context(STYLE):
        figure = Drawing(figsize=(8, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        for dataset in dict.fromkeys(result.dataset for result in results):
            points = points_of(results, dataset)
            if not points:
                continue
            speeds, accuracies, errors, labels = zip(*points, strict=True)
            axes.errorbar(speeds, accuracies, yerr=errors, marker="o", capsize=3, label=dataset)
            for i, (label, x, y) in enumerate(zip(labels, speeds, accuracies, strict=True)):
                offset = (5, 4 if i % 2 else -12)  # by turns above and below: neighbours may be close
                axes.annotate(label, (x, y), textcoords="offset points", xytext=offset, fontsize=8)
        axes.set(title="Accuracy against speed", xlabel=quantity, ylabel="accuracy (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.write(path)


def sweep_points(results: Sequence[ModeResult], dataset: str) -> list[Point]:
    """Tokens per step of each threshold and of static, slowest first. Source: DiRL (arXiv 2512.22234), Fig. 8."""
    return sorted(
        _point(
            result,
            result.tokens_per_step,
            "static" if result.mode == "static" else f"{result.confidence_threshold:g}",
        )
        for result in results
        if result.dataset == dataset and result.mode.split("@")[0] in ("static", "dynamic")
    )


def throughput_points(results: Sequence[ModeResult], dataset: str) -> list[Point]:
    """Tokens per second of each mode, slowest first. Source: DiRL (arXiv 2512.22234), Fig. 1."""
    return sorted(
        _point(result, result.tokens_per_s, result.mode)
        for result in results
        if result.dataset == dataset and result.tokens_per_s > 0
    )


def _point(result: ModeResult, speed: float, label: str) -> Point:
    return speed, 100 * result.avg_at_k, 100 * result.standard_error, label
