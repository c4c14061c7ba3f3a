"""Prompts in an endless stream -> the groups of each step that carry a signal.

All that a collector has is one list, `waiting`: groups that were rolled out and not trained on yet. Collecting adds to
it until enough of them teach something; those too many begin the next step; a stop in between, a checkpoint and a
resume are that list and the stream's place.

Groups whose rewards are all equal have no gradient; with dynamic sampling they are dropped, counted, and replaced by
groups of further prompts, a limited number of times. Likewise, where asked for, groups without a right completion, and
those in which some reward hardly varies.

Source: DAPO (arXiv 2503.14476), section 3.2; LightningRL for the further reasons.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dirl.config import bounded
from dirl.data.prompt_stream import PromptStream, fingerprint
from dirl.data.rows import shorten
from dirl.errors import UserError
from dirl.reward.rubric import Rubric
from dirl.rl.rollout_group import Prompt, RolloutGroup, ThresholdChoice
from dirl.rl.threshold_policy import ThresholdConfig, ThresholdPolicy
from dirl.rollout.engine import EngineConfig, RolloutEngine, SamplingConfig
from dirl.rollout.scoring import score
from dirl.training.balance import balanced_owners
from dirl.training.distributed import Distributed
from dirl.training.interruption import StopAsked
from dirl.training.loop import NothingToLearn
from dirl.training.metrics import Timings
from dirl.training.seeds import stable_seed

# Why a group is not trained on: equal rewards; `needs_right`; `min_spread`.
DropReason = Literal["equal_rewards", "none_right", "small_spread"]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(SamplingConfig, EngineConfig, ThresholdConfig):
    """What is rolled out for one optimizer step, and how."""

    prompts_per_step: int = bounded(32, least=1)  # groups in a global batch
    num_generations: int = bounded(8, least=2)  # completions a group: a baseline needs two
    dynamic_sampling: bool = True  # drop groups whose rewards are all equal and roll out others for them
    max_sampling_rounds: int = bounded(2, least=1)  # rollout rounds a step may take to fill its batch; 1: never again
    # prompts taken per group still missing; what is then too much goes to the next step
    oversampling: float = bounded(1.0, least=1)
    needs_right: bool = False  # also drop groups without a right completion
    # also drop groups in which a reward function's values differ by less: LightningRL has {tokens_per_step: 0.01}
    min_spread: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        if (self.needs_right or any(self.min_spread.values())) and not self.dynamic_sampling:
            raise UserError("needs_right and min_spread drop groups: they need dynamic_sampling=true")
        if self.threshold_policy and self.unmasking_strategy != "low_confidence_dynamic":
            raise UserError(
                f"threshold_policy needs unmasking_strategy=low_confidence_dynamic: {self.unmasking_strategy} has no "
                "threshold"
            )
        if self.threshold_policy and self.engine == "lmdeploy":
            raise UserError("threshold_policy: LMDeploy has one for all completions; set rollout.engine=torch")

    def reason_to_drop(self, group: RolloutGroup) -> DropReason | None:
        """The first reason not to train on a group; None: it teaches."""
        if not self.dynamic_sampling:
            return None
        if not group.is_informative:
            return "equal_rewards"
        if self.needs_right and group.num_right == 0:
            return "none_right"
        is_flat = any(least > 0 and group.spread(part) < least for part, least in self.min_spread.items())
        return "small_spread" if is_flat else None


@dataclass(frozen=True)
class TakenPrompt:
    """A prompt of the stream that is to be rolled out."""

    prompt: Prompt
    number: int  # counting all that the run has taken from the stream
    seed: int


class Rollouts:
    """Prompts of the stream -> scored groups, by one engine and one rubric."""

    def __init__(
        self,
        engine: RolloutEngine,
        rubric: Rubric,
        config: RolloutConfig,
        timings: Timings,
        cost_shape: tuple[int, int],  # block length and hidden size of the model that is trained
        thresholds: ThresholdPolicy | None = None,
    ) -> None:
        self.engine, self.rubric, self.config, self.timings = engine, rubric, config, timings
        self.cost_shape, self.thresholds = cost_shape, thresholds

    def roll_out(self, taken: Sequence[TakenPrompt], step: int) -> tuple[list[RolloutGroup], dict[str, int]]:
        """A group for each, in order, and how often the grader gave each verdict."""
        size = self.config.num_generations
        with self.timings.phase("rollout"):
            choices, thresholds = self._thresholds(taken)
            completions = self.engine.generate(
                [one.prompt.token_ids for one in taken for _ in range(size)],
                self.config,
                [stable_seed(one.seed, sample) for one in taken for sample in range(size)],
                thresholds,
            )
        with self.timings.phase("reward"):
            scores = score(
                self.rubric,
                [one.prompt.problem for one in taken for _ in range(size)],
                completions,
                max_completion_length=self.config.max_completion_length,
                group_size=size,
            )
        groups = [
            RolloutGroup(
                prompt=one.prompt,
                completions=list(completions[start : start + size]),
                rewards=scores.total[start : start + size],
                reward_parts={name: values[start : start + size] for name, values in scores.parts.items()},
                step_rewards=scores.by_step[start : start + size],
                number=one.number,
                seed=one.seed,
                sampled_at=step,
                threshold_choice=choice,
            )
            for start, one, choice in zip(range(0, len(completions), size), taken, choices, strict=True)
        ]
        return groups, scores.counters

    def _thresholds(self, taken: Sequence[TakenPrompt]) -> tuple[Sequence[ThresholdChoice | None], list[float] | None]:
        """What is chosen for each group, and with it the threshold of each completion, where there is a policy."""
        if self.thresholds is None:
            return [None] * len(taken), None
        prompts, seeds = [one.prompt.token_ids for one in taken], [one.seed for one in taken]
        choices = self.thresholds.draw(prompts, seeds, self.config.num_generations)
        return choices, [self.thresholds.thresholds[index] for choice in choices for index in choice.indices]

    def cost(self, group: RolloutGroup) -> float:
        """Estimated work of training on it."""
        return group.replay_cost(*self.cost_shape)


class NoSignal(NothingToLearn):
    """No group of a step taught anything."""


@dataclass(frozen=True)
class Collected:
    """What one step's rollouts gave on this rank."""

    groups: list[RolloutGroup]  # to train on
    dropped: list[RolloutGroup]  # not trained on
    drop_reasons: list[DropReason]  # of each of these
    counters: dict[str, int]  # of the graders: timeouts, crashes, ...
    num_carried: int  # informative groups that were too many, over all ranks: the next step begins with them

    @property
    def everyone(self) -> list[RolloutGroup]:
        """All groups, those that are trained on first."""
        return [*self.groups, *self.dropped]


