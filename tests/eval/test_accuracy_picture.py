"""Accuracy against speed: the points, the pictures, and `dirl.plot_thresholds` of an evaluation's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import dirl
from dirl.eval.accuracy_picture import plot_accuracy, sweep_points, throughput_points
from tests.eval.test_report import RESULT


def test_a_sweep_is_plotted_from_the_results(tmp_path: Path) -> None:
    rows = [
        replace(RESULT, mode=f"dynamic@{t}", confidence_threshold=t, tokens_per_step=3 - t) for t in (0.5, 0.7, 0.9)
    ]
    (tmp_path / "results.json").write_text(json.dumps({"results": [asdict(row) for row in rows]}))
    pictures = dirl.plot_thresholds(tmp_path)
    assert pictures == [tmp_path / "plots" / "thresholds.png"]
    assert pictures[0].read_bytes()[:4] == b"\x89PNG" and "<img" in pictures._repr_html_()


def test_no_results_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"results\.json: no results to plot"):
        dirl.plot_thresholds(tmp_path)


def test_sweep(tmp_path: Path) -> None:
    sweep = [
        replace(RESULT, mode="dynamic@0.5", confidence_threshold=0.5, tokens_per_step=3.0, avg_at_k=0.7),
        RESULT,
        replace(RESULT, mode="static", confidence_threshold=None, tokens_per_step=1.0, avg_at_k=0.85),
        replace(RESULT, mode="greedy", temperature=0.0),
        replace(RESULT, mode="dynamic@0.5", dataset="GSM8K", confidence_threshold=0.5),
    ]
    points = sweep_points(sweep, "MATH500")
    assert [label for *_, label in points] == ["static", "0.9", "0.5"]
    assert points[2] == pytest.approx((3.0, 70.0, 1.23, "0.5"))
    path = tmp_path / "plots" / "thresholds.png"
    plot_accuracy(sweep, path, sweep_points, "tokens per step")
    both = path.read_bytes()
    plot_accuracy(sweep[:3], path, sweep_points, "tokens per step")
    assert both.startswith(b"\x89PNG")
    assert path.read_bytes() != both


def test_throughput() -> None:
    results = [RESULT, replace(RESULT, mode="static", tokens_per_s=700.0), replace(RESULT, mode="greedy", dataset="B")]
    points = throughput_points(results, "MATH500")
    assert [(speed, label) for speed, *_, label in points] == [(700.0, "static"), (1234.5, "dynamic")]
    assert throughput_points([replace(RESULT, tokens_per_s=0.0)], "MATH500") == []  # nothing was timed
