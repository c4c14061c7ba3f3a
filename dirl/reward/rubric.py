"""Named rewards and weights -> one reward per completion, and its parts.

A reward function is `f(prompts, completions, *, completion_ids, step_maps, **columns) -> list[float | None]`, called
with keywords as in TRL; None means that it does not apply to that completion. Instead of a number it may give a list of
them, one for each denoising step of the completion, whose sum is its reward (`objective.advantage=given`). Keyword
arguments with a default are its parameters; a function that names `is_right` gets the grader's judgement of each
completion.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from statistics import fmean, pstdev
from types import ModuleType
from typing import Any, Literal

from dirl.config import PATH, Config, bounded
from dirl.errors import UserError, one_line
from dirl.files import expand
from dirl.reward.code_execution import code
from dirl.reward.math_answer import MathGrader, Verdict, count_verdicts
from dirl.reward.reasoning_tasks import reasoning_gym
from dirl.reward.shaping import REWARD_FUNCTIONS, RewardFunction

Parts = Mapping[str, Sequence[float | None]]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]

JUDGES = ("accuracy", "code", "reasoning_gym")  # functions whose full score, 1, says that an answer is right

REWARD_FUNCTIONS["code"] = code  # it runs generated programs: never unless it is named
REWARD_FUNCTIONS["reasoning_gym"] = reasoning_gym


class RewardError(UserError):
    """A reward that cannot be resolved, or that returned what is no reward."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Config):
    """What a completion is rewarded for."""

    # a name, pkg.mod:f, or path/to/file.py:f
    functions: list[str] = field(default_factory=lambda: ["accuracy"], metadata=PATH)
    weights: list[float] = field(default_factory=list)  # one per function; empty: all 1
    parameters: dict[str, dict[str, float]] = field(default_factory=dict)  # by function name, e.g. cosine.longest_right
    combine: Combine = "sum_then_normalize"  # normalize_then_sum: each reward is scaled in its group before it is added
    answer_extraction: Literal["boxed", "text"] = "boxed"  # text: math-verify may look for an answer anywhere
    grader_workers: int = bounded(0, least=0)  # processes that check answers; 0: one per usable core, at most 4
    grader_timeout_seconds: float = bounded(3.0, above=0)  # wall clock per answer; real ones take 0.01
    grader_memory_limit_mb: int = bounded(1024, least=1)  # address space per process
    max_answer_chars: int = bounded(2000, least=1)  # a longer boxed answer is wrong unread

    def check(self) -> None:
        if not self.functions:
            raise UserError("functions is empty; name at least one, e.g. [accuracy]")
        if self.weights and len(self.weights) != len(self.functions):
            raise UserError(
                f"weights needs one number per function, got {len(self.weights)} for {len(self.functions)}: "
                f"{list(self.weights)} for {list(self.functions)}"
            )


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch, one entry per completion."""

    total: list[float]  # weighted sum of the parts that apply, as `combine` says
    parts: dict[str, list[float | None]]  # by function name, unweighted
    counters: dict[str, int]  # how often the grader gave each verdict; empty when nothing was graded
    # weighted sums for each denoising step; empty where no function gives them
    by_step: list[list[float]] = field(default_factory=list)


def reward_function(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Decorator that makes a reward function known under `name`."""

    def register(function: RewardFunction) -> RewardFunction:
        known = REWARD_FUNCTIONS.get(name, function)
        if (known.__module__, known.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):  # not a cell run again
            raise RewardError(f"reward function name {name!r} is taken by {known.__module__}.{known.__qualname__}")
        REWARD_FUNCTIONS[name] = function
        return function

    return register


