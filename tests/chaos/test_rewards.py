"""Rewards that mutate, exit, lie, break the process round them or hang; programs that cheat; answers that never end."""

from __future__ import annotations

import copy
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dirl.errors import UserError
from dirl.reward import MathGrader, RewardConfig, Rubric, code_execution
from dirl.reward.code_execution import code
from dirl.reward.math_answer import Verdict
from dirl.reward.sandbox import find_sandbox
from dirl.reward.shaping import REWARD_FUNCTIONS
from tests.chaos.conftest import Tally
from tests.reward.test_code_execution import CHEATS, STATEMENTS, children, fenced, hostile_programs, wait_for_children

Reward = Callable[..., Any]
COMPLETIONS = ["one", "two", "three"]
COLUMNS: dict[str, list[Any]] = {"answer": ["1", "2", "3"], "level": [{"a": [1]}, {"a": [2]}, {"a": [3]}]}


class Hostile:
    """An object that raises wherever it is looked at."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __str__ = __len__ = __float__ = __abs__ = __iter__ = __bool__ = __eq__ = __repr__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class Number(float):
    def __abs__(self) -> float:
        raise RuntimeError("no size")


class Unsaid(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def raising(error: BaseException | type[BaseException]) -> Reward:
    def f(**_: Any) -> Any:
        raise error

    return f


def returning(value: Any) -> Reward:
    return lambda **_: value


JUNK: dict[str, Any] = {
    **{
        repr(v)[:30]: v
        for v in (None, 1.0, "abc", b"abc", {1, 2, 3}, range(3), {"a": 1, "b": 2, "c": 3}, [], [1.0] * 2)
    },
    **{
        repr(v)[:30]: [0.0, v, 0.0] for v in ("1", b"1", {}, {1}, [[]], 1j, 10**400, 1e300, float("nan"), -float("inf"))
    },
    "a hostile object": Hostile(),
    "a list of them": [Hostile()] * 3,
    "a hostile number": [Number(1)] * 3,
    "a meta tensor": torch.zeros(3, device="meta"),
    "a sparse tensor": torch.eye(3).to_sparse(),
    "a matrix": torch.zeros(3, 3),
    "an array of objects": np.array([Hostile()] * 3, dtype=object),
    "an array of texts": np.array(["a", "b", "c"]),
    "an iterator": iter([1.0, 2.0, 3.0]),
    "a list within itself": (lambda rows: rows.append(rows) or rows)([1.0, 2.0]),
    "a number and steps": [[1.0], 2.0, 3.0],
    "all None": [None] * 3,
}
ERRORS: dict[str, BaseException | type[BaseException]] = {
    error.__name__: error
    for error in (SystemExit, GeneratorExit, MemoryError, RecursionError, StopIteration, Unsaid, OSError)
}
ERRORS |= {
    "BaseException": BaseException("a\nb"),
    "exit 0": SystemExit(0),
}


def score(function: Reward, **columns: list[Any]) -> Any:
    REWARD_FUNCTIONS["hostile"] = function
    try:
        with Rubric(RewardConfig(functions=["hostile", "after"], parameters={})) as rubric:
            ids = [[1, 2], [3], [4, 5, 6]]
            return rubric.score(["p"] * 3, COMPLETIONS, completion_ids=ids, step_maps=ids, columns=columns or COLUMNS)
    finally:
        del REWARD_FUNCTIONS["hostile"]


@pytest.fixture(autouse=True)
def after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second reward function, which sees what the first has left."""

    def judge(prompts: Any, completions: Any, *, completion_ids: Any, level: Any, **_: Any) -> list[float]:
        assert (prompts, completions, level) == (["p"] * 3, ["one", "two", "three"], [{"a": [n]} for n in (1, 2, 3)])
        assert completion_ids == [[1, 2], [3], [4, 5, 6]]
        return [1.0, 2.0, 3.0]

    monkeypatch.setitem(REWARD_FUNCTIONS, "after", judge)


def test_junk_and_errors(tally: Tally) -> None:
    tally.what = "reward that returns junk, or raises what is no Exception"
    cases = {f"returns {name}": returning(value) for name, value in JUNK.items()}
    cases |= {f"raises {name}": raising(error) for name, error in ERRORS.items()}
    for name, function in cases.items():
        try:
            scores = score(function)
            tally.count(name.endswith("all None") and scores.total == [1.0, 2.0, 3.0], f"{name}: taken as {scores}")
        except UserError as error:
            text = str(error)
            tally.count("'hostile'" in text and "\n" not in text and len(text) < 600, f"{name}: {text}")
        except BaseException as error:
            tally.count(False, f"{name}: {type(error)}")


