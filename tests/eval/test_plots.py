"""`dirl.plot_thresholds` of an evaluation's directory."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import dirl
from tests.eval.test_report import RESULT


def test_a_sweep_is_drawn_from_the_results(tmp_path: Path) -> None:
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