class Rubric:
    """Scores completions by the functions of a config. Close it, or use it as a context manager.

    Raises:
        RewardError: a function or parameter that does not exist, or two functions of one name.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.functions = _resolve_all(config.functions)
        self.weights = dict(zip(self.functions, config.weights or [1.0] * len(self.functions), strict=True))
        self.combine = config.combine
        self._parameters = {name: dict(config.parameters.get(name, {})) for name in self.functions}
        _check_parameters(config.parameters, self.functions)
        self._is_grading = any(map(_wants_grades, self.functions.values()))
        self.grader = MathGrader(
            num_workers=config.grader_workers,
            timeout_seconds=config.grader_timeout_seconds,
            memory_limit_mb=config.grader_memory_limit_mb,
            max_answer_chars=config.max_answer_chars,
            extraction=config.answer_extraction,
        )

    def score(
        self,
        prompts: list[str],
        completions: list[str],
        *,
        completion_ids: list[list[int]],
        step_maps: list[list[int]],
        columns: Mapping[str, list[Any]],
        group_size: int = 1,
    ) -> Scores:
        """Rewards of a batch.

        Args:
            columns: one list per name, one entry per completion; `answer` holds the golds.
            group_size: completions of one prompt, which stand together; `combine=normalize_then_sum` needs it.
        Raises:
            RewardError: a column of the wrong length, a function that raised or returned what is no reward, or a
                completion to which no function applies.
        """
        arguments: dict[str, Sequence[Any]] = {"prompts": prompts, "completions": completions}
        arguments |= {"completion_ids": completion_ids, "step_maps": step_maps}
        if taken := columns.keys() & {*arguments, "is_right"}:
            raise RewardError(f"columns {sorted(taken)} bear names that reward functions get otherwise; rename them")
        arguments |= columns
        for name, values in arguments.items():
            if len(values) != len(completions):
                raise RewardError(f"column {name!r} has {len(values)} entries for {len(completions)} completions")
        verdicts = self._grade(completions, columns) if self._is_grading else []
        is_right = [bool(verdict) for verdict in verdicts]
        parts, steps = {}, {}
        for name, function in self.functions.items():
            granted = {"is_right": is_right} if _wants_grades(function) else {}
            rewards = _call(name, function, {**arguments, **granted, **self._parameters[name]})
            rewards = _as_list(name, rewards, len(completions))
            if any(isinstance(reward, list | tuple) for reward in rewards):
                steps[name] = [_check_steps(name, row, reward) for row, reward in enumerate(rewards)]
                rewards = [math.fsum(of_completion) for of_completion in steps[name]]
            parts[name] = [_check_reward(name, row, reward) for row, reward in enumerate(rewards)]
        total = combine_parts(parts, list(self.weights.values()), group_size=group_size, combine=self.combine)
        return Scores(total, parts, count_verdicts(verdicts) if verdicts else {}, self._added_steps(steps))

    def close(self) -> None:
        """End the grader's processes."""
        self.grader.close()

    def __enter__(self) -> Rubric:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _added_steps(self, steps: Mapping[str, list[list[float]]]) -> list[list[float]]:
        """The weighted sum over the functions that judge steps."""
        added: list[list[float]] = []
        for name, rows in steps.items():
            weighted = [[self.weights[name] * value for value in row] for row in rows]
            added = added or [[0.0] * len(row) for row in rows]
            for row, (mine, others) in enumerate(zip(weighted, added, strict=True)):
                if len(mine) != len(others):
                    raise RewardError(
                        f"reward function {name!r}, row {row}: {len(mine)} steps, another has {len(others)}"
                    )
                added[row] = [a + b for a, b in zip(mine, others, strict=True)]
        return added

    def _grade(self, completions: list[str], columns: Mapping[str, list[Any]]) -> list[Verdict]:
        if "answer" not in columns:
            raise RewardError(f"grading needs the column 'answer' (the golds); there are {sorted(columns)}")
        for row, gold in enumerate(columns["answer"]):
            if not isinstance(gold, str):
                raise RewardError(f"column 'answer', row {row}: a gold answer is a string, got {gold!r}")
        return self.grader.grade(columns["answer"], completions)


def combine_parts(
    parts: Parts, weights: Sequence[float], *, group_size: int = 1, combine: Combine = "sum_then_normalize"
) -> list[float]:
    """Weighted sum over the parts of each completion; parts that are None are left out.

    `sum_then_normalize` sums the rewards as they are; what follows (subtract the group's mean, perhaps divide by its
    standard deviation) is the advantage's business. `normalize_then_sum` does both to each part on its own first, so
    that a part with little spread counts as much as one with a lot; a part without any spread in a group gives zeros.

    Args:
        group_size: completions per prompt, which stand together; used by `normalize_then_sum` only.
    Raises:
        RewardError: a completion to which no part applies.
        ValueError: the number of completions is no multiple of group_size, or of weights is not that of parts.
    Source: LightningRL; the standard deviation is the population's, as in DiRL.
    """
    if len(weights) != len(parts):
        raise UserError(f"every part needs a weight, got {len(weights)} weights for {list(parts)}")
    columns = [list(rewards) for rewards in parts.values()]
    if combine == "normalize_then_sum":
        columns = [_normalize_groups(rewards, group_size) for rewards in columns]
    totals = []
    for row, rewards in enumerate(zip(*columns, strict=True)):
        terms = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if reward is not None]
        if not terms:
            raise RewardError(f"row {row}: every reward function returned None: {list(parts)}; one must apply")
        totals.append(math.fsum(terms))
    return totals