def mutate(prompts: Any, completions: Any, *, completion_ids: Any, step_maps: Any, level: Any, **_: Any) -> list[float]:
    for values in (prompts, completions, completion_ids, step_maps, level):
        values.sort(key=repr, reverse=True)
        if isinstance(values[0], list):
            values[0].clear()
        elif isinstance(values[0], dict):
            values[0]["a"].append(7)
        del values[1:]
    return [0.0] * 3


def doing(act: Callable[[], Any]) -> Reward:
    def f(**_: Any) -> list[float]:
        act()
        return [0.0] * 3

    return f


def lingering() -> None:
    threading.Thread(target=lambda: time.sleep(0.2) or print("later"), daemon=True).start()


def test_what_a_reward_does_to_the_process_is_undone(tally: Tally, tmp_path: Path) -> None:
    tally.what = "reward that changes its arguments, the folder, streams or torch's settings, or leaves threads"
    gone = tmp_path / "gone"
    gone.mkdir()
    acts: dict[str, Reward] = {
        "mutates": mutate,
        "changes the folder": doing(lambda: os.chdir(tmp_path)),
        "removes the folder": doing(lambda: (os.chdir(gone), gone.rmdir())),
        "closes stdout": doing(lambda: sys.stdout.close()),
        "closes stderr": doing(lambda: sys.stderr.close()),
        "replaces stdout": doing(lambda: setattr(sys, "stdout", None)),
        "turns gradients off": doing(lambda: torch.set_grad_enabled(False)),
        "halves torch": doing(lambda: torch.set_default_dtype(torch.float16)),
        "seeds": doing(lambda: (random.seed(0), np.random.seed(0), torch.manual_seed(0))),
        "leaves a thread": doing(lingering),
    }
    for name, function in acts.items():
        columns = copy.deepcopy(COLUMNS)
        before = os.getcwd(), sys.stdout, sys.stderr, torch.is_grad_enabled(), torch.get_default_dtype()
        scores = score(function, **columns)
        after = os.getcwd(), sys.stdout, sys.stderr, torch.is_grad_enabled(), torch.get_default_dtype()
        is_whole = (scores.total, columns, before) == ([1.0, 2.0, 3.0], COLUMNS, after) and not sys.stdout.closed
        tally.count(is_whole, f"{name}: {scores}, {after}")


def test_cheats_and_bombs_of_the_code_reward(tally: Tally, tmp_path: Path) -> None:
    walls = find_sandbox()
    tally.what = f"program that cheats, forks, eats memory or disk, or reaches outside (isolation {walls.isolation})"
    assert code_execution.warned_sandbox() == walls
    (tmp_path / "kept").write_text("42")
    hostile = hostile_programs(tmp_path)
    for programs, tests in (
        (hostile, {"test_method": "stdio", "test_input": [""], "test_output": ["42"], "test_time_limit": 0.5}),
        (CHEATS, {"test_method": "stdio", "test_input": ["1"], "test_output": ["42"]}),
        (CHEATS, {"test_method": "function", "test_list": list(STATEMENTS)}),
    ):
        columns = {name: [value] * len(programs) for name, value in tests.items()}
        rewards = code([""] * len(programs), [fenced(p) for p in programs.values()], num_workers=2, **columns)
        for name, reward in zip(programs, rewards, strict=True):
            tally.count(reward == 0.0, f"{name}: {reward}")
    wait_for_children()
    tally.count(not children(), "processes were left")
    tally.count({path.name: path.read_text() for path in tmp_path.iterdir()} == {"kept": "42"}, "files were written")


def test_answers_that_hang(tally: Tally) -> None:
    completions = [rf"\boxed{{{number}^{{9^{{9^9}}}}}}" for number in range(2, 66)]
    is_quiet = os.getloadavg()[0] < 1
    with MathGrader(num_workers=2) as grader:
        start = time.monotonic()
        verdicts = grader.grade(["7.5"] * 64, completions)
        seconds = time.monotonic() - start
    tally.what = f"answer that hangs, of 64 on two workers (all in {seconds:.0f} s)"
    for completion, verdict in zip(completions, verdicts, strict=True):
        tally.count(verdict is Verdict.TIMEOUT, f"{completion}: {verdict}")
    assert seconds <= 60 or not is_quiet
