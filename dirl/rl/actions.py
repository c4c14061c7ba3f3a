"""Groups of completions -> the table of their actions: one row an action, columns filled one after another.

    pack_groups      (micro_batches.py) lays out views and fills what was known when the completions were sampled
    annotate         at most one pass of each model: what the policy and the reference give the actions
    with_coefficients, with_advantages   how much each completion counts, and how good it was

Off-policy and carried-over completions are rows like any other: a row says which weights sampled it, and what they
gave it. NaN as behaviour means the policy's own, so that the ratio of a fresh action is 1 by construction.

Shapes: T actions, N completions of an optimizer step on this rank, G completions of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from dirl.diffusion.packing import PackedViews
from dirl.errors import UserError
from dirl.rl.objective import LossType, ObjectiveConfig
from dirl.rl.rollout_group import RolloutGroup
from dirl.training.distributed import Distributed

Scorer = Callable[[PackedViews], Tensor]  # a pack -> the log-probability of each action, (T,)


@dataclass(frozen=True)
class PolicyBatch:
    """One micro-batch: packed views, whose `actions` are the first columns of the table, and the further columns."""

    packed: PackedViews
    is_split: bool  # some completion here lies in several micro-batches; a fact for the host
    completion_T: Tensor  # int64, which of this rank's N completions
    row_T: Tensor  # int64, which of its completion's actions
    step_T: Tensor  # int64, which of its completion's views
    length_T: Tensor  # float32, tokens of its completion
    num_covered_T: Tensor  # float32, tokens of its completion that any view scores
    num_parts_T: Tensor  # float32, micro-batches its completion lies in
    sampled_at_T: Tensor  # int64, optimizer steps that the weights which sampled it had taken
    behavior_logprob_T: Tensor  # float32 nats, by the policy that sampled it; NaN: that is the policy itself
    is_remembered_T: Tensor  # bool, this policy told it while it still was the one that sampled
    ref_logprob_T: Tensor  # float32 nats, by the reference; NaN: as the policy's own
    coefficient_T: Tensor  # float32, the normaliser of loss_type, over how often its view was expected to be drawn
    advantage_T: Tensor  # float32
    nll_share_T: Tensor  # float32, 1 / (tokens of the global batch that nll_on means) at these, else 0
    value_T: Tensor  # float32, by the critic before the update; zeros without one
    return_T: Tensor  # float32, what the critic learns to foretell; zeros without one

    @classmethod
    def blank(cls, packed: PackedViews) -> PolicyBatch:
        """Fresh actions of one completion of which nothing is known or wanted."""
        zeros_T = torch.zeros_like(packed.actions.weight_T)
        nothing_T, ones_T = torch.full_like(zeros_T, torch.nan), torch.ones_like(zeros_T)
        return cls(
            packed,
            is_split=False,
            completion_T=packed.actions.branch_T,
            row_T=zeros_T.long(),
            step_T=zeros_T.long(),
            length_T=ones_T,
            num_covered_T=ones_T,
            num_parts_T=ones_T,
            sampled_at_T=zeros_T.long(),
            behavior_logprob_T=nothing_T,
            is_remembered_T=zeros_T.bool(),
            ref_logprob_T=nothing_T,
            coefficient_T=zeros_T,
            advantage_T=zeros_T,
            nll_share_T=zeros_T,
            value_T=zeros_T,
            return_T=zeros_T,
        )

    @property
    def engine_logprob_T(self) -> Tensor:
        """Float32 nats, recorded by the engine in this very state; NaN where none."""
        return self.packed.actions.engine_logprob_T

    def to(self, device: torch.device) -> PolicyBatch:
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_T")}
        moved = {name: column.to(device, non_blocking=True) for name, column in columns.items()}
        return replace(self, packed=self.packed.to(device), **moved)

    def needs_behavior_T(self, before: int) -> Tensor:
        """Actions of weights older than `before` optimizer steps whose behaviour is not known yet; bool."""
        return (self.sampled_at_T < before) & self.behavior_logprob_T.isnan()


def annotate(
    batches: Sequence[PolicyBatch],
    *,
    before: int,
    trusts_engine: bool,
    policy: Scorer,
    reference: Scorer | None,
    filler: PackedViews,
    distributed: Distributed,
) -> list[PolicyBatch]:
    """The tables (on the host) with the columns that models fill, on the device.

    Args:
        before: actions of weights that had taken fewer optimizer steps get the log-probability of those that sampled
            them: what was remembered, else what the engine recorded, else what the policy gives now.
        trusts_engine: False: never what the engine recorded.
        filler: a pack for the passes that only keep other ranks company.
    """
    if trusts_engine:
        batches = [_with_behavior(batch, _numbers(batch.engine_logprob_T), before) for batch in batches]
    needs = [bool(batch.needs_behavior_T(before).any()) for batch in batches]
    if distributed.is_sharded:  # passes are collective: what one rank needs, all take part in
        needs = [distributed.max(float(any(needs))) > 0] * len(batches)
    batches = [batch.to(distributed.device) for batch in batches]
    lacking = [batch for batch, needs_pass in zip(batches, needs, strict=True) if needs_pass]
    scored = iter(scores_of([batch.packed for batch in lacking], policy, filler, distributed))
    filled = [
        _with_behavior(batch, next(scored), before) if needs_pass else batch
        for batch, needs_pass in zip(batches, needs, strict=True)
    ]
    if reference is None:
        return filled
    ref_logprobs = scores_of([batch.packed for batch in filled], reference, filler, distributed)
    return [replace(batch, ref_logprob_T=ref_T) for batch, ref_T in zip(filled, ref_logprobs, strict=True)]


def refuse_unknown(batches: Sequence[PolicyBatch], now: int) -> None:
    """Check that it is known what weights which are gone gave the actions they sampled.

    Args:
        now: optimizer steps that the weights have taken.
    Raises:
        UserError: nobody can tell any more, and what the policy gives now would be taken for it.
    """
    unknown = [batch.needs_behavior_T(now) & _numbers(batch.engine_logprob_T).isnan() for batch in batches]
    if count := sum(int(unknown_T.sum()) for unknown_T in unknown):
        raise UserError(
            f"rollout: of {count} actions that weights before step {now} sampled the engine recorded no "
            "log-probability, and nobody else can tell; an engine must return Completion.logprobs, and with "
            "record_holds hold_logprobs, or set rollout.max_staleness=0"
        )


def _numbers(recorded_T: Tensor) -> Tensor:
    """What an engine recorded, NaN for what is no number."""
    return recorded_T.masked_fill(~recorded_T.isfinite(), torch.nan)


@torch.no_grad()
def scores_of(
    packs: Sequence[PackedViews], scorer: Scorer, filler: PackedViews, distributed: Distributed
) -> list[Tensor]:
    """The log-probabilities of each pack's actions; as many passes on every rank where passes are collective."""
    return [scorer(packed) for packed in distributed.evened(packs, filler)][: len(packs)]


