"""Prompts of the stream -> scored groups, by one engine and one rubric, and which of them teach something.

Groups whose rewards are all equal have no gradient; with dynamic sampling they are dropped. Likewise, where asked for,
groups of which too many or too few completions are right, and those in which some reward hardly varies.

Source: DAPO (arXiv 2503.14476), section 3.2; TraceRL for the band of pass rates, LightningRL for the other reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from dirl.config import bounded
from dirl.data.problems import check_band, is_within
from dirl.diffusion.packing import DiffusionScheme
from dirl.errors import UserError
from dirl.reward.rubric import Rubric
from dirl.rl.rollout_group import Prompt, RolloutGroup, ThresholdChoice
from dirl.rl.threshold_policy import ThresholdConfig, ThresholdPolicy
from dirl.rollout.engine import Completion, EngineConfig, OpenEngine, RolloutEngine, SamplingConfig
from dirl.rollout.scoring import score
from dirl.training.metrics import Timings
from dirl.training.seeds import stable_seed

# Why a group is not trained on: equal rewards; `needs_right`; `keep_pass_rate`; `min_spread`.
DropReason = Literal["equal_rewards", "none_right", "pass_rate", "small_spread"]


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
    # also drop groups whose share of right completions lies outside [low, high]: TraceRL has [0.2, 0.8]; empty: none
    keep_pass_rate: list[float] = field(default_factory=list, metadata={"least": 0, "most": 1})
    # how many versions older than the trainer's the weights may be that sampled a group; as many rounds of prompts are
    # rolled out while the trainer trains. 0: none, trainer and engine take turns
    max_staleness: int = bounded(0, least=0)
    # a step's rollouts end when its batch is full, and what is unfinished goes on in the next step, with its weights
    partial: bool = False
    # partial: how many versions older than the newest the weights may be that began a group before it is waited for
    max_partial_age: int = bounded(4, least=1)
    # also drop groups in which a reward function's values differ by less: LightningRL has {tokens_per_step: 0.01}
    min_spread: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        self._check_filters()
        if self.threshold_policy and self.unmasking_strategy != "low_confidence_dynamic":
            raise UserError(
                f"threshold_policy needs unmasking_strategy=low_confidence_dynamic: {self.unmasking_strategy} has no "
                "threshold"
            )
        if self.threshold_policy and self.max_staleness:
            raise UserError("threshold_policy is trained between rollouts: it needs max_staleness=0")
        if self.threshold_policy and self.engine == "lmdeploy":
            raise UserError("threshold_policy: LMDeploy has one for all completions; set rollout.engine=torch")
        if self.partial:
            self._check_partial()

    def _check_filters(self) -> None:
        size, is_dropping = self.num_generations, self.needs_right or any(self.min_spread.values())
        if (is_dropping or self.keep_pass_rate) and not self.dynamic_sampling:
            raise UserError("needs_right, keep_pass_rate and min_spread drop groups: they need dynamic_sampling=true")
        check_band("keep_pass_rate", self.keep_pass_rate)
        if not any(is_within(right / size, self.keep_pass_rate) for right in range(1, size)):
            raise UserError(
                f"keep_pass_rate={self.keep_pass_rate} keeps no group of num_generations={size} in which some "
                "completions are right and some wrong: their shares go by "
                f"1/{size}; widen it, or raise num_generations"
            )

    def _check_partial(self) -> None:
        if self.oversampling == 1:
            raise UserError(
                "rollout.partial=true with rollout.oversampling=1 has every prompt in flight waited for; set "
                "oversampling=2 or so: prompts in flight per group that a step needs"
            )
        against = {
            f"max_staleness={self.max_staleness}": self.max_staleness > 0,
            "threshold_policy": bool(self.threshold_policy),
            "mode=server": self.mode == "server",
            "engine=lmdeploy": self.engine == "lmdeploy",
        }
        if refused := [f"rollout.{key}" for key, is_set in against.items() if is_set]:
            raise UserError(f"rollout.partial=true cannot go with {refused[0]}; remove one of them")

    def reason_to_drop(self, group: RolloutGroup) -> DropReason | None:
        """The first reason not to train on a group; None: it teaches."""
        if not self.dynamic_sampling:
            return None
        if not group.is_informative:
            return "equal_rewards"
        if self.needs_right and group.num_right == 0:
            return "none_right"
        if not is_within(group.num_right / len(group.rewards), self.keep_pass_rate):
            return "pass_rate"
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
        shape: tuple[DiffusionScheme, int],  # how the model that is trained reads masks, and its hidden size
        thresholds: ThresholdPolicy | None = None,
    ) -> None:
        if config.partial and not (isinstance(engine, OpenEngine) and shape[0].block_length):
            raise UserError(
                "rollout.partial=true goes on behind blocks that were decoded before: it needs a model of block-causal "
                "attention and rollout.engine=torch; set these, or partial=false"
            )
        self.engine, self.rubric, self.config, self.timings = engine, rubric, config, timings
        (self.scheme, self.hidden_size), self.thresholds = shape, thresholds

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
        return self.scored(taken, completions, step, choices)

    def scored(
        self,
        taken: Sequence[TakenPrompt],
        completions: Sequence[Completion],
        sampled_at: int,
        choices: Sequence[ThresholdChoice | None],
    ) -> tuple[list[RolloutGroup], dict[str, int]]:
        """The groups that completions make, G for each prompt, and how often the grader gave each verdict."""
        size = self.config.num_generations
        with self.timings.phase("reward"):
            scores = score(
                self.rubric,
                [one.prompt.problem for one in taken for _ in range(size)],
                completions,
                prompts=[one.prompt.text for one in taken for _ in range(size)],
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
                sampled_at=sampled_at,
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
        return group.replay_cost(self.scheme.block_length, self.hidden_size)
