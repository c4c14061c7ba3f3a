"""metrics.jsonl -> the panels of the report, thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dirl.show.charts import Panel, short_names
from dirl.show.metric import MetricTable
from dirl.show.metric_table import TABLE

MAX_POINTS = 400  # of a curve; more are means of neighbours, so that a report of any length stays small


def panel_charts(rows: Sequence[Mapping[str, Any]], table: MetricTable = TABLE) -> list[dict[str, Any]]:
    """Every panel the rows have numbers for, as the page's script wants it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    all_series = ((panel, _series(panel, rows, names, table)) for panel in table.panels)
    return [_chart(panel, series) for panel, series in all_series if series]


def _series(
    panel: Panel, rows: Sequence[Mapping[str, Any]], names: Sequence[str], table: MetricTable
) -> list[dict[str, Any]]:
    """Its curves or layers; none where nothing it shows was logged."""
    shown = table.plotted(names, lambda metric: metric.panel == panel.title)
    if panel.kind in ("stacked", "shares"):
        series = _layers([name for name, _ in shown], rows)
    elif panel.kind == "levels":
        series = _levels([name for name, _ in shown], rows)
    else:
        series = [_line(name, metric.error, rows) for name, metric in shown]
    series = [one for one in series if one["x"]]
    if panel.kind == "shares":
        _to_shares(series)
    return series


def _chart(panel: Panel, series: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page's script knows are lines, plain ones and layers."""
    kind = {"levels": "lines", "shares": "stacked"}.get(panel.kind, panel.kind)
    if kind == "stacked":
        for one, label in zip(series, short_names([one["name"] for one in series]), strict=True):
            one["name"] = label
    x_label = "level" if panel.kind == "levels" else "step"
    return {"title": panel.title, "unit": panel.unit, "kind": kind, "x_label": x_label, "series": series}


def _line(name: str, error: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One metric over steps; numbers that were not finite (null) are left out."""
    known = [row for row in rows if row.get(name) is not None]
    line = {
        "name": name,
        "x": thin([row["step"] for row in known], whole=True),
        "y": thin([row[name] for row in known]),
    }
    if error and known and all(row.get(error) is not None for row in known):
        line["e"] = thin([row[error] for row in known])
    return line


def _layers(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers over the same steps; what a step did not log took nothing there."""
    names = list(names)
    known = [row for row in rows if any(row.get(name) is not None for name in names)]
    steps = thin([row["step"] for row in known], whole=True)
    return [{"name": name, "x": steps, "y": thin([row.get(name) or 0.0 for row in known])} for name in names]


def _levels(names: Iterable[str], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first, a middle and the last evaluation, each as a curve over noise levels."""
    deciles = sorted((int(name.rpartition("_")[2]), name) for name in names)
    known = [row for row in rows if any(row.get(name) is not None for _, name in deciles)]
    chosen = dict.fromkeys(round(i * (len(known) - 1) / 3) for i in range(4)) if known else {}
    curves = []
    for row in (known[i] for i in chosen):
        points = [((decile + 0.5) / 10, row[name]) for decile, name in deciles if row.get(name) is not None]
        curves.append(
            {"name": f"step {row['step']}", "x": [x for x, _ in points], "y": [_short(float(y)) for _, y in points]}
        )
    return curves


def _to_shares(series: Sequence[dict[str, Any]]) -> None:
    totals = [sum(column) or 1.0 for column in zip(*(one["y"] for one in series), strict=True)]
    for one in series:
        one["y"] = [_short(value / total) for value, total in zip(one["y"], totals, strict=True)]


def thin(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """At most MAX_POINTS values, each the mean of its neighbours; the last value of a run of steps where `whole`."""
    count = len(values)
    if count <= MAX_POINTS:
        return [value if whole else _short(float(value)) for value in values]
    bounds = [count * i // MAX_POINTS for i in range(MAX_POINTS + 1)]
    bunches = [values[start:end] for start, end in pairwise(bounds)]
    return [bunch[-1] if whole else _short(sum(bunch) / len(bunch)) for bunch in bunches]


def _short(value: float) -> float:
    """Five digits: more are not seen, and weigh."""
    return float(f"{value:.5g}")
