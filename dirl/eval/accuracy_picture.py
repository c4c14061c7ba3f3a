"""Results of an evaluation -> pictures of accuracy against speed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dirl.errors import MissingFileError
from dirl.eval.results import ModeResult
from dirl.show.pictures import Pictures, Point, plot_points


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
    lines = {dataset: points_of(results, dataset) for dataset in dict.fromkeys(result.dataset for result in results)}
    plot_points(lines, path, title="Accuracy against speed", x_label=quantity, y_label="accuracy (%)")


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
