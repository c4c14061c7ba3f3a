"""plot_run plots what a run logged, leaves out what it did not, and shows the numbers it was given."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dirl.show.charts import PICTURES, Picture
from dirl.show.pictures import collect_series, plot_curves, plot_deciles, plot_layers, plot_run, smooth


def write_metrics(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def numbers(data: Any) -> list[float]:
    return [float(number) for number in data]


def rl_row(step: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward": math.tanh(step / 30),
        "completions/accuracy": step / 100,
        "completions/tokens_per_step": 1.5 + step / 100,
        "completions/mean_length": 12.0,
        "entropy": 1 / (step + 1),
        "grad_norm": None if step == 3 else 1.0,
        "timing_s/rollout": 2.0,
        "timing_s/train": 1.0,
        "timing_s/step": 3.1,
        "loss": 0.1,
    }


def sft_row(step: int) -> dict[str, Any]:
    row: dict[str, Any] = {"step": step, "loss": 1 / (step + 1), "learning_rate": 1e-3}
    if step % 10 == 0:
        row["eval/loss"] = 1.5 / (step + 1)
        row |= {f"eval/loss_noise_decile_{decile}": (decile + 1) / (step + 1) for decile in range(10)}
    return row


@pytest.mark.parametrize(
    ("make_row", "plotted"),
    [
        (rl_row, ["loss", "reward", "tokens_per_step", "completion_length", "entropy", "grad_norm", "phases"]),
        (sft_row, ["loss", "loss_by_noise", "learning_rate"]),
        (lambda step: {"step": step, "epoch": 0.5}, []),
    ],
)
def test_a_run_gets_the_pictures_it_has_numbers_for(make_row: Any, plotted: list[str], tmp_path: Path) -> None:
    write_metrics(tmp_path, [make_row(step) for step in range(40)])
    written = plot_run(tmp_path)
    assert written == [tmp_path / "plots" / f"{name}.png" for name in plotted]
    for path in written:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        rgb = plt.imread(path)[..., :3]
        assert (rgb.max(axis=-1) - rgb.min(axis=-1) > 0.2).sum() > 200  # curves: axes and letters have no colour
    assert sorted(tmp_path.glob("plots/*")) == sorted(written)


def test_a_single_step_is_plotted(tmp_path: Path) -> None:
    write_metrics(tmp_path, [rl_row(1)])
    assert len(plot_run(tmp_path)) == 7


def test_missing_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: no metrics to plot"):
        plot_run(tmp_path)


def picture(file_name: str) -> Picture:
    return next(picture for picture in PICTURES if picture.file_name == file_name)


def test_series_leave_out_null_and_match_whole_names() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None, "eval/loss": 3.0},
        {"step": 3, "loss": 4.0, "eval/loss_noise_decile_1": 5.0},
    ]
    assert collect_series(rows, picture("loss")) == {"loss": ([1, 3], [2.0, 4.0]), "eval/loss": ([2], [3.0])}


def test_smooth_keeps_straight_lines_and_averages_around_each_point() -> None:
    line = [2.0 * step + 1 for step in range(100)]
    assert smooth(line) == pytest.approx(line)  # a mean that lags would lie below
    spike = [0.0] * 50 + [11.0] + [0.0] * 49
    assert smooth(spike) == pytest.approx([0.0] * 45 + [1.0] * 11 + [0.0] * 44)
    assert smooth([]) == []


def test_curves_show_the_logged_points() -> None:
    axes = Figure().subplots()
    steps, values = list(range(30)), [float(step % 7) for step in range(30)]
    plot_curves(axes, {"short": ([1, 2], [3.0, 4.0]), "long": (steps, values)})
    short, raw, mean = axes.get_lines()
    assert numbers(short.get_ydata()) == [3.0, 4.0]
    assert numbers(raw.get_ydata()) == values
    assert numbers(mean.get_ydata()) == pytest.approx(smooth(values))
    assert axes.get_legend_handles_labels()[1] == ["short", "long"]


def test_phases_stack_to_the_time_of_the_step() -> None:
    axes = Figure().subplots()
    rows: list[dict[str, Any]] = [
        {"step": 1, "timing_s/rollout": 2.0, "timing_s/train": 0.5, "timing_s/step": 99.0},
        {"step": 2, "timing_s/rollout": 3.0, "timing_s/train": 0.5, "timing_s/step": 99.0, "timing_s/eval": 10.0},
    ]
    plot_layers(axes, collect_series(rows, picture("phases")))
    tops: dict[float, float] = {}
    for bar in axes.patches:
        assert isinstance(bar, Rectangle)
        center = bar.get_x() + bar.get_width() / 2
        tops[center] = max(tops.get(center, 0.0), bar.get_y() + bar.get_height())
    assert tops == {1.0: 2.5, 2.0: 13.5}
    assert axes.get_legend_handles_labels()[1] == ["rollout", "train", "eval"]
    (alone,) = collect_series([{"step": 1, "timing_s/step": 2.0}], picture("phases"))  # an SFT step is one phase
    assert alone == "timing_s/step"


def test_deciles_are_in_order_and_the_first_and_last_evaluation_are_named() -> None:
    axes = Figure().subplots()
    series = {f"eval/loss_noise_decile_{d}": ([0, 5, 9], [d + 0.0, d + 10.0, d + 20.0]) for d in (9, 0, 1)}
    plot_deciles(axes, series)
    lines = axes.get_lines()
    assert [numbers(line.get_xdata()) for line in lines] == [pytest.approx([0.05, 0.15, 0.95])] * 3
    assert [numbers(line.get_ydata()) for line in lines] == [[0, 1, 9], [10, 11, 19], [20, 21, 29]]
    assert axes.get_legend_handles_labels()[1] == ["step 0", "step 9"]
