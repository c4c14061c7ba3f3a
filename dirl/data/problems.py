"""Rows -> problems: a question, its gold answer as text, and the other columns, which travel to the reward functions.

Two forms of row are read: {"question", "ground_truth_answer"} and {"prompt", "answer" | "solution"}. Either question
may be a conversation, a list of messages whose last one is the user's; `tools` are those it may call. Of a worked
solution what stands after `####`, or in the last \\boxed{}, is the answer; without either, the text as it is. A row
with `test_method` asks for a program: its tests take the place of the answer, as `instruction_id_list` does where a
text must follow instructions. Rows of public benchmarks are read as they are published (`dirl.data.published`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import NamedTuple

from dirl.boxed import read_gold
from dirl.data.messages import Message, Tool, read_prompt, read_tools
from dirl.data.published import from_published
from dirl.data.rows import column_names, shorten
from dirl.errors import UserError

logger = logging.getLogger(__name__)

TESTS = "test_method"  # the column that marks a row whose answer is a program
PASS_RATE = "pass_rate"  # the column of the share of a model's completions that were right
INSTRUCTIONS = "instruction_id_list"  # the column that marks a row whose answer is a text that follows them
COLUMN_PAIRS = (
    *(("question", "ground_truth_answer"), ("prompt", "answer"), ("prompt", "solution")),
    *(("question", TESTS), ("question", INSTRUCTIONS)),
)


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
    answer: str  # the gold, as text; "" where tests or instructions decide
    columns: dict[str, object]  # every other column of the row
    origin: Origin = field(default=Origin(), compare=False)
    conversation: list[Message] = field(default_factory=list)  # that the question ends; empty: there is nothing else

    @property
    def prompt(self) -> str | list[Message]:
        """What is put to the model."""
        return self.conversation or self.question

    @property
    def tools(self) -> list[Tool] | None:
        """What the model may call; None: nothing."""
        return read_tools(self.columns.get("tools"))


def problem_from_row(row: dict[str, object]) -> Problem:
    """Checks one row. Raises: ValueError saying what is wrong with it."""
    pairs = [pair for pair in COLUMN_PAIRS if row.keys() >= {*pair}]
    if not pairs:
        if (converted := from_published(row)) is not None:
            return problem_from_row(converted)
        raise UserError(
            f"has the columns {column_names(row)}; "
            "expected question and ground_truth_answer, prompt and answer or solution, or question and test_method"
        )
    # The first pair counts, and a null hides no columns beside it.
    question_key, answer_key = min(pairs, key=lambda pair: any(row[key] is None for key in pair))
    question = row[question_key]
    conversation = read_prompt(question_key, question) if isinstance(question, list) else []
    question = conversation[-1]["content"] if conversation else question
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"has {question_key}={shorten(question)}; expected a non-empty string or a list of messages")
    read_tools(row.get("tools"))  # bad ones are a bad row
    has_gold = answer_key not in (TESTS, INSTRUCTIONS)
    answer = read_gold(_gold_text(answer_key, row[answer_key])) if has_gold else ""
    read = {question_key, answer_key} if has_gold else {question_key}
    columns = {key: value for key, value in row.items() if key not in read}
    return Problem(question=question, answer=answer, columns=columns, conversation=conversation)


def with_all_columns(problems: Sequence[Problem]) -> list[Problem]:
    """Problems that all have the columns of each: None where a row has none, so that no batch lacks a column."""
    names = dict.fromkeys(name for problem in problems for name in problem.columns)
    return [replace(problem, columns=dict.fromkeys(names) | problem.columns) for problem in problems]


def check_band(name: str, band: Sequence[float]) -> None:
    """Raises: UserError, beginning with the name, for what is no band of pass rates: [low, high], or empty."""
    if band and (len(band) != 2 or band[0] > band[1]):
        raise UserError(f"{name} must be [low, high], two shares in this order, or empty, got {list(band)}")


def is_within(rate: float, band: Sequence[float]) -> bool:
    """Whether a pass rate lies in a band, ends included; everything lies in an empty one."""
    return not band or band[0] <= rate <= band[1]


def of_pass_rate(problems: Sequence[Problem], band: Sequence[float]) -> list[Problem]:
    """The problems whose column PASS_RATE lies in the band; all where it is empty.

    Raises:
        UserError: some have no number there, or none is left.
    """
    if not band:
        return list(problems)
    rates = [rate for problem in problems if isinstance(rate := problem.columns.get(PASS_RATE), int | float)]
    if len(rates) < len(problems):
        raise UserError(
            f"data.pass_rate={list(band)} reads the column {PASS_RATE}, which {len(problems) - len(rates)} of "
            f"{len(problems)} rows lack; write it with `dirl difficulty MODEL DATA OUT`, or leave data.pass_rate empty"
        )
    kept = [problem for problem, rate in zip(problems, rates, strict=True) if is_within(rate, band)]
    if not kept:
        raise UserError(f"data.pass_rate={list(band)} leaves none of {len(problems)} problems; widen it")
    logger.info("data.pass_rate=%s leaves %d of %d problems", list(band), len(kept), len(problems))
    return kept


def _gold_text(key: str, value: object) -> str:
    """The gold as text; a number is written out (18.0 as 18), anything else that is no text is refused."""
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else f"{Decimal(repr(value)):f}"  # 0.0000001, not 1e-07
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    raise UserError(f"has {key}={shorten(value)}; expected a non-empty string or a finite number")
