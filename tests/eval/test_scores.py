"""Scores of runs and evaluations, and groups of them compared on the problems they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from dirl.data.problems import Problem
from dirl.eval.estimates import paired_bootstrap
from dirl.eval.results import Sample
from dirl.eval.scores import compare_groups, read_scores, write_scores
from dirl.files import append_json_lines
from tests.eval.test_report import write_run

PROBLEMS = [Problem("1+1=", "2", {}), Problem("2+2=", "4", {}), Problem("1+1=", "2", {})]


def samples(*right: list[bool]) -> list[Sample]:
    return [
        Sample(problem, place, correct, None, 1, 1, "stop", 0.0)
        for problem, of_problem in enumerate(right)
        for place, correct in enumerate(of_problem)
    ]


def test_a_run_keeps_its_newest_evaluation(tmp_path: Path) -> None:
    append_json_lines(tmp_path / "metrics.jsonl", [{"step": 4, "eval/accuracy": 0.5}])
    assert read_scores(tmp_path) == {}
    write_scores(tmp_path, 2, PROBLEMS, {"eval/accuracy": samples([False], [False], [False])})
    assert read_scores(tmp_path) == {}  # of a step that was not the last evaluated
    write_scores(tmp_path, 4, PROBLEMS, {"eval/accuracy": samples([True, False], [False, False], [True, True])})
    append_json_lines(tmp_path / "metrics.jsonl", [{"step": 5, "eval/accuracy": None}])
    scores = read_scores(tmp_path)["eval/accuracy"]
    assert list(scores.values()) == [0.5, 0.0, 1.0]  # equal problems in two places are two
    other = [Problem("1+1=", "3", {}), *PROBLEMS[1:]]
    write_scores(tmp_path, 4, other, {"eval/accuracy": samples([True], [True], [True])})
    assert len(scores.keys() & read_scores(tmp_path)["eval/accuracy"].keys()) == 2  # the first is another


def test_an_evaluation_brings_its_samples(tmp_path: Path) -> None:
    directory = write_run(tmp_path / "eval", {0: [True, False], 1: [True, True]})
    (scores,) = read_scores(directory).values()
    assert list(read_scores(directory)) == ["A dynamic"] and sorted(scores.values()) == [0.5, 1.0]
    other = write_run(tmp_path / "other", {0: [True]}, digest="other")
    assert not scores.keys() & read_scores(other)["A dynamic"].keys()


def test_groups_are_compared_on_the_means_of_shared_problems() -> None:
    a = [{"m": {"x": 0.0, "y": 1.0}}, {"m": {"x": 0.5, "z": 1.0}}]
    b = [{"m": {"x": 1.0, "y": 0.5, "w": 1.0}}, {"other": {"x": 0.0}}]
    found = compare_groups(a, b, "m")
    assert found is not None
    assert found == (2, paired_bootstrap([0.25, 1.0], [1.0, 0.5]))
    assert found[1].mean == pytest.approx(0.125)
    assert compare_groups(a, b, "other") is None
