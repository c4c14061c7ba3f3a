"""Several runs in groups -> one page: a line and a band a group in every chart, final values, costs, differences.

A line is the mean over a group's runs, where a run without a point of its own counts with what lies between its
neighbours; the band goes from the lowest run to the highest.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from dirl.errors import UserError
from dirl.files import write_whole
from dirl.show.cost import Cost, brief, clock, cost_of
from dirl.show.metric import MetricTable
from dirl.show.metric_table import TABLE
from dirl.show.report.curves import panel_charts, thin
from dirl.show.report.page import build_page
from dirl.show.report.write import differing, flat

Row = Mapping[str, Any]
Curve = tuple[list[float], list[float]]  # x, in order, and y


@dataclass(frozen=True)
class Run:
    """What a run, or an evaluation, brings to its group."""

    name: str
    record: Row  # run.json
    rows: Sequence[Row]  # metrics.jsonl; none of an evaluation
    values: Mapping[str, float]  # what it ended with, by metric


@dataclass(frozen=True)
class Table:
    """A table of the page; the first row is its head."""

    title: str
    note: str
    rows: list[list[str]]


def group_runs(runs: Sequence[Run], keys: str) -> dict[str, list[Run]]:
    """The runs by their values of a key of their configurations, or of several with commas, in order of appearance.

    A section that is a preset has its name; another section what the runs differ in there.

    Raises:
        UserError: no run has such a key.
    """
    configs = [flat(run.record.get("config", {})) for run in runs]
    columns = [_labels(key, configs) for key in keys.split(",")]
    groups: dict[str, list[Run]] = {}
    for run, labels in zip(runs, zip(*columns, strict=True), strict=True):
        groups.setdefault(", ".join(labels), []).append(run)
    return groups


def _labels(key: str, configs: Sequence[Mapping[str, str]]) -> list[str]:
    """What each run has under a key."""
    inner = [{name: value for name, value in config.items() if name.startswith(f"{key}.")} for config in configs]
    if not any(key in config or section for config, section in zip(configs, inner, strict=True)):
        known = sorted({name.partition(".")[0] for config in configs for name in config})
        raise UserError(f"--group-by {key}: no run has such a key; keys: {', '.join(known)}, and dotted ones")
    presets = [section.get(f"{key}.preset") for section in inner]
    said = ["preset"] if all(presets) else [name[len(key) + 1 :] for name, *_ in differing(inner)]
    return [
        (config[key] or "(empty)") if key in config else _label(key, section, said)
        for config, section in zip(configs, inner, strict=True)
    ]


def _label(key: str, section: Mapping[str, str], said: Sequence[str]) -> str:
    """What a run has in a section, as far as the runs differ there."""
    if said == ["preset"]:
        return section[f"{key}.preset"]
    return ", ".join(f"{name}={section.get(f'{key}.{name}', '')}" for name in said) if section else "(not set)"


def write_group_report(
    groups: Mapping[str, Sequence[Run]],
    path: str | Path,
    key: str,
    differences: Table | None,
    table: MetricTable = TABLE,
) -> Path:
    """Write the page of groups; returns its path.

    Args:
        key: that they are grouped by.
        differences: between groups, where there is more than one.
    """
    runs = [run for members in groups.values() for run in members]
    tables = [_final_values(groups, table), *([differences] if differences else []), _costs(groups), _settings(groups)]
    members = "; ".join(f"{label}: {', '.join(run.name for run in own)}" for label, own in groups.items())
    title = f"{len(runs)} runs by {key.replace(',', ', ')}"
    data = {
        "title": title,
        "subtitle": members,
        "note": "Lines: mean over a group's runs; bands: from the lowest run to the highest.",
        "charts": group_charts({label: [run.rows for run in own] for label, own in groups.items()}, table),
        "tables": [vars(one) for one in tables if len(one.rows) > 1],
    }
    return write_whole(path, build_page(title, data))


def group_charts(groups: Mapping[str, Sequence[Sequence[Row]]], table: MetricTable = TABLE) -> list[dict[str, Any]]:
    """Every series of every panel as a chart with a line a group, in the order of the panels."""
    found: dict[tuple[str, str], dict[str, list[Curve]]] = {}
    panels: dict[str, dict[str, Any]] = {}
    for label, runs in groups.items():
        for panel in (panel for rows in runs for panel in panel_charts(rows, table)):
            panels.setdefault(panel["title"], panel)
            for name, one in _named_series(panel):
                found.setdefault((panel["title"], name), {}).setdefault(label, []).append((one["x"], one["y"]))
    order = [panel.title for panel in table.panels]
    charts = []
    for title, name in sorted(found, key=lambda chart: order.index(chart[0])):  # stable: series keep their order
        is_alone = sum(other == title for other, _ in found) == 1
        series = [
            {"name": label, "color": index, **_mean_and_band(found[title, name][label])}
            for index, label in enumerate(groups)
            if label in found[title, name]
        ]
        panel = panels[title]
        kind = "plain" if panel["kind"] == "plain" else "lines"
        chart = {
            "title": title if is_alone else f"{title}: {name}",
            "unit": panel["unit"].removesuffix(", ± standard error"),
            "kind": kind,
        }
        charts.append({**chart, "x_label": panel["x_label"], "series": series})
    return charts


def final_values(rows: Sequence[Row], table: MetricTable = TABLE) -> dict[str, float]:
    """The newest number of each metric that a run is judged by; RL's loss, a surrogate, is none."""
    is_rl = any("reward" in row for row in rows)
    names = [metric.name for metric in table.headlines() if not (is_rl and metric.name == "loss")]
    newest = {name: next((row[name] for row in reversed(rows) if row.get(name) is not None), None) for name in names}
    return {name: value for name, value in newest.items() if value is not None}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and its standard error over runs; NaN of a single one."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def metric_names(groups: Mapping[str, Sequence[Run]], table: MetricTable = TABLE) -> list[str]:
    """What the runs ended with, the errors of others left out."""
    errors = {row.error for row in table.rows}
    names = dict.fromkeys(name for own in groups.values() for run in own for name in run.values)
    return [name for name in names if name not in errors]


