"""Runs in groups: what a group is, its line and band, its final values and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dirl.show.charts import PANELS, Panel
from dirl.show.metric import Metric, MetricTable
from dirl.show.metric_table import TABLE
from dirl.show.report.curves import MAX_POINTS
from dirl.show.report.groups import Run, final_values, group_charts, group_runs, mean_and_error, write_group_report
from tests.show.report.run_files import HOSTILE, rl_row, sft_row
from tests.show.report.test_write import data_of


def charts_of(groups: dict[str, list[list[dict[str, Any]]]], table: MetricTable = TABLE) -> dict[str, dict[str, Any]]:
    return {chart["title"]: chart for chart in group_charts(groups, table)}


def losses(*values: float, every: int = 1) -> list[dict[str, Any]]:
    return [{"step": (place + 1) * every, "loss": value} for place, value in enumerate(values)]


def run_of(name: str, rows: list[dict[str, Any]] | None = None, **config: Any) -> Run:
    return Run(name, {"config": config}, rows or [], final_values(rows or []))


def test_a_line_is_the_mean_and_the_band_holds_all_runs() -> None:
    (chart,) = group_charts({"a": [losses(1, 2, 3), losses(3, 4, 8)], "b": [losses(5, 6)]})
    assert (chart["title"], chart["kind"], chart["x_label"]) == ("Loss", "lines", "step")
    a, b = chart["series"]
    assert a == {"name": "a", "color": 0, "x": [1, 2, 3], "y": [2, 3, 5.5], "low": [1, 2, 3], "high": [3, 4, 8]}
    assert b == {"name": "b", "color": 1, "x": [1, 2], "y": [5, 6]}  # one run has no band


def test_runs_of_other_steps_meet_on_straight_lines() -> None:
    """One logs each step, one every other, one ended early: each counts where it has been."""
    groups = {"a": [losses(0, 1, 2, 3), losses(10, 20, every=2), losses(100)]}
    (series,) = charts_of(groups)["Loss"]["series"]
    assert series["x"] == [1, 2, 3, 4]
    assert series["y"] == [50.0, 5.5, 8.5, 11.5]  # (0 + 100) / 2, (1 + 10) / 2, (2 + 15) / 2, (3 + 20) / 2
    assert (series["low"], series["high"]) == ([0, 1, 2, 3], [100, 10, 15, 20])


def test_a_chart_for_every_series_of_every_panel() -> None:
    rows = [rl_row(step) for step in range(1, 31)]
    charts = charts_of({"a": [rows, rows], "b": [rows]})
    assert {
        "Reward: reward",
        "Reward: reward_std",
        "Held-out accuracy",
        "Time per phase: train",
        "Entropy",
    } <= charts.keys()
    assert charts["Held-out accuracy"]["unit"] == "share of right answers"  # the band is no standard error
    assert charts["Groups by pass rate: up_to_25"]["series"][0]["y"][0] == pytest.approx(1 / 6, rel=1e-4)
    assert [series["name"] for series in charts["Time per phase: train"]["series"]] == ["a", "b"]
    order = [panel.title for panel in PANELS]
    places = [order.index(title.partition(": ")[0]) for title in charts]
    assert places == sorted(places)


def test_a_colour_is_a_group_everywhere() -> None:
    charts = charts_of({"a": [losses(1)], "b": [[{"step": 1, "entropy": 1.0, "loss": 1.0}]]})
    assert charts["Entropy"]["series"][0]["color"] == 1 == charts["Loss"]["series"][1]["color"]


def test_noise_levels_are_those_of_the_last_evaluation() -> None:
    rows = [sft_row(step) for step in range(1, 41)]
    chart = charts_of({"a": [rows]})["Held-out loss by noise level"]
    assert chart["x_label"] == "level" and chart["series"][0]["y"] == [d / 40 for d in range(10)]


def test_long_runs_stay_small() -> None:
    (series,) = charts_of({"a": [losses(*range(1500)), losses(*range(1100))]})["Loss"]["series"]
    assert len(series["x"]) == len(series["y"]) == len(series["low"]) <= MAX_POINTS
    assert series["x"][-1] == 1500


def test_a_new_metric_shows_in_groups_at_once(tmp_path: Path) -> None:
    toy = Metric("toy/{kind}", "points", "how well it plays", panel="Toys")
    best = Metric("best", "points", "the best", panel="Toys", tile="best toy", headline=99)
    table = MetricTable((*TABLE.rows, toy, best), panels=(*PANELS, Panel("Toys", "points")))
    rows = [losses(1)[0] | {"toy/car": 2.5, "best": 7.0}]
    groups = {"a": [Run("r", {}, rows, final_values(rows, table))]}
    page = data_of(write_group_report(groups, tmp_path / "page.html", "k", None, table).read_text())
    assert [chart["title"] for chart in page["charts"]] == ["Loss", "Toys: toy/car", "Toys: best"]
    assert ["best", "7 (1 run)"] in page["tables"][0]["rows"]


@pytest.mark.parametrize(
    ("configs", "key", "labels"),
    [
        ([{"seed": 1}, {"seed": 2}, {"seed": 1}], "seed", {"1": [0, 2], "2": [1]}),
        ([{"model": {"path": "a"}}, {"model": {"path": "b"}}], "model.path", {"a": [0], "b": [1]}),
        ([{"o": {"preset": name, "x": 1}} for name in ("dipo", "espo")], "o", {"dipo": [0], "espo": [1]}),
        ([{"o": {"preset": "", "x": x, "y": 3}} for x in (1, 2)], "o", {"x=1": [0], "x=2": [1]}),
        ([{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 1, "b": 2}], "a,b", {"1, 2": [0, 2], "1, 3": [1]}),
        ([{"a": ""}, {"b": 1}], "a", {"(empty)": [0], "(not set)": [1]}),
    ],
)  # fmt: skip
def test_groups_are_by_value(configs: list[dict[str, Any]], key: str, labels: dict[str, list[int]]) -> None:
    runs = [run_of(str(place), **config) for place, config in enumerate(configs)]
    found = group_runs(runs, key)
    assert {label: [int(run.name) for run in own] for label, own in found.items()} == labels


def test_a_key_that_no_run_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--group-by objectiv: no run has such a key; keys: objective, seed"):
        group_runs([run_of("r", seed=1, objective={"x": 1})], "objectiv")


def test_final_values_costs_and_settings_of_groups(tmp_path: Path) -> None:
    def run(name: str, reward: float, **config: Any) -> Run:
        row = {"step": 1, "reward": reward, "loss": 9.0, "timing_s/step": 1800.0, "num_tokens": 1000}
        found = run_of(name, [row], output_dir=name, **config)
        hardware = {"hardware": {"gpus": ["A100"] * 2, "cpu_cores": 8}, "num_processes": 2}
        return Run(name, {**found.record, **hardware}, found.rows, found.values)

    groups = {
        "low": [run("a", 0.1, seed=0), run("b", 0.3, seed=1)],
        HOSTILE: [run("c", 0.5, seed=0, rate=2)],
    }
    text = write_group_report(groups, tmp_path / "page.html", "k", None).read_text()
    assert text.count("</script>") == 2
    page = data_of(text)
    assert page["title"] == "3 runs by k" and page["subtitle"].startswith("low: a, b; ")
    final, cost, settings = (table["rows"] for table in page["tables"])
    assert final == [["metric", "low", HOSTILE], ["reward", "0.2 ± 0.1 (2 runs)", "0.5 (1 run)"]]  # no surrogate loss
    assert cost[1] == ["low", "1:00:00", "2 GPU-h", "2 k", "-", "0.278", "-"]
    assert settings == [["key", "low", HOSTILE], ["seed", "0, 1", "0"], ["rate", "(not set)", "2"]]


def test_the_error_of_a_mean_over_runs() -> None:
    assert mean_and_error([0.1, 0.3]) == (pytest.approx(0.2), pytest.approx(0.1))
    mean, error = mean_and_error([0.5])
    assert mean == 0.5 and error != error
