"""Groups of completions -> the table of their actions: one row an action, columns filled one after another.

    pack_groups      lays out views and fills what was known when the completions were sampled
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
from torch import Tensor

from dirl.diffusion.packing import PackedViews, ViewedDocument, pack
from dirl.errors import UserError
from dirl.rl.objective import LossType, ObjectiveConfig
from dirl.rl.rollout_group import RolloutGroup
from dirl.rollout.engine import Completion
from dirl.rollout.replay import trajectory_of
from dirl.training.balance import consecutive, split_by_budget
from dirl.training.distributed import Distributed
from dirl.training.seeds import stable_seed

Scorer = Callable[[PackedViews], Tensor]  # a pack -> the log-probability of each action, (T,)


@dataclass(frozen=True)
class PolicyBatch:
    """One micro-batch: packed views, whose `actions` are the first columns of the table, and the further columns."""

    packed: PackedViews
    completion_T: Tensor  # int64, which of this rank's N completions
    sampled_at_T: Tensor  # int64, optimizer steps that the weights which sampled it had taken
    engine_logprob_T: Tensor  # float32 nats, recorded by the engine in this very state; NaN where none
    behavior_logprob_T: Tensor  # float32 nats, by the policy that sampled it; NaN: that is the policy itself
    ref_logprob_T: Tensor  # float32 nats, by the reference; NaN: as the policy's own
    coefficient_T: Tensor  # float32, the normaliser of loss_type
    advantage_T: Tensor  # float32
    value_T: Tensor  # float32, by the critic before the update; zeros without one
    return_T: Tensor  # float32, what the critic learns to foretell; zeros without one

    @classmethod
    def blank(cls, packed: PackedViews) -> PolicyBatch:
        """Fresh actions of one completion of which nothing is known or wanted."""
        zeros_T = torch.zeros_like(packed.actions.weight_T)
        nothing_T = torch.full_like(zeros_T, torch.nan)
        return cls(packed, zeros_T.long(), zeros_T.long(), nothing_T, nothing_T, nothing_T, *[zeros_T] * 4)

    def to(self, device: torch.device) -> PolicyBatch:
        columns = (getattr(self, f.name) for f in fields(self) if f.name != "packed")
        return PolicyBatch(self.packed.to(device), *(column.to(device, non_blocking=True) for column in columns))

    def needs_behavior_T(self, before: int) -> Tensor:
        """Actions of weights older than `before` optimizer steps whose behaviour is not known yet; bool."""
        return (self.sampled_at_T < before) & self.behavior_logprob_T.isnan()


@dataclass(frozen=True)
class _Member:
    """A completion's place in the batch of rollouts."""

    group: RolloutGroup
    index: int  # in its group
    number: int  # among all of this rank's

    @property
    def completion(self) -> Completion:
        return self.group.completions[self.index]


def pack_groups(
    groups: Sequence[RolloutGroup], objective: ObjectiveConfig, *, block_length: int, mask_token_id: int, budget: int
) -> list[PolicyBatch]:
    """Micro-batches of at most `budget` packed tokens, on the host. A group too large is cut, repeating its prompt."""
    documents: list[tuple[ViewedDocument, list[_Member]]] = []
    number = 0
    for group in groups:
        members = [_Member(group, index, number + index) for index in range(len(group.completions))]
        number += len(members)
        documents += _documents(members, objective, block_length, mask_token_id=mask_token_id, budget=budget)
    bins = split_by_budget([document.packed_length(block_length) for document, _ in documents], budget)
    return [_policy_batch([documents[i] for i in chosen], block_length, objective) for chosen in bins]


def _documents(
    members: Sequence[_Member], objective: ObjectiveConfig, block_length: int, *, mask_token_id: int, budget: int
) -> list[tuple[ViewedDocument, list[_Member]]]:
    """A group as one document, or as several that each fit the budget."""
    trajectories = [trajectory_of(member.completion, block_length) for member in members]
    prompt_ids = trajectories[0].prompt_ids
    views = [
        objective.views_of(trajectory, mask_token_id, stable_seed(member.group.seed, member.index))
        for trajectory, member in zip(trajectories, members, strict=True)
    ]
    lengths = [one.packed_length(len(prompt_ids), block_length) for one in views]
    trunk = len(prompt_ids) - len(prompt_ids) % block_length
    return [
        (ViewedDocument(prompt_ids, [views[i] for i in chosen]), [members[i] for i in chosen])
        for chosen in consecutive(range(len(members)), lambda i: lengths[i], budget - trunk)
    ]


