"""Problems -> groups of scored completions: rollout, reward, and the groups that carry a signal.

A group is scored at birth. Groups whose rewards are all equal have no gradient; with dynamic sampling they are dropped,
counted, and replaced by groups of further prompts, a limited number of times.

Source: DAPO (arXiv 2503.14476), section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import render_prompt
from dirl.data.problems import Problem
from dirl.data.prompt_stream import PromptStream, fingerprint
from dirl.data.rows import shorten
from dirl.errors import UserError
from dirl.reward.rubric import Rubric
from dirl.rl.advantage import has_spread
from dirl.rollout.engine import Completion, EngineConfig, RolloutEngine, SamplingConfig
from dirl.rollout.scoring import score, stable_seed
from dirl.training.balance import balanced_owners, packed_cost
from dirl.training.distributed import Distributed
from dirl.training.metrics import Timings


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(SamplingConfig, EngineConfig):
    """What is rolled out for one optimizer step, and how."""

    prompts_per_step: int = 32  # groups in a global batch
    num_generations: int = 8  # completions a group
    dynamic_sampling: bool = True  # drop groups whose rewards are all equal and draw others for them
    max_sampling_rounds: int = 2  # rollout rounds a step may take to fill its batch; 1: never draw again
    oversampling: float = 1.0  # prompts drawn per group still missing; what is then too much goes to the next step

    def __post_init__(self) -> None:
        SamplingConfig.__post_init__(self)
        EngineConfig.__post_init__(self)
        if self.num_generations < 2:
            raise UserError(f"num_generations must be at least 2 to form a group baseline, got {self.num_generations}")
        for key in ("prompts_per_step", "max_sampling_rounds", "oversampling"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, got {getattr(self, key)}")


class StopAsked(Exception):
    """The run was asked to stop before the update; what was rolled out is kept."""


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
    draw: int = 0  # place in the order of all prompts the run has drawn
    sampled_at: int = 0  # optimizer steps the weights it was sampled with had taken

    @property
    def reward_G(self) -> Tensor:
        return torch.tensor(self.rewards, dtype=torch.float32)

    @property
    def is_informative(self) -> bool:
        return has_spread(self.reward_G)

    def replay_cost(self, block_length: int, hidden_size: int) -> float:
        """Estimated work of training on the group; a view is one block, at each denoising step."""
        lengths = [(len(c.token_ids), c.num_denoising_steps * block_length) for c in self.completions]
        return packed_cost(len(self.prompt.token_ids), lengths, hidden_size)


@dataclass(frozen=True)
class Collected:
    """What one step's rollouts gave on this rank."""

    groups: list[RolloutGroup]  # to train on
    dropped: list[RolloutGroup]  # no spread in the rewards
    counters: dict[str, int]  # of the graders: timeouts, crashes, ...
    num_carried: int = 0  # informative groups that were too many, over all ranks: the next step begins with them

    def is_on_policy(self, step: int) -> bool:
        """Whether all of this rank's groups were sampled with the weights of `step`."""
        return all(group.sampled_at == step for group in self.groups)


