"""Named rewards and weights -> one reward per completion, and its parts.

A reward function is `f(prompts, completions, *, completion_ids, step_maps, **columns) -> list[float | None]`, called
with keywords as in TRL; None means that it does not apply to that completion. Instead of a number it may give a list of
them, one for each denoising step of the completion, whose sum is its reward (`objective.advantage=given`). Keyword
arguments with a default are its parameters; a function that names `is_right` gets the grader's judgement of each
completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any, Literal

from dirl.config import PATH, Config, bounded
from dirl.errors import UserError
from dirl.reward.functions import RewardError, call, check_parameters, resolve_all, wants_grades
from dirl.reward.math_answer import MathGrader, Verdict, count_verdicts

Parts = Mapping[str, Sequence[float | None]]
Combine = Literal["sum_then_normalize", "normalize_then_sum"]

ARGUMENTS = ("prompts", "completions", "completion_ids", "step_maps", "is_right")  # of every reward function
# Functions whose full score, 1, says that an answer is right.
JUDGES = ("accuracy", "code", "reasoning_gym", "choice", "instructions")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(Config):
    """What a completion is rewarded for."""

    # a name, pkg.mod:f, or path/to/file.py:f
    functions: list[str] = field(default_factory=lambda: ["accuracy"], metadata=PATH)
    weights: list[float] = field(default_factory=list)  # one per function; empty: all 1
    parameters: dict[str, dict[str, float]] = field(default_factory=dict)  # by function name, e.g. cosine.longest_right
    combine: Combine = "sum_then_normalize"  # normalize_then_sum: each reward is scaled in its group before it is added
    answer_extraction: Literal["boxed", "text"] = (
        "boxed"  # text: math-verify may look for one anywhere; golds are never searched
    )
    grader_workers: int = bounded(0, least=0)  # processes that check answers; 0: one per usable core, at most 4
    grader_timeout_seconds: float = bounded(1.5, above=0)  # CPU time per answer; real ones take 0.01
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


class Rubric:
    """Scores completions by the functions of a config. Close it, or use it as a context manager.

    Raises:
        RewardError: a function or parameter that does not exist, or two functions of one name.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.functions = resolve_all(config.functions)
        self.weights = dict(zip(self.functions, config.weights or [1.0] * len(self.functions), strict=True))
        self.combine = config.combine
        self._parameters = {name: dict(config.parameters.get(name, {})) for name in self.functions}
        check_parameters(config.parameters, self.functions)
        self._is_grading = any(map(wants_grades, self.functions.values()))
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
        if taken := columns.keys() & {*ARGUMENTS}:
            raise RewardError(f"columns {sorted(taken)} bear names that reward functions get otherwise; rename them")
        arguments |= columns
        for name, values in arguments.items():
            if len(values) != len(completions):
                raise RewardError(f"column {name!r} has {len(values)} entries for {len(completions)} completions")
        verdicts = self._grade(completions, columns) if self._is_grading else []
        is_right = [bool(verdict) for verdict in verdicts]
        parts, steps = {}, {}
        for name, function in self.functions.items():
            granted = {"is_right": is_right} if wants_grades(function) else {}
            rewards = call(name, function, arguments | granted, self._parameters[name])
            parts[name] = rewards.totals
            if rewards.steps:
                steps[name] = rewards.steps
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


def right_ones(parts: Parts, totals: Sequence[float]) -> list[bool]:
    """Which completions are right: one of the JUDGES gives its full score; without any, the total is above 0."""
    judges = [parts[name] for name in JUDGES if name in parts]
    if not judges:
        return [total > 0 for total in totals]
    return [any(reward is not None and reward >= 1 for reward in rewards) for rewards in zip(*judges, strict=True)]


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
