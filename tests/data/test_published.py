"""Rows as public benchmarks publish them; made up here, in their columns and types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dirl.data.problem_sources import load_problems
from dirl.data.problems import Problem, problem_from_row
from dirl.reward.code_execution import code
from tests.published_rows import GPQA, IFEVAL, MMLU_PRO, contest_row

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": (
        "from typing import List\n\n\ndef largest(numbers: List[int]) -> int:\n"
        '    """ Largest number.\n    >>> largest([1, 3])\n    3\n    """\n'
    ),
    "entry_point": "largest",
    "canonical_solution": "    return max(numbers)\n",
    "test": (
        "\n\nMETADATA = {}\n\n\ndef check(candidate):\n"
        "    assert candidate([1, 3]) == 3\n    assert candidate([-1]) == -1\n"
    ),
}
MBPP = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\r\n  return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert math.isclose(add(.1, .2), .3)"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "x.ipynb",
    "task_id": 11,
    "prompt": "Write a function to add two numbers.",
    "code": "def add(a, b): return a + b",
    "test_imports": ["import math"],
    "test_list": MBPP["test_list"],
}


def graded(problem: Problem, completion: str) -> float | None:
    (value,) = code([problem.question], [completion], **{name: [value] for name, value in problem.columns.items()})
    return value


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "Q", "answer": "3 * 6 = <<3*6=18>>18\n#### 1,018"}, "Q", "1018"),
        ({"question": "Q", "answer": "70"}, "Q", "70"),
        ({"problem": "Q", "solution": "thus $3$", "answer": "3", "level": 1, "unique_id": "x"}, "Q", "3"),
        ({"ID": "2024-I-1", "Problem": "Q", "Solution": "S", "Answer": 204}, "Q", "204"),
        ({"question": "Q", "solution": ["S"], "final_answer": ["$2,3$"], "is_multiple_answer": True}, "Q", "$2,3$"),
    ],
)
def test_mathematics(row: dict[str, object], question: str, answer: str) -> None:
    problem = problem_from_row(row)
    assert (problem.question, problem.answer) == (question, answer)
    assert not {"solution", "Solution", "final_answer", "answer"} & problem.columns.keys()


def test_humaneval() -> None:
    problem = problem_from_row(HUMANEVAL)
    assert HUMANEVAL["prompt"].rstrip() in problem.question and problem.answer == ""
    assert "check" not in problem.question
    body = HUMANEVAL["canonical_solution"]
    assert graded(problem, f"```python\n{body}```") == 1.0
    assert graded(problem, "```python\nimport math\ndef largest(numbers):\n    return max(numbers)\n```") == 1.0
    assert graded(problem, "```python\ndef largest(numbers):\n    return numbers[-1] + 1\n```") == 0.0
    assert graded(problem, body) == 0.0


@pytest.mark.parametrize("row", [MBPP, SANITIZED], ids=["full", "sanitized"])
def test_mbpp(row: dict[str, object]) -> None:
    problem = problem_from_row(row)
    assert "add two numbers" in problem.question and "assert add(1, 2) == 3" in problem.question
    assert graded(problem, f"```python\n{row['code']}\n```") == 1.0
    assert graded(problem, "```python\ndef add(a, b): return a * b\n```") == pytest.approx(1 / 3)


def test_a_file_in_a_published_form(tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n")
    assert load_problems(str(path)) == [problem_from_row(HUMANEVAL)]
    path.write_text(json.dumps({**HUMANEVAL, "test": None}) + "\n")
    with pytest.raises(ValueError, match=r"HumanEval.jsonl row 1 has test=None; expected a non-empty string"):
        load_problems(str(path))
    for row, words in (
        ({"question": "Q", "final_answer": ["1", "2"]}, "2 entries in final_answer"),
        ({**MBPP, "test_list": [1]}, r"test_list=\[1\]; expected a list of strings"),
        ({"question": "Q", "answer": None}, "ground_truth_answer=None"),
    ):
        with pytest.raises(ValueError, match=words):
            problem_from_row(row)


def test_multiple_choice() -> None:
    problem = problem_from_row(GPQA)
    lines = problem.question.splitlines()
    assert {line[3:] for line in lines[-4:]} == {"Jupiter", "Mars", "Venus", "Earth"}
    assert f"{problem.answer}) Jupiter" in lines and "Which planet is largest?" in lines
    assert problem.columns == {"choice_rule": "simple-evals", "category": "Physics", "record_id": "rec1"}
    # The order is the row's own, whatever stands around it, and no letter is favoured.
    moved = {**GPQA, "Correct Answer": "Earth", "Incorrect Answer 3": "Jupiter"}
    assert problem_from_row(moved).question == problem.question
    letters = [problem_from_row({**GPQA, "Question": f"Q{n}"}).answer for n in range(400)]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")

    problem = problem_from_row(MMLU_PRO)
    assert problem.question.endswith("What is 3 + 4?\n\nA. 5\nB. 6\nC. 7") and "about math" in problem.question
    assert (problem.answer, problem.columns["choice_rule"], problem.columns["category"]) == ("C", "mmlu-pro", "math")
    with pytest.raises(ValueError, match=r"answer='B' and answer_index=2 for 3 options"):
        problem_from_row({**MMLU_PRO, "answer": "B"})


def test_instructions() -> None:
    problem = problem_from_row(IFEVAL)
    assert (problem.question, problem.answer) == (IFEVAL["prompt"], "")
    assert problem.columns == {key: IFEVAL[key] for key in ("instruction_id_list", "kwargs", "key")}
    with pytest.raises(ValueError, match=r"has 2 instructions in instruction_id_list, and kwargs=\[\{\}\]"):
        problem_from_row({**IFEVAL, "kwargs": [{}]})


def test_livecodebench() -> None:
    doubled = problem_from_row(contest_row([("2\n", "4\n")], [("3 5\n", "6\n10.0")]))
    assert "Double what you are given." in doubled.question and doubled.columns["contest_date"] == "2025-01-18"
    assert graded(doubled, "```python\nfor word in input().split():\n    print(2 * int(word))\n```") == 1.0
    assert graded(doubled, "```python\nprint(*(2 * int(word) for word in input().split()))\n```") == 0.5  # lines count
    row = contest_row([("[1, 2]", "[2, 4]")], [("[]", "[]"), ("[0.5]", "[1]")], name="double")
    method = problem_from_row(row)
    body = "class Solution:\n    def double(self, numbers: List[int]):\n        return {}\n"
    assert "class Solution" in method.question
    for returned, share in (("[2 * n for n in numbers]", 1.0), ("tuple(2 * n for n in numbers)", 1.0), ("[]", 1 / 3)):
        assert graded(method, f"```python\n{body.format(returned)}```") == pytest.approx(share)
    assert graded(method, "```python\ndouble = lambda numbers: [n + n for n in numbers]\n```") == 1.0
    for changes, words in (({"metadata": "{"}, "metadata='{'"), ({"public_test_cases": ""}, "public_test_cases=''")):
        with pytest.raises(ValueError, match=words):
            problem_from_row({**row, **changes})