@dataclass
class Harvest:
    """What a step's rollout rounds have given so far on this rank: a stop in between must not lose it."""

    groups: list[RolloutGroup]
    dropped: list[RolloutGroup] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    num_rounds: int = 0


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
        data = fingerprint((p.token_ids, p.problem.answer, p.problem.columns) for p in prompts)
        self.stream = PromptStream(len(prompts), seed, data)
        self.cost: Callable[[RolloutGroup], float] = lambda group: float(sum(map(_length, group.completions)))
        self.should_stop: Callable[[], bool] = lambda: False  # asked before each round; the same on every rank
        self.carried: list[RolloutGroup] = []  # too many for the last step
        self.harvest: Harvest | None = None  # of the step that is going on, until `finish`
        self.num_drawn = 0

    @property
    def is_amid(self) -> bool:
        """Whether rollouts are kept that have not been trained on yet."""
        return self.harvest is not None

    def collect(self, step: int, distributed: Distributed, timings: Timings) -> Collected:
        """This rank's groups of one step's batch.

        Raises:
            StopAsked: it was; what there is is kept, and the next call goes on from there.
            NoSignal: no group on any rank had differing rewards after the last round.
        """
        harvest = self.harvest = self.harvest or Harvest(self.carried)
        self.carried = []
        while True:
            num_groups = int(distributed.sum(len(harvest.groups))[0])
            if self.should_stop():
                raise StopAsked
            missing = self.config.prompts_per_step - num_groups
            if missing <= 0 or harvest.num_rounds == self.config.max_sampling_rounds:
                break
            self._roll_out_round(step, math.ceil(missing * self.config.oversampling), distributed, timings)
        if num_groups == 0:
            self.finish()
            raise NoSignal(
                f"step {step}: the rewards of every group were equal in {self.config.max_sampling_rounds} rounds of "
                f"{self.config.prompts_per_step} prompts; the problems are all too easy or too hard, or the reward is "
                f"broken{_example(harvest.dropped)}"
            )
        groups, num_carried = self._shared_out(harvest.groups, distributed)
        return Collected(groups, harvest.dropped, harvest.counters, num_carried)

    def finish(self) -> None:
        """The step's groups have been trained on; those too many stay for the next."""
        self.harvest = None

    def _roll_out_round(self, step: int, num_prompts: int, distributed: Distributed, timings: Timings) -> None:
        harvest = self.harvest
        assert harvest is not None
        drawn = [
            (self.prompts[index], self.num_drawn + n, stable_seed(self.seed, step, harvest.num_rounds, n))
            for n, index in enumerate(self.stream.take(num_prompts))
        ]
        self.num_drawn += num_prompts
        for group in self._roll_out(distributed.share(drawn), step, timings, harvest.counters):
            keep = group.is_informative or not self.config.dynamic_sampling
            (harvest.groups if keep else harvest.dropped).append(group)
        harvest.num_rounds += 1

    def _shared_out(self, groups: list[RolloutGroup], distributed: Distributed) -> tuple[list[RolloutGroup], int]:
        """This rank's fair part of the groups that were drawn first; those too many stay on the rank they are on.

        Only the groups that move travel, and everyone computes the same plan.
        """
        plan = sorted(distributed.gather([(group.draw, self.cost(group), distributed.rank) for group in groups]))
        plan, surplus = plan[: self.config.prompts_per_step], plan[self.config.prompts_per_step :]
        owners = balanced_owners([cost for _, cost, _ in plan], [rank for _, _, rank in plan], distributed.world_size)
        new_owner = {draw: owner for (draw, _, _), owner in zip(plan, owners, strict=True)}
        self.carried = [group for group in groups if group.draw not in new_owner]
        mine = [group for group in groups if new_owner.get(group.draw) == distributed.rank]
        leaving = [g for g in groups if g.draw in new_owner and new_owner[g.draw] != distributed.rank]
        if distributed.world_size > 1:
            mine += [group for group in distributed.gather(leaving) if new_owner[group.draw] == distributed.rank]
        return sorted(mine, key=lambda group: group.draw), len(surplus)

    def _roll_out(
        self, prompts: Sequence[tuple[Prompt, int, int]], step: int, timings: Timings, counters: dict[str, int]
    ) -> list[RolloutGroup]:
        num_generations = self.config.num_generations
        with timings.phase("rollout"):
            completions = self.engine.generate(
                [prompt.token_ids for prompt, _, _ in prompts for _ in range(num_generations)],
                self.config,
                [stable_seed(seed, sample) for _, _, seed in prompts for sample in range(num_generations)],
            )
        with timings.phase("reward"):
            groups = self._score([prompt for prompt, _, _ in prompts], completions, counters)
        return [replace(group, draw=draw, sampled_at=step) for group, (_, draw, _) in zip(groups, prompts, strict=True)]

    def _score(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion], counters: dict[str, int]
    ) -> list[RolloutGroup]:
        size = self.config.num_generations
        repeated = [prompt.problem for prompt in prompts for _ in range(size)]
        limit = self.config.max_completion_length
        scores = score(self.rubric, repeated, completions, max_completion_length=limit, group_size=size)
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


def _length(completion: Completion) -> int:
    return len(completion.token_ids)


def _example(groups: Sequence[RolloutGroup]) -> str:
    """One completion, for a message."""
    if not groups:
        return ""
    problem, completion = groups[0].prompt.problem, groups[0].completions[0]
    return (
        f"; for example {shorten(problem.question)} -> {shorten(completion.text)}, gold {shorten(problem.answer)}, "
        f"reward {groups[0].rewards[0]:g}"
    )
