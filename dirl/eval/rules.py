"""A problem -> the rule that its answers are judged by, under a name with a version that reports repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dirl.boxed import extract_boxed
from dirl.data.problems import INSTRUCTIONS, TESTS, Problem
from dirl.reward.choices import find_choice
from dirl.reward.code_execution import extract_code, read_tests
from dirl.reward.instructions import followed, read_checks
from dirl.training.run_state import installed_version


@dataclass(frozen=True)
class Rule:
    """How the answers of a kind of problem are judged."""

    name: str
    judge: str | None = None  # the one reward that can; None: where the configuration chooses
    package: str = ""  # whose version is the rule's
    has_own_form: bool = True  # the question says what an answer looks like, and takes no suffix
    answer: Callable[[Problem, str], str | None] = lambda problem, text: extract_boxed(text)
    # further judgements of a completion, each of several parts: all right or not, and the share that is right
    marks: Callable[[Problem, str], dict[str, list[bool]]] = lambda problem, text: {}
    check: Callable[[Problem], object] = lambda problem: None  # raises ValueError for one that cannot be judged

    @property
    def title(self) -> str:
        """The name with its version."""
        version = installed_version(self.package) if self.package else None
        return self.name + (f", {self.package} {version}" if version else "")


def _code(name: str) -> Rule:
    answer: Callable[[Problem, str], str | None] = lambda problem, text: extract_code(text)  # noqa: E731
    return Rule(name, "code", "dirl", answer=answer, check=lambda problem: read_tests(problem.columns))


def _choice(name: str) -> Rule:
    return Rule(name, "choice", answer=lambda problem, text: find_choice(str(problem.columns["choice_rule"]), text))


MATHEMATICS = Rule("boxed answer", package="math-verify", has_own_form=False)
REASONING = Rule("the task's own scorer", "reasoning_gym", "reasoning-gym", has_own_form=False)
_CODE = _code("all tests passed")
_CONTEST = _code("all tests passed, compared as in lcb_runner 15808c7")
_CHOICES = {
    "simple-evals": _choice("first 'Answer: LETTER', simple-evals 0ac027d"),
    "mmlu-pro": _choice("'the answer is (X)' and its two fall-backs, MMLU-Pro 453c1d9"),
}


def _asked(problem: Problem) -> dict[str, Any]:
    return {"question": problem.question, **problem.columns}


_INSTRUCTIONS = Rule(
    "all instructions followed, strictly (IFEval)",
    "instructions",
    "lm_eval",
    answer=lambda problem, text: text.strip() or None,
    marks=lambda problem, text: followed(_asked(problem), text),
    check=lambda problem: read_checks(_asked(problem)),
)


def rule_of(problem: Problem) -> Rule:
    """The rule of a row, by its columns.

    Raises:
        ValueError: it asks for one that there is not.
    """
    columns = problem.columns
    if method := columns.get(TESTS):
        return _CONTEST if method == "contest" else _CODE
    if columns.get(INSTRUCTIONS):
        return _INSTRUCTIONS
    if (name := columns.get("choice_rule")) and name not in _CHOICES:
        raise ValueError(f"choice_rule={name!r}; expected one of {', '.join(_CHOICES)}")
    return _CHOICES[str(name)] if name else MATHEMATICS
