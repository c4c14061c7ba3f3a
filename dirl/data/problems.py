"""Rows -> problems: a question, its gold answer as text, and the other columns, which travel to the reward functions.

Two forms of row are read: {"question", "ground_truth_answer"} and {"prompt", "answer" | "solution"}. Of a worked
solution what stands after `####`, or in the last \\boxed{}, is the answer; without either, the text as it is. A row
with `test_method` asks for a program: its tests take the place of the answer. Rows of public benchmarks are read as
they are published (`dirl.data.published`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import NamedTuple

from dirl.boxed import read_gold
from dirl.data.published import from_published
from dirl.data.rows import shorten
from dirl.errors import UserError

TESTS = "test_method"  # the column that marks a row whose answer is a program
COLUMN_PAIRS = (("question", "ground_truth_answer"), ("prompt", "answer"), ("prompt", "solution"), ("question", TESTS))


class Origin(NamedTuple):
    """Where a problem comes from."""

    path: str = "the given problems"
    row: int = 0  # as people count; 0: of no file
    source: int = 0  # which of data.sources
    weight: float = 0.0  # of that source


@dataclass(frozen=True)
class Problem:
    """One question with a checkable answer."""

    question: str
    answer: str  # the gold, as text; "" where tests decide
    columns: dict[str, object]  # every other column of the row
    origin: Origin = field(default=Origin(), compare=False)


def problem_from_row(row: dict[str, object]) -> Problem:
    """Checks one row. Raises: ValueError saying what is wrong with it."""
    pairs = [pair for pair in COLUMN_PAIRS if row.keys() >= {*pair}]
    if not pairs:
        if (converted := from_published(row)) is not None:
            return problem_from_row(converted)
        raise UserError(
            f"has the columns {', '.join(map(str, row)) or '(none)'}; "
            "expected question and ground_truth_answer, prompt and answer or solution, or question and test_method"
        )
    # The first pair counts, and a null hides no columns beside it.
    question_key, answer_key = min(pairs, key=lambda pair: any(row[key] is None for key in pair))
    question = row[question_key]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"has {question_key}={shorten(question)}; expected a non-empty string")
    if answer_key == TESTS:
        return Problem(question, "", {key: value for key, value in row.items() if key != question_key})
    answer = read_gold(_gold_text(answer_key, row[answer_key]))
    columns = {key: value for key, value in row.items() if key not in (question_key, answer_key)}
    return Problem(question=question, answer=answer, columns=columns)


def with_all_columns(problems: Sequence[Problem]) -> list[Problem]:
    """Problems that all have the columns of each: None where a row has none, so that no batch lacks a column."""
    names = dict.fromkeys(name for problem in problems for name in problem.columns)
    return [replace(problem, columns=dict.fromkeys(names) | problem.columns) for problem in problems]


def _gold_text(key: str, value: object) -> str:
    """The gold as text; a number is written out (18.0 as 18), anything else that is no text is refused."""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"  # 0.0000001, not 1e-07
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise UserError(f"has {key}={shorten(value)}; expected a non-empty string or a finite number")
