"""Benchmarks beyond mathematics in their published files, through a whole evaluation: one table, each by its rule."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from dirl.data.problems import Problem
from dirl.errors import UserError
from dirl.eval.benchmarks import Dates, load_benchmark, load_benchmarks
from dirl.eval.eval_config import EvalConfig, EvalDataConfig
from dirl.eval.evaluate import run_evaluation
from dirl.eval.rules import rule_of
from dirl.reward import instructions
from dirl.rollout.engine import SamplingConfig
from tests.eval.test_evaluate import World, results_of, rows_of
from tests.published_rows import GPQA, IFEVAL, MMLU_PRO, contest_row


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


class NoComma:
    """A check with the face of the library's."""

    def __init__(self, name: str) -> None: ...

    def build_description(self, **parameters: Any) -> None: ...

    def get_instruction_args(self) -> None: ...

    def check_following(self, text: str) -> bool:
        return "," not in text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four files as they are published."""
    known = dict.fromkeys(IFEVAL["instruction_id_list"], NoComma)
    monkeypatch.setattr(instructions, "_library", lambda: known)
    with (tmp_path / "gpqa.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*GPQA])
        writer.writeheader()
        writer.writerows([GPQA, {**GPQA, "High-level domain": "Biology", "Question": "And\nthe smallest?"}])
    contest = [contest_row([("1", "2")], [("2", "4")]), contest_row([("1", "2")], [], contest_date="2024-05-01T00:00")]
    for name, rows in {"mmlu": [MMLU_PRO], "ifeval": [IFEVAL], "contest": contest}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def reply(question: str, *_: Any) -> str:
    if "planet" in question or "smallest" in question:
        letter = next(line[0] for line in question.splitlines() if "Jupiter" in line)
        return f"Answer: {letter if 'planet' in question else '?'}"
    if "3 + 4" in question:
        return "I think the answer is (C)."
    if "rain" in question:
        return "Rain\nis wet, wet"
    return "```python\nprint(2 * int(input()))\n```"


def test_one_table_over_all(world: World, folder: Path) -> None:
    world.script = reply
    paths = [str(folder / name) for name in ("gpqa.csv", "mmlu.jsonl", "ifeval.jsonl", "contest.jsonl")]
    config = EvalConfig(
        output_dir=str(folder / "out"),
        modes=["greedy"],
        data=EvalDataConfig(datasets=paths, suffix="Put it into a box.", end_date="2024-12-31"),
        sampling=SamplingConfig(max_completion_length=96),
    )
    report = run_evaluation(config).read_text()
    results = {result["dataset"]: result for result in results_of(folder / "out")["results"]}
    assert {name: result["avg_at_k"] for name, result in results.items()} == {
        "gpqa": 0.5,
        "mmlu": 1.0,
        "ifeval": 0.0,
        "contest": 1.0,
    }
    assert results["gpqa"]["by_category"] == {"Biology": [1, 0.0], "Physics": [1, 1.0]}
    marks = {"prompt, strict": 0.0, "instruction, strict": 0.0, "prompt, loose": 1.0, "instruction, loose": 1.0}
    assert results["ifeval"]["marks"] == marks and results["contest"]["num_problems"] == 1
    assert results["gpqa"]["rule"] == "first 'Answer: LETTER', simple-evals 0ac027d"
    assert results["gpqa"]["no_answer"] == 0.5
    assert "| model | gpqa | mmlu | ifeval | contest | average |" in report and "| 62.5 |" in report
    assert "mmlu: 'the answer is (X)' and its two fall-backs, MMLU-Pro 453c1d9;" in report
    assert "| ifeval | greedy | prompt, loose |  | 100.0 |" in report
    assert [row["answer"] for row in rows_of(folder / "out") if row["dataset"] == "mmlu"] == ["C"]
    run_evaluation(config)  # what is there is read back, marks and all
    assert world.num_generated == 0
    assert results_of(folder / "out")["results"][2]["marks"] == marks


def test_dates(folder: Path) -> None:
    path = str(folder / "contest.jsonl")
    for dates, count in ((Dates(), 2), (Dates("2025-01-18"), 1), (Dates("", "2024-05-01"), 1)):
        assert len(load_benchmark(path, dates=dates).problems) == count
    assert len(load_benchmark(path, dates=Dates("2025-01-01"), limit=1).problems) == 1  # what is left is limited
    with pytest.raises(UserError, match=r"leave no problem of .*contest.jsonl"):
        load_benchmark(path, dates=Dates("2026-01-01"))
    with pytest.raises(UserError, match=r"are of LiveCodeBench; no problem of \['mmlu'\] has a date"):
        load_benchmarks([str(folder / "mmlu.jsonl")], dates=Dates("2026-01-01"))
    for changes, words in (
        ({"start_date": "2025"}, "start_date must be a day such as 2025-01-31, got '2025'"),
        ({"start_date": "2025-02-01", "end_date": "2025-01-01"}, "end_date=2025-01-01 is before"),
    ):
        with pytest.raises(UserError, match=words):
            EvalDataConfig(**changes)


def test_what_cannot_be_judged_is_refused_before_anything_is_decoded(folder: Path) -> None:
    evil = folder / "evil.jsonl"
    evil.write_text(json.dumps(contest_row([("1", "2")], [], private_test_cases="gARLAS4=")) + "\n")
    with pytest.raises(UserError, match=r"evil.jsonl, problem 1: private_test_cases holds no tests"):
        load_benchmark(str(evil))
    unknown = folder / "unknown.jsonl"
    unknown.write_text(json.dumps({**IFEVAL, "instruction_id_list": ["a", "b"]}) + "\n")
    with pytest.raises(UserError, match=r"unknown.jsonl, problem 1: instruction_id_list names 'a'"):
        load_benchmark(str(unknown))
    with pytest.raises(ValueError, match="choice_rule='x'; expected one of simple-evals, mmlu-pro"):
        rule_of(Problem("Q", "A", {"choice_rule": "x"}))
