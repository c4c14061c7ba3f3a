"""Prompts -> groups of scored completions. A group is scored at birth and knows which weights sampled it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import prompt_text, render_prompt
from dirl.data.problems import Problem
from dirl.reward.rubric import right_ones
from dirl.rollout.engine import Completion
from dirl.training.balance import packed_cost, whole_cost


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it."""

    problem: Problem
    token_ids: list[int]
    text: str = ""  # of these, as reward functions see it


@dataclass(frozen=True)
class ThresholdChoice:
    """Which confidence thresholds a group's completions were decoded with, and what the policy that drew them read."""

    indices: list[int]  # (G,) among rollout.threshold_policy
    logprobs: list[float]  # (G,) nats, of these when they were drawn
    state: list[float]  # (D,) of the prompt


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The completions of one prompt with their rewards."""

    prompt: Prompt
    completions: list[Completion]  # (G,)
    rewards: list[float]  # (G,) weighted sums
    reward_parts: dict[str, list[float | None]]  # by reward function, (G,) each; None: did not apply
    step_rewards: list[list[float]] = field(default_factory=list)  # (G,) of each denoising step; empty: none were given
    number: int = 0  # of its prompt, counting all that the run has taken from the stream
    seed: int = 0  # of its prompt in this run
    sampled_at: int = 0  # optimizer steps the weights it was sampled with had taken; the oldest of them
    # (G,) what these weights gave each scored action, in nats; kept where they have moved on since. Else empty.
    behavior_logprobs: list[list[float]] = field(default_factory=list)
    scored_as: str = ""  # which actions these are: `ObjectiveConfig.scored_as`
    threshold_choice: ThresholdChoice | None = None  # None: there is no policy of thresholds

    @property
    def reward_G(self) -> Tensor:
        return torch.tensor(self.rewards, dtype=torch.float32)

    @property
    def is_informative(self) -> bool:
        """Whether the rewards differ. Judged on them: z-scores of equal ones are not zero in floats."""
        return bool(self.reward_G.max() > self.reward_G.min())

    def spread(self, part: str) -> float:
        """Range of a reward function's values in the group; 0 where it applies to none."""
        values = [value for value in self.reward_parts[part] if value is not None]
        return max(values) - min(values) if values else 0.0

    @property
    def is_right(self) -> list[bool]:
        return right_ones(self.reward_parts, self.rewards)

    @property
    def num_right(self) -> int:
        return sum(self.is_right)

    def sampled_at_of(self, completion: Completion) -> list[int]:
        """(R,) Optimizer steps that the weights which sampled each token of one of its completions had taken."""
        return completion.sampled_at or [self.sampled_at] * len(completion.token_ids)

    def of_first(self, count: int) -> RolloutGroup:
        """The group as if it had only so many completions."""
        parts = {name: values[:count] for name, values in self.reward_parts.items()}
        return replace(self, completions=self.completions[:count], rewards=self.rewards[:count], reward_parts=parts)

    def replay_cost(self, block_length: int, hidden_size: int) -> float:
        """Estimated work of training on the group; a view is one block (0: the document), at each denoising step."""
        if block_length == 0:
            return sum(
                whole_cost(len(c.prompt_ids) + len(c.token_ids) + c.num_unwritten, c.num_denoising_steps, hidden_size)
                for c in self.completions
            )
        lengths = [(len(c.token_ids), c.num_denoising_steps * block_length) for c in self.completions]
        return packed_cost(len(self.prompt.token_ids), lengths, hidden_size)

    def to_row(self, prompt_index: int) -> dict[str, Any]:
        """Plain values for a checkpoint, the prompt as its number."""
        names = (
            "rewards",
            "reward_parts",
            "step_rewards",
            "number",
            "seed",
            "sampled_at",
            "behavior_logprobs",
            "scored_as",
        )
        row = {name: getattr(self, name) for name in names}
        completions = [completion_row(completion) for completion in self.completions]
        choice = asdict(self.threshold_choice) if self.threshold_choice else None
        return {"prompt": prompt_index, "completions": completions, "threshold_choice": choice, **row}

    @classmethod
    def from_row(cls, row: dict[str, Any], prompts: Sequence[Prompt]) -> RolloutGroup:
        completions = [completion_from_row(completion) for completion in row["completions"]]
        choice = ThresholdChoice(**chosen) if (chosen := row.get("threshold_choice")) else None
        read = {"prompt": prompts[row["prompt"]], "completions": completions, "threshold_choice": choice}
        return cls(**{**row, **read})


_RECORDED = ("logprobs", "hold_logprobs")  # numbers of an engine


def completion_row(completion: Completion) -> dict[str, Any]:
    """Plain values for a checkpoint: null for what an engine recorded and is no number."""
    recorded = {name: getattr(completion, name) for name in _RECORDED}
    numbers = {
        name: None if values is None else [value if math.isfinite(value) else None for value in values]
        for name, values in recorded.items()
    }
    return {**asdict(completion), **numbers}


def completion_from_row(row: dict[str, Any]) -> Completion:
    recorded = {name: row.get(name) for name in _RECORDED}
    numbers = {
        name: None if values is None else [math.nan if value is None else value for value in values]
        for name, values in recorded.items()
    }
    return Completion(**{**row, **numbers})


def render_prompts(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, *, system_prompt: str, suffix: str, max_length: int
) -> tuple[list[Prompt], int]:
    """Prompts of at most `max_length` tokens, and how many longer ones were left out (they are never cut)."""
    how = {"system_prompt": system_prompt, "suffix": suffix}
    rendered = [(p, render_prompt(tokenizer, p.prompt, tools=p.tools, **how)) for p in problems]
    prompts = [Prompt(problem, token_ids, prompt_text(tokenizer, token_ids)) for problem, token_ids in rendered]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_length]
    return kept, len(prompts) - len(kept)