def _policy_batch(
    documents: Sequence[tuple[ViewedDocument, list[_Member]]], block_length: int, objective: ObjectiveConfig
) -> PolicyBatch:
    packed = pack([document for document, _ in documents], block_length)
    if objective.likelihood == "reveal":
        packed = packed.reveals_only()
    members = [member for _, of_document in documents for member in of_document]
    branch_T = packed.actions.branch_T
    return replace(
        PolicyBatch.blank(packed),
        completion_T=torch.tensor([member.number for member in members])[branch_T],
        sampled_at_T=torch.tensor([member.group.sampled_at for member in members])[branch_T],
        engine_logprob_T=_engine_logprobs(packed, [member.completion for member in members]),
        behavior_logprob_T=_remembered(packed, members, objective),
    )


def _engine_logprobs(packed: PackedViews, completions: Sequence[Completion]) -> Tensor:
    """The engine's logprob at each reveal in a state it visited, NaN elsewhere."""
    actions = packed.actions
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    recorded = torch.cat(
        [torch.tensor(c.logprobs if c.logprobs is not None else [torch.nan] * len(c.token_ids)) for c in completions]
    )
    first_N = lengths.cumsum(0) - lengths
    recorded_T = recorded[first_N[actions.branch_T] + actions.completion_index_T]
    return recorded_T.masked_fill(~(actions.is_reveal_T & actions.is_visited_T), torch.nan)


def _remembered(packed: PackedViews, members: Sequence[_Member], objective: ObjectiveConfig) -> Tensor:
    """What groups that had to wait were given by the weights that sampled them; NaN for all others.

    Raises:
        UserError: a checkpoint brought groups whose actions were others.
    """
    remembered_T = torch.full((len(packed.actions),), torch.nan)
    for branch, member in enumerate(members):
        if member.group.behavior_logprobs:
            if member.group.scored_as != objective.scored_as:
                raise UserError(
                    f"objective: groups that wait since step {member.group.sampled_at} were scored with "
                    f"{member.group.scored_as}, this run has {objective.scored_as}; resume with what the run was "
                    "started with, or set resume_from_checkpoint=none"
                )
            values = member.group.behavior_logprobs[member.index]
            remembered_T[packed.actions.branch_T == branch] = torch.tensor(values)
    return remembered_T


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
        batches = [_with_behavior(batch, batch.engine_logprob_T, before) for batch in batches]
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
    """The tables with each completion's advantage at its actions.

    Args:
        advantages: (G,) float32 for each group, in the order that was packed.
    """
    return [replace(batch, advantage_T=_at_actions(batch, torch.cat([*advantages]))) for batch in batches]


def with_coefficients(
    batches: Sequence[PolicyBatch],
    groups: Sequence[RolloutGroup],
    distributed: Distributed,
    *,
    loss_type: LossType,
    max_completion_length: int,
) -> list[PolicyBatch]:
    """The tables with the normaliser of each completion at its actions; collective, since normalisers are global."""
    num_tokens_N = torch.tensor([len(c.token_ids) for group in groups for c in group.completions])
    local_tokens, local_completions = float(num_tokens_N.sum()), float(len(num_tokens_N))
    # At least 1: dynamic sampling may leave fewer groups than steps_per_generation, and a step then has none.
    all_tokens, all_completions = (max(count, 1.0) for count in distributed.sum(local_tokens, local_completions))
    if loss_type == "bnpo":
        all_tokens = max(local_tokens, 1.0) * distributed.world_size
    coefficient_N = completion_coefficients(
        num_tokens_N,
        loss_type,
        all_tokens=all_tokens,
        all_completions=all_completions,
        max_completion_length=max_completion_length,
    )
    return [replace(batch, coefficient_T=_at_actions(batch, coefficient_N)) for batch in batches]


def completion_coefficients(
    num_tokens_N: Tensor, loss_type: LossType, *, all_tokens: float, all_completions: float, max_completion_length: int
) -> Tensor:
    """What each action of a completion is multiplied with; (N,) float32.

    Args:
        num_tokens_N: tokens of each completion that are scored.
        all_tokens, all_completions: of the global batch; for `bnpo`, all_tokens of this rank times the ranks.
    Source: dapo: DiRL Eq. 7-8; grpo: Eq. 6; dr_grpo: arXiv 2503.20783; bnpo: TRL.
    """
    if loss_type == "grpo":
        return 1.0 / (num_tokens_N.float() * all_completions)
    denominator = all_completions * max_completion_length if loss_type == "dr_grpo" else all_tokens
    return torch.full(num_tokens_N.shape, 1.0 / denominator)


def _at_actions(batch: PolicyBatch, value_N: Tensor) -> Tensor:
    """A value of each completion at its actions."""
    return value_N.to(batch.completion_T.device, non_blocking=True)[batch.completion_T]
