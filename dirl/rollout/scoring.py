"""Problems and their completions -> rewards."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Sequence

from dirl.data.problems import Problem
from dirl.reward.rubric import ARGUMENTS, Rubric, Scores
from dirl.rollout.engine import Completion

logger = logging.getLogger(__name__)


def score(
    rubric: Rubric,
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    *,
    prompts: Sequence[str],
    max_completion_length: int,
    group_size: int = 1,
) -> Scores:
    """Rewards of completions, with everything a reward function may ask for.

    Args:
        problems: the problem of each completion, repeated where it has several.
        prompts: the texts that were put to the model, template and all; the bare question is a column.
        max_completion_length: tokens; what decoding was allowed.
        group_size: completions of one problem, which stand together.
    """
    return rubric.score(
        list(prompts),
        [completion.text for completion in completions],
        completion_ids=[completion.token_ids for completion in completions],
        step_maps=[completion.step_map for completion in completions],
        columns=_reward_columns(problems, completions, max_completion_length),
        group_size=group_size,
    )


def _reward_columns(
    problems: Sequence[Problem], completions: Sequence[Completion], max_completion_length: int
) -> dict[str, list[object]]:
    """The data set's own columns, and what decoding knows; one entry a completion."""
    names = sorted({name for problem in problems for name in problem.columns})
    ours: dict[str, list[object]] = {
        "question": [problem.question for problem in problems],
        "answer": [problem.answer for problem in problems],
        "completion_length": [completion.completion_length for completion in completions],
        "num_denoising_steps": [completion.num_denoising_steps for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "max_completion_length": [max_completion_length] * len(completions),
    }
    for name in names:
        ours[_free_name(name, (*ours, *ARGUMENTS))] = [problem.columns.get(name) for problem in problems]
    return ours


def _free_name(name: str, taken: Collection[str]) -> str:
    """The name that reward functions get a column of the data by: where it is that of another argument, data_NAME."""
    free = name
    while free in taken:
        free = f"data_{free}"
    if free != name:
        _say_renamed(name, free)
    return free


@functools.cache  # once a name and process
def _say_renamed(name: str, free: str) -> None:
    logger.warning(
        "the data's column %r bears the name of something else that rewards get: they get it as %s", name, free
    )
