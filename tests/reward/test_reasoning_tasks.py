"""The reasoning-gym reward: which scorers may run, on what, and problems of its tasks."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import time
from importlib.util import find_spec
from typing import Any

import pytest

from dirl.data.problem_sources import load_problems
from dirl.reward import RewardConfig, RewardError, Rubric
from dirl.reward import reasoning_tasks as tasks

needs_library = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="needs the extra reasoning-gym")
EXECUTING = {"eval", "exec", "compile", "parse_expr", "sympify", "literal_eval", "loads", "system", "run", "Popen"}
HOSTILE = [
    "__import__('os').system('true')",
    "9**9**9**9",
    "1e999999999",
    "Infinity",
    "nan",
    "-" * 1900,
    "(" * 1900,
    "[" * 1900 + "]",
    "\0",
    "\ud800",
    "\uff17",
    "0" * 1900,
    "a: b, " * 300,
    "\n" * 1900,
    " ".join(["up"] * 500),
    "{}",
    "None",
    "True",
]


def score(name: str, completion: str, *, answer: str = "6", **metadata: Any) -> list[float | None]:
    return tasks.reasoning_gym(["Q"], [completion], answer=[answer], metadata=[{"source_dataset": name, **metadata}])


class Library:
    """Stands in for the library: half a point for each character that is there."""

    @staticmethod
    def get_score_answer_fn(name: str) -> Any:
        return lambda answer, entry: 1.0 if answer == entry["answer"] else 0.99


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", Library)  # type: ignore[arg-type]
    tasks.find_scorer.cache_clear()


def test_the_full_score_of_the_boxed_answer_only(library: None) -> None:
    assert score("chain_sum", "so \\boxed{5} or \\boxed{ 6 }") == [1.0]
    assert score("chain_sum", "\\boxed{66}") == [0.0]
    assert score("chain_sum", "6") == [0.0]
    assert score("chain_sum", f"\\boxed{{{'6' * 3000}}}", answer="6" * 3000) == [0.0]
    assert tasks.reasoning_gym(["Q", "Q"], ["", ""], answer=["6", "6"], metadata=[None, {}]) == [None, None]
    assert tasks.reasoning_gym(["Q"], [""], answer=["6"]) == [None]


def test_scorers_off_the_list_are_refused(library: None) -> None:
    with Rubric(RewardConfig(functions=["reasoning_gym"])) as rubric:
        columns = {"answer": ["6"], "metadata": [{"source_dataset": "countdown"}]}
        with pytest.raises(RewardError, match="task 'countdown' has no scorer that is safe to call"):
            rubric.score(["Q"], ["\\boxed{6}"], completion_ids=[[]], step_maps=[[]], columns=columns)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    tasks.find_scorer.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'dirl\[reasoning-gym\]'"):
        score("chain_sum", "\\boxed{6}")
    with pytest.raises(ValueError, match=r"task:reasoning_gym/gcd: .*pip install 'dirl\[reasoning-gym\]'"):
        load_problems("task:reasoning_gym/gcd")


@needs_library
@pytest.mark.parametrize("name", sorted(tasks.SCORERS))
def test_scorers_on_the_list(name: str) -> None:
    """None calls what executes, in itself or in its own methods; right answers are right, hostile ones wrong."""
    tasks.find_scorer.cache_clear()
    function: Any = tasks.find_scorer(name)
    owner = function.__self__
    called: set[str] = set()
    todo = ["score_answer"]
    for method in todo:
        tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(owner, method))))
        calls = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
        called |= {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
        todo += [name for name in called if name not in todo and inspect.ismethod(getattr(owner, name, None))]
    assert not called & EXECUTING
    problems = load_problems(f"task:reasoning_gym/{name}", split="heldout", limit=3)
    columns = {"metadata": [problem.columns["metadata"] for problem in problems]}
    golds = [problem.answer for problem in problems]
    questions = [problem.question for problem in problems]
    boxed = [f"\\boxed{{{gold}}}" for gold in golds]
    # A gold with a lone brace has no box around it.
    if all(gold.count("{") == gold.count("}") and "\\" not in gold for gold in golds):
        assert tasks.reasoning_gym(questions, boxed, answer=golds, **columns) == [1.0] * len(problems)
    start = time.perf_counter()
    for answer in HOSTILE:
        if answer not in golds:
            assert function(answer, {"question": "Q", "answer": golds[0], **problems[0].columns}) < 1.0
    assert time.perf_counter() - start < 5


@needs_library
def test_problems_are_drawn_by_seed() -> None:
    path = "task:reasoning_gym/gcd"
    train, again, other = (load_problems(path, limit=20, seed=seed) for seed in (0, 0, 1))
    heldout = load_problems(path, split="heldout", limit=20)
    assert train == again != other
    assert not {problem.question for problem in train} & {problem.question for problem in heldout}
    with pytest.raises(ValueError, match="task:reasoning_gym/gdc: "):
        load_problems("task:reasoning_gym/gdc")