def _with_behavior(batch: PolicyBatch, known_T: Tensor, before: int) -> PolicyBatch:
    """The table with what is known of actions whose behaviour is wanted and missing; NaN stays missing."""
    behavior_T = torch.where(batch.needs_behavior_T(before), known_T, batch.behavior_logprob_T)
    return replace(batch, behavior_logprob_T=behavior_T)


def with_advantages(batches: Sequence[PolicyBatch], advantages: Sequence[Tensor]) -> list[PolicyBatch]:
    """The tables with each completion's advantage at its actions, or each denoising step's at its own.

    Args:
        advantages: (G,) float32 for each group, in the order that was packed; or (G, S) for S steps, the rest zeros.
    """
    if not any(advantage.ndim == 2 for advantage in advantages):
        return [replace(batch, advantage_T=_at_actions(batch, torch.cat([*advantages]))) for batch in batches]
    rows = [row for advantage in advantages for row in advantage]
    value_NS = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    found = []
    for batch in batches:
        value_TS = _at_actions(batch, value_NS)
        found.append(replace(batch, advantage_T=value_TS.gather(1, batch.step_T[:, None]).squeeze(1)))
    return found


def with_coefficients(
    batches: Sequence[PolicyBatch],
    groups: Sequence[RolloutGroup],
    distributed: Distributed,
    *,
    objective: ObjectiveConfig,
    max_completion_length: int,
) -> list[PolicyBatch]:
    """The tables with the normaliser of each completion at its actions; collective, since normalisers are global.

    Completions that are not trained on count nowhere; nor do any in a normaliser of the likelihood that is not theirs.
    """
    completions = [completion for group in groups for completion in group.completions]
    num_tokens_N = torch.tensor([len(completion.token_ids) for completion in completions])
    is_trained_N, is_anchor_N = torch.ones(2, len(completions))
    if objective.mask_truncated_completions:
        is_trained_N = torch.tensor([float(not completion.is_truncated) for completion in completions])
    if objective.nll_on == "right":
        is_anchor_N = torch.tensor([float(is_right) for group in groups for is_right in group.is_right])
    local = [float(x.sum()) for x in (num_tokens_N * is_trained_N, is_trained_N, num_tokens_N * is_anchor_N)]
    # At least 1: dynamic sampling may leave fewer groups than steps_per_generation, and a step then has none.
    all_tokens, all_completions, anchor_tokens = (max(count, 1.0) for count in distributed.sum(*local))
    if objective.loss_type == "bnpo":
        all_tokens = max(local[0], 1.0) * distributed.world_size
    coefficient_N = is_trained_N * completion_coefficients(
        num_tokens_N,
        objective.loss_type,
        all_tokens=all_tokens,
        all_completions=all_completions,
        max_completion_length=max_completion_length,
    )
    return [
        replace(
            batch,
            coefficient_T=_at_actions(batch, coefficient_N) * batch.packed.actions.importance_T,
            nll_share_T=_at_actions(batch, is_anchor_N / anchor_tokens) * batch.packed.actions.importance_T,
        )
        for batch in batches
    ]


def completion_coefficients(
    num_tokens_N: Tensor, loss_type: LossType, *, all_tokens: float, all_completions: float, max_completion_length: int
) -> Tensor:
    """What each action of a completion is multiplied with; (N,) float32.

    Args:
        num_tokens_N: tokens of each completion that are scored.
        all_tokens, all_completions: of the global batch; for `bnpo`, all_tokens of this rank times the ranks.
    Source: dapo: DiRL Eq. 7-8; grpo: Eq. 6; dr_grpo: arXiv 2503.20783; bnpo: TRL; luspo: LUSPO.
    """
    if loss_type == "grpo":
        return 1.0 / (num_tokens_N.float() * all_completions)
    denominators = {"dr_grpo": all_completions * max_completion_length, "luspo": all_completions}
    return torch.full(num_tokens_N.shape, 1.0 / denominators.get(loss_type, all_tokens))


def _at_actions(batch: PolicyBatch, value_N: Tensor) -> Tensor:
    """A value of each completion at its actions."""
    return value_N.to(batch.completion_T.device, non_blocking=True)[batch.completion_T]
