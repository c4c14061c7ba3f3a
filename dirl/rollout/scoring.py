"""Problems and their completions -> the columns every reward function may ask for."""

from __future__ import annotations

from collections.abc import Sequence

from dirl.data.problems import Problem
from dirl.rollout.engine import Completion


def reward_columns(
    problems: Sequence[Problem], completions: Sequence[Completion], max_completion_length: int
) -> dict[str, list[object]]:
    """The data set's own columns, and what decoding knows; one entry a completion.

    Args:
        problems: the problem of each completion, repeated where it has several.
    """
    names = sorted({name for problem in problems for name in problem.columns})
    columns: dict[str, list[object]] = {name: [p.columns.get(name) for p in problems] for name in names}
    return columns | {
        "answer": [problem.answer for problem in problems],
        "completion_length": [completion.completion_length for completion in completions],
        "num_denoising_steps": [completion.num_denoising_steps for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "max_completion_length": [max_completion_length] * len(completions),
    }
