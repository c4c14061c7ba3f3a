"""Problems -> groups of scored completions: rollout, reward, and the groups that carry a signal.

A group is scored at birth. Groups whose rewards are all equal have no gradient; with dynamic sampling they are dropped,
counted, and replaced by groups of further prompts, a limited number of times.

Source: DAPO (arXiv 2503.14476), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import render_prompt
from dirl.data.problems import Problem
from dirl.data.prompt_stream import PromptStream
from dirl.errors import UserError
from dirl.reward.rubric import Rubric
from dirl.rl.advantage import has_spread
from dirl.rollout.build import EngineConfig
from dirl.rollout.columns import reward_columns, stable_seed
from dirl.rollout.engine import Completion, RolloutEngine, SamplingConfig
from dirl.training.distributed import Distributed
from dirl.training.metrics import Timings


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(SamplingConfig, EngineConfig):
    """What is rolled out for one optimizer step, and how."""

    prompts_per_step: int = 32  # groups in a global batch
    num_generations: int = 8  # completions a group
    dynamic_sampling: bool = True  # drop groups whose rewards are all equal and draw others for them
    max_sampling_rounds: int = 2  # rollout rounds a step may take to fill its batch; 1: never draw again

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        EngineConfig.__post_init__(self)
        if self.num_generations < 2:
            raise UserError(f"num_generations must be at least 2 to form a group baseline, got {self.num_generations}")
        for key in ("prompts_per_step", "max_sampling_rounds"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}")


class NoSignal(UserError):
    """No group of a step had differing rewards."""


@dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it."""

    problem: Problem
    token_ids: list[int]


@dataclass(frozen=True)
class RolloutGroup:
    """The completions of one prompt with their rewards."""

    prompt: Prompt
    completions: list[Completion]  # (G,)
    rewards: list[float]  # (G,) weighted sums
    reward_parts: dict[str, list[float | None]]  # by reward function, (G,) each; None: did not apply

    @property
    def reward_G(self) -> Tensor:
        return torch.tensor(self.rewards, dtype=torch.float32)

    @property
    def is_informative(self) -> bool:
        return has_spread(self.reward_G)


@dataclass(frozen=True)
class Collected:
    """What one step's rollouts gave on this rank."""

    groups: list[RolloutGroup]  # to train on
    dropped: list[RolloutGroup]  # no spread in the rewards
    counters: dict[str, int]  # of the graders: timeouts, crashes, ...


def render_prompts(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, *, system_prompt: str, suffix: str, max_length: int
) -> tuple[list[Prompt], int]:
    """Prompts of at most `max_length` tokens, and how many longer ones were left out (they are never cut)."""
    prompts = [
        Prompt(problem, render_prompt(tokenizer, problem.question, system_prompt=system_prompt, suffix=suffix))
        for problem in problems
    ]
    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_length]
    return kept, len(prompts) - len(kept)


class Collector:
    """Draws prompts, rolls them out and keeps the groups worth training on."""

    def __init__(
        self, prompts: Sequence[Prompt], engine: RolloutEngine, rubric: Rubric, config: RolloutConfig, seed: int
    ) -> None:
        self.prompts, self.engine, self.rubric, self.config, self.seed = prompts, engine, rubric, config, seed
        self.stream = PromptStream(len(prompts), seed)

    def collect(self, step: int, distributed: Distributed, timings: Timings) -> Collected:
        """This rank's groups of one step's batch.

        Raises:
            NoSignal: no group on any rank had differing rewards after the last round.
        """
        groups: list[RolloutGroup] = []
        dropped: list[RolloutGroup] = []
        counters: dict[str, int] = {}
        missing = self.config.prompts_per_step
        for round_index in range(self.config.max_sampling_rounds):
            drawn = list(enumerate(self.stream.take(missing)))
            mine = [(self.prompts[i], stable_seed(self.seed, step, round_index, n)) for n, i in drawn]
            scored = self._roll_out(distributed.share(mine), timings, counters)
            for group in scored:
                keep = group.is_informative or not self.config.dynamic_sampling
                (groups if keep else dropped).append(group)
            (num_groups,) = distributed.sum(len(groups))
            missing = self.config.prompts_per_step - int(num_groups)
            if missing == 0:
                break
        if missing == self.config.prompts_per_step:
            raise NoSignal(
                f"step {step}: the rewards of every group were equal in {self.config.max_sampling_rounds} rounds of "
                f"{self.config.prompts_per_step} prompts; the problems are all too easy or too hard, or the reward is "
                "broken (see completions/)"
            )
        return Collected(groups, dropped, counters)

    def _roll_out(
        self, prompts: Sequence[tuple[Prompt, int]], timings: Timings, counters: dict[str, int]
    ) -> list[RolloutGroup]:
        num_generations = self.config.num_generations
        with timings.phase("rollout"):
            completions = self.engine.generate(
                [prompt.token_ids for prompt, _ in prompts for _ in range(num_generations)],
                self.config,
                [stable_seed(seed, sample) for _, seed in prompts for sample in range(num_generations)],
            )
        with timings.phase("reward"):
            return self._score([prompt for prompt, _ in prompts], completions, counters)

    def _score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], counters: dict[str, int]
    ) -> list[RolloutGroup]:
        size = self.config.num_generations
        repeated = [prompt.problem for prompt in prompts for _ in range(size)]
        scores = self.rubric.score(
            [problem.question for problem in repeated],
            [completion.text for completion in completions],
            completion_ids=[completion.token_ids for completion in completions],
            step_maps=[completion.step_map for completion in completions],
            columns=reward_columns(repeated, completions, self.config.max_completion_length),
            group_size=size,
        )
        for name, count in scores.counters.items():
            counters[name] = counters.get(name, 0) + count
        return [
            RolloutGroup(
                prompt,
                list(completions[start : start + size]),
                scores.total[start : start + size],
                {name: part[start : start + size] for name, part in scores.parts.items()},
            )
            for start, prompt in zip(range(0, len(completions), size), prompts, strict=True)
        ]
