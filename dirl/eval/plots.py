"""An evaluation's directory -> the picture of its threshold sweep, for notebooks."""

from __future__ import annotations

import json
from pathlib import Path

from dirl.errors import MissingFileError
from dirl.eval.report import plot_accuracy, sweep_points
from dirl.eval.results import ModeResult
from dirl.show.pictures import Pictures


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
