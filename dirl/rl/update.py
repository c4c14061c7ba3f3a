"""Scored groups -> optimizer steps on the objective.

Strictly on-policy (one optimizer step per batch of rollouts) the behaviour of fresh actions is the policy's own: ratios
are 1 by construction and no second pass is needed. With several steps per batch, and for groups that had to wait while
the weights moved on, it is what the weights that sampled an action gave it.

What engine and trainer give the same token differs a little. The difference is measured at the first step of each batch
of rollouts, corrected where `importance_sampling_correction` says so, and ends the run where it is too large to be
rounding: then the engine does not hold the trainer's weights.

Shapes: G completions of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from torch import Tensor

from dirl.config import Config, bounded
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import PackedViews
from dirl.diffusion.views import placeholder_pack
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import ActionScores
from dirl.rl.actions import PolicyBatch, annotate, refuse_unknown, scores_of, with_advantages, with_coefficients
from dirl.rl.critic import Critic, CriticConfig, critic_metrics
from dirl.rl.gauge import gauge, gauged_over_ranks
from dirl.rl.micro_batches import Layout, pack_groups
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.policy_loss import policy_loss
from dirl.rl.ratios import Elsewhere, elsewhere, has_sequences
from dirl.rl.rollout_group import RolloutGroup
from dirl.rl.update_metrics import update_metrics
from dirl.training.optimizer import Learner, Loss, StepOutcome

# Scores under the policy that training started from: a frozen copy, or the policy with its adapters off.
Reference = Callable[[PackedViews, ScoringRule], ActionScores]


@dataclass(frozen=True, kw_only=True)
class UpdateConfig(Config):
    """How a batch of rollouts becomes optimizer steps."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)  # of objective.advantage=gae
    num_iterations: int = bounded(1, least=1)  # passes over a batch of rollouts
    steps_per_generation: int = bounded(1, least=1)  # optimizer steps a pass is split into
    # nats; a larger mean |trainer - engine| over the tokens of a batch, or over its holds that the engine recorded,
    # ends the run. 0: never
    max_logp_difference: float = bounded(0.5, least=0)

    @property
    def steps_per_rollout(self) -> int:
        return self.num_iterations * self.steps_per_generation


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
        critic: Critic | None = None,
    ) -> None:
        self.learner, self.config, self.reference, self.critic = learner, config, reference, critic
        has_gradient = config.objective.entropy_coef != 0
        self.rule, self._training_rule = rule, replace(rule, wants_entropy=True, entropy_has_gradient=has_gradient)
        self.max_completion_length = max_completion_length
        self.distributed = learner.distributed

    def update(
        self, groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], now: int, probe: RolloutGroup | None = None
    ) -> dict[str, float]:
        """All optimizer steps of one batch of rollouts; their mean metrics.

        Args:
            advantages: (G,) float32 for each group.
            now: optimizer steps that the weights have taken; groups sampled by these are fresh.
            probe: a fresh group that is not trained on, on which trainer and engine are compared where the others are
                not fresh. None: they are compared on the others.
        """
        config, is_redrawn = self.config, self.config.objective.refresh_masks
        # All of them before the first step: only these weights know what they gave.
        minibatches = [
            [
                self._table(groups[rows], advantages[rows], now, iteration)
                for rows in _slices(len(groups), config.steps_per_generation)
            ]
            for iteration in range(config.num_iterations if is_redrawn else 1)
        ]
        gauged = self._replayed_gauge(groups if probe is None else [probe], now, is_needed=probe is not None)
        steps: list[StepOutcome] = []
        critic_steps: list[StepOutcome] = []
        for iteration in range(config.num_iterations):
            for batches in minibatches[iteration % len(minibatches)]:
                # Only before the first step are these still the weights that the engine sampled with.
                fresh_since = None if any(step.sums for step in steps) else now
                is_still = self.critic is not None and self.critic.is_alone(now + len(steps))
                steps.append(self._step([] if is_still else batches, fresh_since))
                if self.critic is not None:
                    critic_steps.append(self.critic.update(batches, self._filler()))
        metrics = update_metrics(
            steps,
            gauged=gauged,
            has_reference=config.objective.beta > 0,
            max_logp_difference=config.max_logp_difference,
            distributed=self.distributed,
        )
        return metrics | critic_metrics(critic_steps) if critic_steps else metrics

    def _step(self, batches: Sequence[PolicyBatch], fresh_since: int | None) -> StepOutcome:
        """One optimizer step on all ranks' micro-batches."""
        losses = [
            partial(self._loss, batch, fresh_since, others)
            for batch, others in zip(batches, self._elsewhere(batches), strict=True)
        ]
        return self.learner.update(losses, partial(self._empty_loss, fresh_since))

    def is_compared(self, groups: Sequence[RolloutGroup], now: int) -> bool:
        """Whether the first optimizer step on these groups shows how far engine and trainer differ; collective.

        It does not where all groups of this step had to wait and are taken as the engine recorded them.
        """
        first = groups[next(_slices(len(groups), self.config.steps_per_generation))]
        is_shown = not self._trusts_engine or any(group.sampled_at == now for group in first)
        return self.distributed.max(float(is_shown)) > 0

    @property
    def _trusts_engine(self) -> bool:
        return self.config.objective.importance_sampling_correction == "none"

    def remember(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """Groups that must wait, with what the weights that sampled them give their actions; collective if sharded.

        The weights are about to move on: from then on nobody could tell what the engine did not record.
        """
        lacking = [group for group in groups if not group.behavior_logprobs]
        before = 1 + max((group.sampled_at for group in lacking), default=0)
        batches = self._annotated(self._packed(lacking), before, reference=None)
        found: list[dict[int, float]] = [{} for group in lacking for _ in group.completions]
        for batch in batches:
            columns = batch.completion_T, batch.row_T, batch.behavior_logprob_T
            for number, row, logprob in zip(*(column.tolist() for column in columns), strict=True):
                found[number][row] = logprob
        in_order = iter([[rows[row] for row in sorted(rows)] for rows in found])
        scored_as = self.config.objective.scored_as
        return [
            group
            if group.behavior_logprobs
            else replace(group, behavior_logprobs=[next(in_order) for _ in group.completions], scored_as=scored_as)
            for group in groups
        ]

    def _table(
        self, groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], now: int, iteration: int
    ) -> list[PolicyBatch]:
        """Micro-batches with every column filled."""
        config, objective = self.config, self.config.objective
        batches = self._packed(
            groups, iteration, math.ceil(objective.max_tokens_per_update / self.distributed.world_size)
        )
        if self._trusts_engine:
            refuse_unknown(batches, now)
        before = now if config.steps_per_rollout == 1 else now + 1
        batches = self._annotated(batches, before, None if self.reference is None else self._reference)
        batches = with_coefficients(
            batches,
            groups,
            self.distributed,
            objective=objective,
            max_completion_length=self.max_completion_length,
        )
        batches = with_advantages(batches, advantages)
        return batches if self.critic is None else self.critic.judge(batches, self._filler())

    def _annotated(
        self, batches: Sequence[PolicyBatch], before: int, reference: Callable[[PackedViews], Tensor] | None
    ) -> list[PolicyBatch]:
        return annotate(
            batches,
            before=before,
            trusts_engine=self._trusts_engine,
            policy=self._policy,
            reference=reference,
            filler=self._filler(),
            distributed=self.distributed,
        )

    def _packed(
        self, groups: Sequence[RolloutGroup], iteration: int = 0, tokens_per_update: int = 0
    ) -> list[PolicyBatch]:
        return pack_groups(
            groups, self.config.objective, self._layout(), iteration=iteration, tokens_per_update=tokens_per_update
        )

    def _layout(self) -> Layout:
        return Layout(self._model().scheme, self.learner.config.max_tokens_per_micro_batch)

    def _elsewhere(self, batches: Sequence[PolicyBatch]) -> Sequence[Elsewhere | None]:
        """What each micro-batch needs to know of completions that go on in others: a pass where there are such."""
        objective = self.config.objective
        is_needed = has_sequences(objective) and any(batch.is_split for batch in batches)
        if self.distributed.is_sharded and has_sequences(objective):
            is_needed = self.distributed.max(float(is_needed)) > 0  # passes are collective
        if not is_needed:
            return [None] * len(batches)
        own = scores_of([batch.packed for batch in batches], self._policy, self._filler(), self.distributed)
        num_completions = 1 + max((int(batch.completion_T.max()) for batch in batches), default=0)
        return elsewhere(batches, own, num_completions, objective)

    def _replayed_gauge(self, groups: Sequence[RolloutGroup], now: int, *, is_needed: bool) -> StepOutcome | None:
        """Engine against trainer on a few completions, where the objective scores no state that the engine visited.

        Args:
            is_needed: also where it does.
        """
        objective = self.config.objective
        if (objective.views == "replay" and not is_needed) or objective.gauge_completions == 0:
            return None
        replayed = ObjectiveConfig(likelihood=objective.likelihood)
        fresh = next((group for group in groups if group.sampled_at == now), None)
        few = [] if fresh is None else [fresh.of_first(objective.gauge_completions)]
        batches = pack_groups(few, replayed, self._layout())
        packs = [batch.packed.to(self.distributed.device) for batch in batches]
        own = scores_of(packs, self._policy, self._filler(), self.distributed)
        batches = [batch.to(self.distributed.device) for batch in batches]
        found = [gauge(batch, own_T, objective, now) for batch, own_T in zip(batches, own, strict=True)]
        return gauged_over_ranks(found, self.distributed)

    def _loss(self, batch: PolicyBatch, fresh_since: int | None, others: Elsewhere | None = None) -> Loss:
        scores = self.learner.module(batch.packed, self._training_rule)
        return policy_loss(scores, batch, self.config.objective, fresh_since=fresh_since, elsewhere=others)

    def _empty_loss(self, fresh_since: int | None) -> Loss:
        """Zero with a gradient of zero for every parameter, for a rank that has no completions left."""
        return self._loss(PolicyBatch.blank(self._filler()), fresh_since).nothing()

    def _policy(self, packed: PackedViews) -> Tensor:
        return self.learner.module(packed, self.rule).logprob_T

    def _reference(self, packed: PackedViews) -> Tensor:
        assert self.reference is not None
        return self.reference(packed, self.rule).logprob_T

    def _filler(self) -> PackedViews:
        return placeholder_pack(self._model().scheme).to(self.distributed.device)

    def _model(self) -> BlockDiffusionModel:
        return self.distributed.unwrap(self.learner.module).model


def _slices(count: int, num_slices: int) -> Iterator[slice]:
    """Contiguous slices that differ by at most one item."""
    bounds = [count * i // num_slices for i in range(num_slices + 1)]
    return (slice(start, end) for start, end in pairwise(bounds))
