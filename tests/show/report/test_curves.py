"""Metrics -> panels: every curve the report promises, thinned, with nothing invented."""

from __future__ import annotations

from typing import Any

import pytest

from dirl.show.report.curves import MAX_POINTS, panel_charts, thin
from tests.show.report.run_files import rl_row, sft_row


def by_title(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {panel["title"]: panel for panel in panel_charts(rows)}


def test_an_rl_run_has_all_its_curves() -> None:
    panels = by_title([rl_row(step) for step in range(1, 31)])
    assert {
        *("Reward", "Held-out accuracy", "Completion length", "Tokens per step", "Entropy", "KL", "Clip ratio"),
        *("Gradient norm", "Time per phase", "Groups by pass rate", "Throughput", "Learning rate", "Groups", "Loss"),
    } <= panels.keys()
    accuracy = panels["Held-out accuracy"]["series"][0]
    assert accuracy["x"] == [10, 20, 30] and accuracy["e"] == [0.02] * 3
    assert [series["name"] for series in panels["Time per phase"]["series"]] == ["rollout", "reward", "train"]
    assert [series["name"] for series in panels["Reward"]["series"]] == [
        "reward",
        "reward_std",
        "rewards/accuracy/mean",
    ]


def test_pass_rates_are_shares_of_the_groups() -> None:
    panel = by_title([rl_row(1), rl_row(2) | {"groups/pass_rate/0": 28}])["Groups by pass rate"]
    assert [series["name"] for series in panel["series"]][:2] == ["0", "up_to_25"]
    assert [series["y"][0] for series in panel["series"]] == pytest.approx([1 / 6] * 6, rel=1e-4)
    assert [series["y"][1] for series in panel["series"]] == pytest.approx([28 / 48, *[4 / 48] * 5], rel=1e-4)


def test_an_sft_run_shows_its_step_and_its_noise_levels() -> None:
    panels = by_title([sft_row(step) for step in range(1, 41)])
    assert [series["name"] for series in panels["Time per phase"]["series"]] == ["step"]
    levels = panels["Held-out loss by noise level"]
    assert [series["name"] for series in levels["series"]] == ["step 5", "step 15", "step 30", "step 40"]
    assert levels["series"][0]["x"] == [(d + 0.5) / 10 for d in range(10)]
    assert levels["series"][-1]["y"] == [d / 40 for d in range(10)]
    assert "Reward" not in panels


def test_numbers_that_were_not_finite_are_left_out() -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 3.0, "timing_s/eval": None}]
    assert [(p["title"], p["series"][0]["x"], p["series"][0]["y"]) for p in panel_charts(rows)] == [
        ("Loss", [1, 3], [1.0, 3.0])
    ]
    assert panel_charts([{"step": 1, "entropy": None}]) == [] == panel_charts([])


def test_long_curves_are_means_of_neighbours() -> None:
    assert thin([1.0, 2.0]) == [1.0, 2.0]
    assert thin(range(2 * MAX_POINTS)) == [2 * i + 0.5 for i in range(MAX_POINTS)]
    steps = thin(range(1, 2001), whole=True)
    assert len(steps) == MAX_POINTS and steps[-1] == 2000 and steps == sorted(set(steps))