def _normalize_groups(rewards: list[float | None], group_size: int) -> list[float | None]:
    """(reward - mean) / standard deviation within each group, over the rewards that apply."""
    if group_size < 1 or len(rewards) % group_size:
        raise UserError(f"{len(rewards)} completions are no whole number of groups of {group_size}")
    normalized: list[float | None] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        applicable = [reward for reward in group if reward is not None]
        # Equal rewards are found by comparing them: their computed deviation need not be zero in floats.
        spread = pstdev(applicable) if applicable and min(applicable) < max(applicable) else math.inf
        mean = fmean(applicable) if applicable else 0.0
        normalized += [None if reward is None else (reward - mean) / spread for reward in group]
    return normalized


def _resolve_all(references: Sequence[str]) -> dict[str, RewardFunction]:
    functions: dict[str, RewardFunction] = {}
    for reference in references:
        name = reference.rpartition(":")[2]
        if name in functions:
            raise RewardError(f"reward.functions names {name!r} twice: {list(references)}")
        functions[name] = _resolve(reference)
    return functions


def _resolve(reference: str) -> RewardFunction:
    """The function behind a registered name, `pkg.mod:f` or `path/to/file.py:f`."""
    source, colon, name = reference.rpartition(":")
    if not colon:
        if name not in REWARD_FUNCTIONS:
            close = difflib.get_close_matches(name, REWARD_FUNCTIONS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {sorted(REWARD_FUNCTIONS)}"
            raise RewardError(f"unknown reward function {name!r}{hint} Your own: pkg.mod:f or path/to/file.py:f")
        return REWARD_FUNCTIONS[name]
    try:
        module = _load_file(expand(source)) if source.endswith(".py") else importlib.import_module(source)
    except (ImportError, OSError, SyntaxError) as error:
        raise RewardError(f"reward function {reference!r}: cannot load {source}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardError(f"reward function {reference!r}: {source} has no function {name!r}")
    return function  # type: ignore[no-any-return]


def _load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader  # always there for a name that ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_parameters(parameters: Mapping[str, Mapping[str, float]], functions: Mapping[str, RewardFunction]) -> None:
    for name, values in parameters.items():
        if name not in functions:
            raise RewardError(f"reward.parameters.{name}: no such reward function; there are {list(functions)}")
        signature = inspect.signature(functions[name]).parameters.values()
        known = [parameter.name for parameter in signature if parameter.default is not parameter.empty]
        for key in values:
            if key not in known:
                raise RewardError(f"reward.parameters.{name}.{key}: no such parameter; {name} has {known or 'none'}")


def _wants_grades(function: RewardFunction) -> bool:
    return "is_right" in inspect.signature(function).parameters


def _call(name: str, function: RewardFunction, arguments: Mapping[str, Any]) -> object:
    try:
        return function(**arguments)
    except Exception as error:  # whatever a user's function raises becomes one line that names it
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}, line {where.lineno}"
        raise RewardError(f"reward function {name!r} raised {one_line(error)} ({place})") from error


def _as_list(name: str, rewards: object, num_completions: int) -> list[Any]:
    """One entry a completion, or an error that names the function."""
    if isinstance(rewards, str) or not hasattr(rewards, "__len__") or not hasattr(rewards, "__iter__"):
        raise RewardError(f"reward function {name!r} must return a list, got {rewards!r}")
    values = list(rewards)
    if len(values) != num_completions:
        raise RewardError(f"reward function {name!r} returned {len(values)} rewards for {num_completions} completions")
    return values


def _check_steps(name: str, row: int, values: object) -> list[float]:
    """Rewards of a completion's denoising steps."""
    if not isinstance(values, list | tuple):
        raise RewardError(f"reward function {name!r}, row {row}: other rows have a list of steps, got {values!r}")
    checked = [_check_reward(name, row, value) for value in values]
    if None in checked:
        raise RewardError(f"reward function {name!r}, row {row}: the reward of a step is a number, got None")
    return [value for value in checked if value is not None]


def _check_reward(name: str, row: int, value: object) -> float | None:
    if value is None:
        return None
    # Scalars of numpy and torch are numbers, their arrays are not.
    number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if not isinstance(number, Real) or not math.isfinite(number):
        raise RewardError(f"reward function {name!r}, row {row}: a reward is a finite number or None, got {value!r}")
    return float(number)
