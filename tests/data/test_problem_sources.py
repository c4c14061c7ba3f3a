"""Problems of several sources, what is kept apart of them, and what asks the same as the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dirl.data.data_config import DataConfig
from dirl.data.problem_sources import load_problems, load_sources, split_problems
from dirl.data.problems import Origin, Problem
from dirl.data.rows import DataError
from dirl.errors import UserError


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_sources_with_names_of_their_own(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"question": f"{n}?", "ground_truth_answer": n, "level": n} for n in range(3)])
    second = write(tmp_path / "b.jsonl", [{"problem": f"{n}!", "final": n, "question": "x"} for n in range(5)])
    columns = {"question": "problem", "ground_truth_answer": "final"}
    told = [{"path": first, "weight": 2.0}, {"path": second, "weight": 1.0, "limit": 2, "columns": columns}]
    problems = load_sources(DataConfig(sources=told), seed=0)
    assert problems == [
        *(Problem(f"{n}?", str(n), {"level": n}) for n in range(3)),
        *(Problem(f"{n}!", str(n), {"level": None}) for n in range(2)),
    ]
    assert problems[1].origin == Origin(first, 2, 0, 2.0)
    assert problems[4].origin == Origin(second, 2, 1, 1.0)


def test_columns_that_are_not_there_are_a_bad_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"q": "1", "a": 1}, {"question": "2", "a": 2}])
    columns = {"question": "q", "ground_truth_answer": "a"}
    with pytest.raises(DataError, match=r"a\.jsonl row 2 has the columns question, a; data\.columns=.* names 'q' too"):
        load_problems(file, columns=columns)
    assert load_problems(file, columns=columns, skip_bad_rows=True) == [Problem("1", "1", {})]
    swapped = {"question": "a", "ground_truth_answer": "q", "prompt": "q"}
    assert load_problems(write(tmp_path / "b.jsonl", [{"q": "1", "a": "A"}]), columns=swapped)[0].question == "A"


def test_text_parts_are_a_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?", "more": None}]
    other = [{"type": "function", "name": "f"}]
    file = write(tmp_path / "a.jsonl", [{"question": parts, "ground_truth_answer": "2", "tools": other}])
    assert load_problems(file) == [Problem("1 + 1?", "2", {"tools": other})]
    image = [{"type": "image", "url": "u"}, parts[0]]
    with pytest.raises(DataError, match=r"row 1 has the message .*'image'.*; expected a role and a text"):
        load_problems(write(tmp_path / "b.jsonl", [{"question": image, "ground_truth_answer": "2"}]))


PROBLEMS = [Problem(f"question {n // 2}", str(n), {}, Origin("p", n + 1)) for n in range(40)]


def test_rows_kept_apart_are_trained_on_by_nobody() -> None:
    split = split_problems(PROBLEMS, DataConfig(heldout=0.25), [])
    apart = {problem.question for problem in split.heldout}
    assert split.heldout and split.trained and not split.overlaps.found
    assert apart.isdisjoint(problem.question for problem in split.trained)
    assert len(split.heldout) + len(split.trained) == 40


@pytest.mark.parametrize("mode", ["report", "drop", "off"])
def test_rows_that_the_evaluation_asks_too(mode: Any) -> None:
    split = split_problems(PROBLEMS, DataConfig(decontaminate=mode), [Problem("Question 3", "", {})])
    assert [problem for problem in PROBLEMS if problem not in split.trained] == (
        PROBLEMS[6:8] if mode == "drop" else []
    )
    assert [(found.path, found.row) for found in split.overlaps.found] == (
        [] if mode == "off" else [("p", 7), ("p", 8)]
    )


def test_nothing_left_is_one_line() -> None:
    with pytest.raises(UserError, match=r"data\.heldout=40 and data\.decontaminate=report leave nothing of p"):
        split_problems(PROBLEMS, DataConfig(heldout=40), [])
    with pytest.raises(UserError, match=r"data\.heldout=1e-09 keeps none of 40 rows apart"):
        split_problems(PROBLEMS, DataConfig(heldout=1e-9), [])
