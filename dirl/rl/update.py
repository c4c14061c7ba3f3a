"""Scored groups -> optimizer steps on the clipped surrogate: the U in the loop.

Strictly on-policy (one step per rollout) the behaviour log-probabilities are the policy's own, detached: ratios are 1
by construction and no second pass is needed. With several steps per rollout they are those the engine recorded; a pass
before the first step gives those that it did not record (of holds), or all of them where
`importance_sampling_correction` weighs the engine's against the trainer's.

What engine and trainer give the same token differs a little. The difference is measured at the first step of each batch
of rollouts, corrected where `importance_sampling_correction` says so, and ends the run where it is too large to be
rounding: then the engine does not hold the trainer's weights.

Shapes: T actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dirl.diffusion.likelihood import Likelihood, ScoringRule
from dirl.diffusion.views import PackedViews, placeholder_pack
from dirl.errors import UserError
from dirl.model.logprobs import ActionScores
from dirl.model.sdar import BlockDiffusionModel
from dirl.rl.actions import PolicyBatch, ScoredCompletion, build_policy_batches, pack_policy_batches
from dirl.rl.policy_loss import PolicyLossConfig, importance_weights, policy_loss
from dirl.rl.rollout_group import RolloutGroup
from dirl.training.optimizer import Learner

# Scores under the policy that training started from: a frozen copy, or the policy with its adapters off.
Reference = Callable[[PackedViews, ScoringRule], ActionScores]


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(PolicyLossConfig):
    """How a batch of rollouts becomes optimizer steps."""

    likelihood: Likelihood = "reveal"  # trajectory: with the probability of which positions were revealed
    num_iterations: int = 1  # passes over a batch of rollouts
    steps_per_generation: int = 1  # optimizer steps a pass is split into
    max_logp_difference: float = 0.5  # nats; a larger mean |trainer - engine| over a batch ends the run. 0: never

    def __post_init__(self) -> None:
        PolicyLossConfig.__post_init__(self)
        for key in ("num_iterations", "steps_per_generation"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if self.max_logp_difference < 0:
            raise ValueError(f"max_logp_difference must be >= 0 nats (0: never stop), got {self.max_logp_difference}")

    @property
    def steps_per_rollout(self) -> int:
        return self.num_iterations * self.steps_per_generation


# What ActionStatistics sums over the ranks' actions; logprobs in nats.
_SUMMED = (
    "actions",
    "reveals",
    "entropy",
    "clipped_low",
    "clipped_high",
    "kl",
    "tokens",  # packed tokens
    "compared",  # actions whose logprob the engine recorded
    "difference",  # |trainer - engine| over these
    "ratio",  # importance-sampling ratio, as the loss uses it, over these
)


class EngineMismatch(UserError):
    """Engine and trainer disagree by more than rounding."""


class ActionStatistics:
    """Sums over the actions of a step, on this rank."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.largest_difference = 0.0
        self.smallest_ratio, self.largest_ratio = math.inf, 0.0

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)


@dataclass(frozen=True)
class PreparedBatch:
    """A micro-batch with what the policy that sampled it thought of its actions."""

    batch: PolicyBatch
    behavior_logprob_T: Tensor | None  # None: strictly on-policy, the trained policy's own
    importance_T: Tensor | None  # trainer against engine; None: not corrected, or known only in the forward pass


