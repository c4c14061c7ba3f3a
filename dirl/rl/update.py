"""Scored groups -> optimizer steps on the clipped surrogate: the U in the loop.

Strictly on-policy (one step per rollout) the behaviour log-probabilities are the policy's own, detached: ratios are 1
by construction and no second pass is needed. With several steps per rollout they are those the engine recorded; for
actions it recorded none of (holds) they come from one pass before the first step.

Shapes: T actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from dirl.diffusion.likelihood import Likelihood, ScoringRule
from dirl.diffusion.views import PackedViews, placeholder_pack
from dirl.model.logprobs import ActionScores
from dirl.model.sdar import BlockDiffusionModel
from dirl.rl.policy_batch import PolicyBatch, ScoredCompletion, build_policy_batches, pack_policy_batches
from dirl.rl.policy_loss import PolicyLossConfig, policy_loss
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

    def __post_init__(self) -> None:
        PolicyLossConfig.__post_init__(self)
        for key in ("num_iterations", "steps_per_generation"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")

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
)


class ActionStatistics:
    """Sums over the actions of a step, on this rank."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.largest_difference = 0.0

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)


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
        is_on_policy = is_on_policy and config.steps_per_rollout == 1
        minibatches = [
            self._with_behavior(self._micro_batches(groups[part], advantages[part]), is_on_policy=is_on_policy)
            for part in _parts(len(groups), config.steps_per_generation)
        ]
        statistics = ActionStatistics()
        steps: list[dict[str, float]] = []
        for _ in range(config.num_iterations):
            for micro_batches in minibatches:
                # Only before the first step are these still the weights that the engine sampled with.
                compares = not steps
                losses = [partial(self._loss, *pair, statistics, compares=compares) for pair in micro_batches]
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

    def _with_behavior(
        self, batches: Sequence[PolicyBatch], *, is_on_policy: bool
    ) -> Sequence[tuple[PolicyBatch, Tensor | None]]:
        """Each batch with the log-probabilities of the policy that sampled it; None: it is the one that is trained."""
        if is_on_policy:
            return [(batch, None) for batch in batches]
        with torch.no_grad():
            return [(batch, self._behavior(batch)) for batch in self._evened(batches)][: len(batches)]

    def _behavior(self, batch: PolicyBatch) -> Tensor:
        recorded_T = batch.recorded_logprob_T
        if not self.distributed.is_sharded and not bool(recorded_T.isnan().any()):
            return recorded_T
        scored_T = self.learner.module(batch.packed, self.rule).logprob_T
        return torch.where(recorded_T.isnan(), scored_T, recorded_T)

    def _evened(self, batches: Sequence[PolicyBatch]) -> list[PolicyBatch]:
        """As many on every rank where forward passes are collective."""
        config = self._model().config
        packed = placeholder_pack(config.block_size, config.mask_token_id)
        none_T = torch.full((len(packed.target_T),), torch.nan)
        filler = PolicyBatch(packed, none_T, none_T, none_T).to(self.distributed.device)
        return self.distributed.evened(batches, filler)

    def _loss(
        self, batch: PolicyBatch, behavior_T: Tensor | None, statistics: ActionStatistics, *, compares: bool
    ) -> Tensor:
        ref_logprob_T = None
        if self.reference is not None:
            with torch.no_grad():
                ref_logprob_T = self.reference(batch.packed, self.rule).logprob_T
        scores = self.learner.module(batch.packed, self.rule)
        logprob_T = scores.logprob_T
        behavior_T = logprob_T.detach() if behavior_T is None else behavior_T
        result = policy_loss(logprob_T, behavior_T, batch.advantage_T, batch.coefficient_T, self.config, ref_logprob_T)
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
            self._compare_with_engine(
                logprob_T.detach()[is_reveal_T], batch.recorded_logprob_T[is_reveal_T], statistics
            )
        return result.loss

    def _compare_with_engine(self, logprob_T: Tensor, recorded_T: Tensor, statistics: ActionStatistics) -> None:
        difference_T = (logprob_T - recorded_T)[~recorded_T.isnan()].abs()
        if len(difference_T):
            statistics.add(compared=len(difference_T), difference=difference_T.sum())
            statistics.largest_difference = max(statistics.largest_difference, float(difference_T.max()))

    def _action_metrics(self, statistics: ActionStatistics) -> dict[str, float]:
        total = dict(zip(_SUMMED, self.distributed.sum(*(statistics.sums.get(n, 0.0) for n in _SUMMED)), strict=True))
        largest = self.distributed.max(statistics.largest_difference)
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
        if total["compared"]:
            metrics["sampling/logp_difference/mean"] = total["difference"] / total["compared"]
            metrics["sampling/logp_difference/max"] = largest
        return metrics

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