def _named_series(panel: Row) -> Iterator[tuple[str, Row]]:
    """Series by names that mean the same in every run: of evaluations at noise levels the last."""
    series = panel["series"]
    if panel["x_label"] == "level":
        yield "last evaluation", series[-1]
        return
    yield from ((one["name"], one) for one in series)


def _mean_and_band(curves: Sequence[Curve]) -> dict[str, list[float]]:
    """At every x of any run, over the runs that reach so far."""
    xs = sorted({x for curve_x, _ in curves for x in curve_x})
    columns = [[y for curve in curves if (y := _at(curve, x)) is not None] for x in xs]
    band = {"x": thin(xs, whole=True), "y": thin([fmean(column) for column in columns])}
    if len(curves) > 1:
        band |= {"low": thin([min(column) for column in columns]), "high": thin([max(column) for column in columns])}
    return band


def _at(curve: Curve, x: float) -> float | None:
    """The curve's value, on the straight line between its points; None outside."""
    xs, ys = curve
    after = bisect_left(xs, x)
    if after == len(xs) or (after == 0 and xs[0] != x):
        return None
    if xs[after] == x:
        return ys[after]
    share = (x - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


def _final_values(groups: Mapping[str, Sequence[Run]], table: MetricTable) -> Table:
    rows = [["metric", *groups]]
    for name in metric_names(groups, table):
        rows.append(
            [name, *(_cell([run.values[name] for run in own if name in run.values]) for own in groups.values())]
        )
    note = "Mean of what the runs ended with, ± its standard error over runs (none of a single one)."
    return Table("Final values", note, rows)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    spread = "" if math.isnan(error) else f" ± {error:.2g}"
    return f"{mean:.4g}{spread} ({len(values)} {'run' if len(values) == 1 else 'runs'})"


def _costs(groups: Mapping[str, Sequence[Run]]) -> Table:
    rows = [["group", "time", "cost", "tokens trained", "rolled out", "trained per second and device", "MFU"]]
    for label, own in groups.items():
        costs = [cost_of(run.rows, run.record) for run in own if run.rows]
        if costs:
            rows.append([label, *_cost_cells(costs)])
    return Table("Cost", "Sums over a group's runs; rates and use of the GPUs are means.", rows)


def _cost_cells(costs: Sequence[Cost]) -> Iterator[str]:
    yield clock(sum(cost.total_seconds for cost in costs))
    by_device: dict[str, float] = {}
    for cost in costs:
        hours = cost.total_seconds / 3600 * cost.devices
        by_device[cost.device] = by_device.get(cost.device, 0.0) + hours
    yield ", ".join(f"{hours:.3g} {device}-h" for device, hours in by_device.items())
    yield brief(sum(cost.trained for cost in costs))
    yield brief(sum(cost.rolled_out for cost in costs))
    yield brief(fmean(cost.train_rate() for cost in costs))
    used = [cost.mfu for cost in costs if cost.mfu is not None]
    yield f"{100 * fmean(used):.1f} %" if used else "-"


def _settings(groups: Mapping[str, Sequence[Run]]) -> Table:
    """What differs between runs, and the values each group has."""
    configs = [flat(run.record.get("config", {})) for own in groups.values() for run in own]
    rows = [["key", *groups]]
    for key, *values in differing(configs):
        if key == "output_dir":
            continue
        left = iter(values)
        rows.append([key, *(", ".join(dict.fromkeys(next(left) for _ in own)) for own in groups.values())])
    return Table("What the configurations differ in", "", rows)