class Collector:
    """Takes prompts from the stream, has them rolled out and keeps the groups worth training on.

    Args:
        should_stop: asked before each round; the same on every rank.
        remember: groups that must wait for the next step -> the same, with what the weights that sampled them give
            their actions; called while these weights are still there, on every rank.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        rollouts: Rollouts,
        distributed: Distributed,
        seed: int,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        remember: Callable[[Sequence[RolloutGroup]], list[RolloutGroup]] = list,
    ) -> None:
        self.prompts, self.rollouts, self.distributed, self.seed = prompts, rollouts, distributed, seed
        self.config = rollouts.config
        data = fingerprint((p.token_ids, p.problem.answer, p.problem.columns) for p in prompts)
        self.stream = PromptStream(len(prompts), seed, data)
        self.waiting: list[RolloutGroup] = []  # rolled out on this rank and not trained on yet
        self._num_taken = 0
        self._num_rounds = 0  # of the step that is being collected
        self._counters: Counter[str] = Counter()
        self._should_stop, self._remember = should_stop, remember

    def begin_stage(self, rollouts: Rollouts, from_step: int) -> None:
        """Roll out like this from now on; groups that wait and were sampled in an earlier stage are given up.

        Args:
            from_step: finished optimizer steps at which the stage begins.
        """
        self.rollouts, self.config = rollouts, rollouts.config
        self.waiting = [group for group in self.waiting if group.sampled_at >= from_step]

    @property
    def is_amid(self) -> bool:
        """Whether a step is half collected."""
        return self._num_rounds > 0

    def collect(self, step: int) -> Collected:
        """This rank's groups of one step's batch; they leave the list. Those too many stay in it.

        Raises:
            StopAsked: it was; the next call goes on from there.
            NoSignal: no group on any rank taught anything after the last round.
        """
        while True:
            num_useful = int(self.distributed.sum(sum(map(self._is_useful, self.waiting)))[0])
            if self._should_stop():
                raise StopAsked
            missing = self.config.prompts_per_step - num_useful
            if missing <= 0 or self._num_rounds >= self.config.max_sampling_rounds:
                break
            self._roll_out_round(step, math.ceil(missing * self.config.oversampling))
        useful = [group for group in self.waiting if self._is_useful(group)]
        dropped = [group for group in self.waiting if not self._is_useful(group)]
        if num_useful == 0:
            self._step_ends([])
            raise NoSignal(
                f"step {step}: the rewards of every group were equal{_further_reasons(self.config)} in "
                f"{self.config.max_sampling_rounds} rounds of {self.config.prompts_per_step} prompts; the problems are "
                f"all too easy or too hard, or the reward is broken{_example(dropped)}"
            )
        groups, waiting, num_carried = self._shared_out(useful)
        reasons = [reason for group in dropped if (reason := self.config.reason_to_drop(group))]
        collected = Collected(groups, dropped, reasons, dict(self._counters), num_carried)
        self._step_ends(self._remember(waiting) if num_carried else waiting)
        return collected

    def state_dict(self) -> dict[str, Any]:
        """The list of every rank, and the place in the stream; collective."""
        index = {id(prompt): number for number, prompt in enumerate(self.prompts)}
        thresholds = self.rollouts.thresholds
        waiting = [group.to_row(index[id(group.prompt)]) for group in self.waiting]
        return {
            "stream": self.stream.state_dict(),
            "num_taken": self._num_taken,
            "num_rounds": self._num_rounds,
            "threshold_policy": thresholds.state_dict() if thresholds else None,
            "ranks": self.distributed.gather([{"waiting": waiting, "counters": dict(self._counters)}]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; with another number of processes than saved it, the groups are shared out anew."""
        self.stream.load_state_dict(state["stream"])
        self._num_taken, self._num_rounds = state["num_taken"], state["num_rounds"]
        if len(state["ranks"]) == self.distributed.world_size:
            mine = state["ranks"][self.distributed.rank]
            rows, self._counters = mine["waiting"], Counter(mine["counters"])
        else:
            rows = self.distributed.share([row for rank in state["ranks"] for row in rank["waiting"]])
            counters = [rank["counters"] for rank in state["ranks"]] if self.distributed.is_main else []
            self._counters = sum(map(Counter, counters), Counter())
        self.waiting = [RolloutGroup.from_row(row, self.prompts) for row in rows]
        self._load_thresholds(state.get("threshold_policy"))

    def _load_thresholds(self, state: dict[str, Any] | None) -> None:
        policy = self.rollouts.thresholds
        theirs, ours = state["thresholds"] if state else [], policy.thresholds if policy else []
        if theirs != ours:  # what groups that wait have chosen is numbers of these
            raise UserError(
                f"rollout.threshold_policy={ours}: the checkpoint was written with {theirs}; resume with that, or set "
                "resume_from_checkpoint=none to start afresh"
            )
        if policy and state:
            policy.load_state_dict(state)

    def _step_ends(self, waiting: list[RolloutGroup]) -> None:
        """Last of all: what fails before leaves a step that is half collected."""
        self.waiting, self._counters, self._num_rounds = waiting, Counter(), 0

    def _is_useful(self, group: RolloutGroup) -> bool:
        return self.config.reason_to_drop(group) is None

    def _roll_out_round(self, step: int, num_prompts: int) -> None:
        taken = [
            TakenPrompt(self.prompts[index], self._num_taken + n, stable_seed(self.seed, step, self._num_rounds, n))
            for n, index in enumerate(self.stream.take(num_prompts))
        ]
        self._num_taken += num_prompts
        groups, counters = self.rollouts.roll_out(self.distributed.share(taken), step)
        self.waiting = [*self.waiting, *groups]
        self._counters.update(counters)
        self._num_rounds += 1

    def _shared_out(self, groups: list[RolloutGroup]) -> tuple[list[RolloutGroup], list[RolloutGroup], int]:
        """This rank's fair share of the earliest groups, those too many on it, and how many are too many on all.

        Only the groups that move travel, and everyone computes the same plan.
        """
        rank, world_size = self.distributed.rank, self.distributed.world_size
        plan = sorted(self.distributed.gather([(group.number, self.rollouts.cost(group), rank) for group in groups]))
        plan, surplus = plan[: self.config.prompts_per_step], plan[self.config.prompts_per_step :]
        owners = balanced_owners([cost for _, cost, _ in plan], [owner for _, _, owner in plan], world_size)
        new_owner = {number: owner for (number, _, _), owner in zip(plan, owners, strict=True)}
        waiting = [group for group in groups if group.number not in new_owner]
        mine = [group for group in groups if new_owner.get(group.number) == rank]
        leaving = [g for g in groups if g.number in new_owner and new_owner[g.number] != rank]
        if world_size > 1:
            mine += [group for group in self.distributed.gather(leaving) if new_owner[group.number] == rank]
        return sorted(mine, key=lambda group: group.number), waiting, len(surplus)


def _further_reasons(config: RolloutConfig) -> str:
    """What else may have dropped groups, for a message."""
    further = {"needs_right": config.needs_right, "min_spread": bool(config.min_spread)}
    names = [f"rollout.{name}" for name, is_set in further.items() if is_set]
    return f", or {' or '.join(names)} dropped it," if names else ""


def _example(groups: Sequence[RolloutGroup]) -> str:
    """One completion, for a message."""
    if not groups:
        return ""
    problem, completion = groups[0].prompt.problem, groups[0].completions[0]
    return (
        f"; for example {shorten(problem.question)} -> {shorten(completion.text)}, gold {shorten(problem.answer)}, "
        f"reward {groups[0].rewards[0]:g}"
    )
