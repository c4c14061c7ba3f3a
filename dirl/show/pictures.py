"""metrics.jsonl of a run -> one picture per question a reader has about it, in plots/*.png.

A panel whose numbers the run did not log is skipped, so SFT and RL share one table of panels.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dirl.errors import MissingFileError
from dirl.show.metric_table import read_metrics

Series = dict[str, tuple[list[int], list[float]]]  # metric name -> steps, values

STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "font.size": 10,
}
SMOOTHED_FROM = 20  # points; below, the raw curve is readable


class Drawing(Figure):
    """A figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


class Pictures(list[Path]):
    """Picture files that a notebook shows."""

    def _repr_html_(self) -> str:
        encoded = [base64.b64encode(path.read_bytes()).decode() for path in self]
        return "".join(f'<img style="max-width:100%" src="data:image/png;base64,{data}">' for data in encoded)


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over a tenth of the curve around each point: centred, so it does not lag behind; narrower at the ends."""
    reach = max(1, len(values) // 20)
    windows = []
    for index in range(len(values)):
        within = min(reach, index, len(values) - 1 - index)
        windows.append(values[index - within : index + within + 1])
    return [sum(window) / len(window) for window in windows]


def draw_curves(axes: Axes, series: Series) -> None:
    """One line per metric; long ones are drawn faintly with their running mean on top."""
    for name, (steps, values) in series.items():
        is_long = len(values) >= SMOOTHED_FROM
        marker = None if is_long else "o"
        (line,) = axes.plot(steps, values, alpha=0.25 if is_long else 1.0, marker=marker, markersize=3, label=name)
        if is_long:
            line.set_label("_raw")
            axes.plot(steps, smooth(values), color=line.get_color(), linewidth=2, label=name)


def draw_phases(axes: Axes, series: Series) -> None:
    """Seconds per phase, stacked; a phase that a step did not log took no time there."""
    phases = {name: dict(zip(*points, strict=True)) for name, points in series.items() if name != "timing_s/step"}
    steps = sorted({step for points in phases.values() for step in points})
    heights = [[points.get(step, 0.0) for step in steps] for points in phases.values()]
    labels = [name.removeprefix("timing_s/") for name in phases]
    width = min((later - step for step, later in pairwise(steps)), default=1)
    bottoms = [0.0] * len(steps)
    for label, height in zip(labels, heights, strict=True):
        axes.bar(steps, height, bottom=bottoms, width=width, label=label)
        bottoms = [bottom + part for bottom, part in zip(bottoms, height, strict=True)]


def draw_deciles(axes: Axes, series: Series) -> None:
    """Held-out loss against noise level, one line per evaluation from the first (light) to the last (dark)."""
    deciles = {int(name.rpartition("_")[2]): dict(zip(*points, strict=True)) for name, points in series.items()}
    steps = sorted({step for points in deciles.values() for step in points})
    colors = matplotlib.colormaps["viridis_r"]
    for order, step in enumerate(steps):
        known = sorted(decile for decile, points in deciles.items() if step in points)
        color = colors((order + 1) / len(steps))
        label = f"step {step}" if order in (0, len(steps) - 1) else "_between"
        levels = [(decile + 0.5) / 10 for decile in known]
        axes.plot(levels, [deciles[decile][step] for decile in known], marker="o", color=color, label=label)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture: which metrics it shows and how."""

    file_name: str
    title: str
    pattern: str  # regular expression a metric's whole name must match
    y_label: str
    x_label: str = "optimizer step"
    draw: Callable[[Axes, Series], None] = draw_curves


PANELS = (
    Panel(file_name="loss", title="Loss", pattern=r"loss|eval/loss", y_label="nats per token"),
    Panel(
        file_name="loss_by_noise",
        title="Held-out loss by noise level",
        pattern=r"eval/loss_noise_decile_\d+",
        y_label="nats per token",
        x_label="masked share of a block",
        draw=draw_deciles,
    ),
    Panel(
        file_name="reward", title="Reward and accuracy", pattern=r"reward|(completions|eval)/accuracy", y_label="mean"
    ),
    Panel(
        file_name="tokens_per_step",
        title="Decoding speed",
        pattern=r"(completions|eval)/tokens_per_step",
        y_label="tokens per denoising step",
    ),
    Panel(
        file_name="completion_length",
        title="Completion length",
        pattern=r"completions/(mean|max)_length",
        y_label="tokens",
    ),
    Panel(file_name="entropy", title="Entropy of the policy", pattern=r"entropy", y_label="nats per token"),
    Panel(file_name="kl", title="Distance from the reference policy", pattern=r"kl", y_label="nats per token"),
    Panel(file_name="grad_norm", title="Gradient norm", pattern=r"grad_norm", y_label="L2 norm"),
    Panel(file_name="learning_rate", title="Learning rate", pattern=r"learning_rate", y_label="learning rate"),
    Panel(
        file_name="phases",
        title="Time per step",
        pattern=r"timing_s/\w+",
        y_label="seconds",
        draw=draw_phases,
    ),
)


def collect_series(rows: Sequence[dict[str, Any]], pattern: str) -> Series:
    """The curves of the metrics whose name matches; numbers that were not finite (null) are left out."""
    series: Series = {}
    for row in rows:
        for name, value in row.items():
            if value is not None and re.fullmatch(pattern, name):
                steps, values = series.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def draw_panel(panel: Panel, series: Series, path: Path) -> None:
    """Write one picture."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        panel.draw(axes, series)
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.savefig(path)


def plot_run(run_dir: str | Path) -> Pictures:
    """Draw every panel the run has numbers for; returns the files written, in the order of the panels."""
    source = Path(run_dir) / "metrics.jsonl"
    if not source.is_file():
        raise MissingFileError(f"{source}: no metrics to plot; give the output_dir of a training run")
    rows = read_metrics(source)
    folder = Path(run_dir) / "plots"
    folder.mkdir(exist_ok=True)
    written = Pictures()
    for panel in PANELS:
        if series := collect_series(rows, panel.pattern):
            written.append(folder / f"{panel.file_name}.png")
            draw_panel(panel, series, written[-1])
    return written