class PolicyUpdater:
    """Turns groups of completions into gradient steps of the learner's policy."""

    def __init__(
        self,
        learner: Learner,
        rule: ScoringRule,
        config: UpdateConfig,
        *,
        max_completion_length: int,
        reference: Reference | None,
    ) -> None:
        self.learner, self.rule, self.config, self.reference = learner, rule, config, reference
        self.max_completion_length = max_completion_length
        self.distributed = learner.distributed

    def update(
        self, groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], *, is_on_policy: bool = True
    ) -> dict[str, float]:
        """All optimizer steps of one batch of rollouts; their mean metrics.

        Args:
            is_on_policy: the weights have not changed since any rank's groups were sampled; the same on every rank.
        """
        config = self.config
        minibatches = [
            self._prepare(
                self._micro_batches(groups[part], advantages[part]),
                is_on_policy=is_on_policy and config.steps_per_rollout == 1,
            )
            for part in _parts(len(groups), config.steps_per_generation)
        ]
        statistics = ActionStatistics()
        steps: list[dict[str, float]] = []
        for _ in range(config.num_iterations):
            for micro_batches in minibatches:
                # Only before the first step are these still the weights that the engine sampled with.
                compares = is_on_policy and not steps
                losses = [partial(self._loss, batch, statistics, compares=compares) for batch in micro_batches]
                steps.append(self.learner.update(losses, self._empty_loss))
        metrics = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        metrics["learning_rate"] = steps[-1]["learning_rate"]
        return metrics | self._action_metrics(statistics)

    def _micro_batches(self, groups: Sequence[RolloutGroup], advantages: Sequence[Tensor]) -> list[PolicyBatch]:
        model = self._model()
        scored: list[list[ScoredCompletion]] = build_policy_batches(
            groups,
            advantages,
            self.distributed,
            loss_type=self.config.loss_type,
            max_completion_length=self.max_completion_length,
        )
        batches = pack_policy_batches(
            scored,
            block_length=model.config.block_size,
            mask_token_id=model.config.mask_token_id,
            likelihood=self.config.likelihood,
            budget=self.learner.config.max_tokens_per_micro_batch,
        )
        return [batch.to(self.distributed.device) for batch in batches]

    def _prepare(self, batches: Sequence[PolicyBatch], *, is_on_policy: bool) -> list[PreparedBatch]:
        """Micro-batches with what must be known of them before the first step.

        Strictly on-policy that is nothing: the policy that is trained is the one that sampled.
        """
        if is_on_policy:
            return [PreparedBatch(batch, None, None) for batch in batches]
        needs_pass = any(self._needs_pass(batch) for batch in batches)
        if self.distributed.is_sharded:  # passes are collective: what one rank needs, all take part in
            needs_pass = self.distributed.max(float(needs_pass)) > 0
        if not needs_pass:
            return [PreparedBatch(batch, batch.recorded_logprob_T, None) for batch in batches]
        with torch.no_grad():
            return [self._prepared(batch) for batch in self._evened(batches)][: len(batches)]

    def _needs_pass(self, batch: PolicyBatch) -> bool:
        """Whether the engine's log-probabilities are to be corrected, or not all there."""
        corrects = self.config.importance_sampling_correction != "none"
        return corrects or bool(batch.recorded_logprob_T.isnan().any())

    def _prepared(self, batch: PolicyBatch) -> PreparedBatch:
        recorded_T = batch.recorded_logprob_T
        if not self._needs_pass(batch) and not self.distributed.is_sharded:
            return PreparedBatch(batch, recorded_T, None)
        scored_T = self.learner.module(batch.packed, self.rule).logprob_T
        if self.config.importance_sampling_correction != "none":
            return PreparedBatch(batch, scored_T, self._importance(batch, scored_T))
        return PreparedBatch(batch, torch.where(recorded_T.isnan(), scored_T, recorded_T), None)

    def _evened(self, batches: Sequence[PolicyBatch]) -> list[PolicyBatch]:
        """As many on every rank where forward passes are collective."""
        config = self._model().config
        packed = placeholder_pack(config.block_size, config.mask_token_id)
        none_T = torch.full((len(packed.target_T),), torch.nan)
        filler = PolicyBatch(packed, none_T, none_T, none_T).to(self.distributed.device)
        return self.distributed.evened(batches, filler)

    def _loss(self, prepared: PreparedBatch, statistics: ActionStatistics, *, compares: bool) -> Tensor:
        batch, behavior_T, importance_T = prepared.batch, prepared.behavior_logprob_T, prepared.importance_T
        ref_logprob_T = None
        if self.reference is not None:
            with torch.no_grad():
                ref_logprob_T = self.reference(batch.packed, self.rule).logprob_T
        scores = self.learner.module(batch.packed, self.rule)
        logprob_T = scores.logprob_T
        if behavior_T is None:
            behavior_T = logprob_T.detach()
            importance_T = self._importance(batch, behavior_T)
        result = policy_loss(
            logprob_T, behavior_T, batch.advantage_T, batch.coefficient_T, self.config, ref_logprob_T, importance_T
        )
        is_reveal_T = batch.packed.is_reveal_T
        statistics.add(
            actions=len(logprob_T),
            reveals=is_reveal_T.sum(),
            entropy=scores.entropy_T[is_reveal_T].sum(),
            clipped_low=result.clipped_low,
            clipped_high=result.clipped_high,
            kl=result.kl,
            tokens=len(batch.packed),
        )
        if compares:
            self._compare_with_engine(batch, logprob_T.detach(), importance_T, statistics)
        return result.loss

    def _importance(self, batch: PolicyBatch, trainer_logprob_T: Tensor) -> Tensor | None:
        """None: not corrected."""
        config = self.config
        if config.importance_sampling_correction == "none":
            return None
        return importance_weights(
            trainer_logprob_T,
            batch.recorded_logprob_T,
            batch.packed.branch_T,
            config.importance_sampling_correction,
            config.importance_sampling_clip_max,
        )

    def _compare_with_engine(
        self, batch: PolicyBatch, logprob_T: Tensor, importance_T: Tensor | None, statistics: ActionStatistics
    ) -> None:
        is_compared_T = ~batch.recorded_logprob_T.isnan()
        difference_T = (logprob_T - batch.recorded_logprob_T)[is_compared_T]
        if len(difference_T) == 0:
            return
        ratio_T = difference_T.exp() if importance_T is None else importance_T[is_compared_T]
        statistics.add(compared=len(difference_T), difference=difference_T.abs().sum(), ratio=ratio_T.sum())
        statistics.largest_difference = max(statistics.largest_difference, float(difference_T.abs().max()))
        statistics.smallest_ratio = min(statistics.smallest_ratio, float(ratio_T.min()))
        statistics.largest_ratio = max(statistics.largest_ratio, float(ratio_T.max()))

    def _action_metrics(self, statistics: ActionStatistics) -> dict[str, float]:
        total = dict(zip(_SUMMED, self.distributed.sum(*(statistics.sums.get(n, 0.0) for n in _SUMMED)), strict=True))
        actions = max(total["actions"], 1.0)
        metrics = {
            "entropy": total["entropy"] / max(total["reveals"], 1.0),
            "clip_ratio/low_mean": total["clipped_low"] / actions,
            "clip_ratio/high_mean": total["clipped_high"] / actions,
            "clip_ratio/region_mean": (total["clipped_low"] + total["clipped_high"]) / actions,
            "num_tokens": total["tokens"],
        }
        if self.reference is not None:
            metrics["kl"] = total["kl"] / actions
        return metrics | self._mismatch_metrics(statistics, total)

    def _mismatch_metrics(self, statistics: ActionStatistics, total: dict[str, float]) -> dict[str, float]:
        """Trainer minus engine, over all ranks; collective.

        Raises:
            EngineMismatch: the mean difference is above `max_logp_difference`; on every rank alike.
        """
        if not total["compared"]:
            return {}
        mean, limit = total["difference"] / total["compared"], self.config.max_logp_difference
        if limit and not mean <= limit:  # NaN is too large as well
            raise EngineMismatch(
                f"max_logp_difference={limit}: trainer and engine differ by {mean:.3g} nats a token on average, so the "
                "engine does not hold the trainer's weights, or decodes by other rules; check rollout.* and the engine"
            )
        return {
            "sampling/logp_difference/mean": mean,
            "sampling/logp_difference/max": self.distributed.max(statistics.largest_difference),
            "sampling/importance_sampling_ratio/min": self.distributed.min(statistics.smallest_ratio),
            "sampling/importance_sampling_ratio/mean": total["ratio"] / total["compared"],
            "sampling/importance_sampling_ratio/max": self.distributed.max(statistics.largest_ratio),
        }

    def _empty_loss(self) -> Tensor:
        """Zero with a gradient of zero for every parameter, for a rank that has no completions left."""
        config = self._model().config
        packed = placeholder_pack(config.block_size, config.mask_token_id).to(self.distributed.device)
        if self.reference is not None and self.distributed.is_sharded:  # the other ranks' passes wait for this one's
            with torch.no_grad():
                self.reference(packed, self.rule)
        return self.learner.module(packed, self.rule).logprob_T.sum() * 0.0

    def _model(self) -> BlockDiffusionModel:
        return self.distributed.unwrap(self.learner.module).model


def _parts(count: int, num_parts: int) -> Iterator[slice]:
    """Contiguous slices that differ by at most one item."""
    bounds = [count * i // num_parts for i in range(num_parts + 1)]
    return (slice(start, end) for start, end in pairwise(bounds))
