"""metrics.jsonl of a run -> one picture per question a reader has about it, in plots/*.png.

A picture whose numbers the run did not log is skipped, so SFT and RL share one list of them.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dirl.errors import MissingFileError
from dirl.files import write_whole
from dirl.show.charts import Picture, short_names
from dirl.show.metric import MetricTable
from dirl.show.metric_table import TABLE, read_metrics

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


class ShownFigure(Figure):
    """A figure that a notebook shows by itself, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()

    def write(self, path: str | Path) -> Path:
        """The picture as PNG under this name, whole; missing folders are made."""
        return write_whole(path, self._repr_png_())


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


def plot_curves(axes: Axes, series: Series) -> None:
    """One line per metric; long ones are faint, with their running mean on top."""
    for name, (steps, values) in series.items():
        is_long = len(values) >= SMOOTHED_FROM
        marker = None if is_long else "o"
        (line,) = axes.plot(steps, values, alpha=0.25 if is_long else 1.0, marker=marker, markersize=3, label=name)
        if is_long:
            line.set_label("_raw")
            axes.plot(steps, smooth(values), color=line.get_color(), linewidth=2, label=name)


def plot_layers(axes: Axes, series: Series) -> None:
    """Layers on top of each other, such as the seconds of phases; one that a step did not log is nothing there."""
    layers = [dict(zip(*points, strict=True)) for points in series.values()]
    steps = sorted({step for points in layers for step in points})
    width = min((later - step for step, later in pairwise(steps)), default=1)
    bottoms = [0.0] * len(steps)
    for label, points in zip(short_names(list(series)), layers, strict=True):
        height = [points.get(step, 0.0) for step in steps]
        axes.bar(steps, height, bottom=bottoms, width=width, label=label)
        bottoms = [bottom + top for bottom, top in zip(bottoms, height, strict=True)]


def plot_deciles(axes: Axes, series: Series) -> None:
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


_PLOT: dict[str, Callable[[Axes, Series], None]] = {
    "lines": plot_curves,
    "stacked": plot_layers,
    "levels": plot_deciles,
}


def collect_series(rows: Sequence[dict[str, Any]], picture: Picture, table: MetricTable = TABLE) -> Series:
    """The curves of a picture; numbers that were not finite (null) are left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    series: Series = {}
    for name, _ in table.plotted(names, lambda metric: metric.picture == picture.file_name):
        if known := [row for row in rows if row.get(name) is not None]:
            series[name] = [row["step"] for row in known], [row[name] for row in known]
    return series


def plot_picture(picture: Picture, series: Series, path: Path) -> None:
    """Write one picture."""
    with matplotlib.rc_context(STYLE):
        figure = ShownFigure(figsize=(8, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        _PLOT[picture.kind](axes, series)
        axes.set(title=picture.title, xlabel=picture.x_label, ylabel=picture.y_label)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.write(path)


def plot_run(run_dir: str | Path, table: MetricTable = TABLE) -> Pictures:
    """Plot every picture the run has numbers for; returns the files written, in the order of the pictures."""
    source = Path(run_dir) / "metrics.jsonl"
    if not source.is_file():
        raise MissingFileError(f"{source}: no metrics to plot; give the output_dir of a training run")
    rows = read_metrics(source)
    written = Pictures()
    for picture in table.pictures:
        if series := collect_series(rows, picture, table):
            written.append(Path(run_dir) / "plots" / f"{picture.file_name}.png")
            plot_picture(picture, series, written[-1])
    return written


Point = tuple[float, float, float, str]  # x, y, the standard error of y, label


def plot_points(lines: Mapping[str, Sequence[Point]], path: Path, *, title: str, x_label: str, y_label: str) -> None:
    """Write a picture with a line a name, through labelled points with error bars; a name without points has none."""
    with matplotlib.rc_context(STYLE):
        figure = ShownFigure(figsize=(8, 4), dpi=120, layout="constrained")
        axes = figure.subplots()
        for name, points in lines.items():
            if not points:
                continue
            xs, ys, errors, labels = zip(*points, strict=True)
            axes.errorbar(xs, ys, yerr=errors, marker="o", capsize=3, label=name)
            for i, (label, x, y) in enumerate(zip(labels, xs, ys, strict=True)):
                offset = (5, 4 if i % 2 else -12)  # by turns above and below: neighbours may be close
                axes.annotate(label, (x, y), textcoords="offset points", xytext=offset, fontsize=8)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
        figure.write(path)
