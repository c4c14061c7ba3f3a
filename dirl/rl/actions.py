"""Groups and advantages -> packed micro-batches, ready for the policy loss.

Every completion is replayed exactly: one view per denoising step it took. Completions of one group share the prompt's
clean tokens in a pack.

Shapes: T actions, N completions of a micro-batch, G completions of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dirl.diffusion.likelihood import Likelihood
from dirl.diffusion.views import Branch, PackedViews, ViewedDocument, branch_length, pack
from dirl.rl.policy_loss import LossType, completion_coefficients
from dirl.rl.rollout_group import RolloutGroup
from dirl.rollout.engine import Completion
from dirl.rollout.replay import completion_branch
from dirl.training.balance import split_by_budget
from dirl.training.distributed import Distributed


@dataclass(frozen=True)
class PolicyBatch:
    """One micro-batch: a pack of replayed completions and what the loss needs at each action."""

    packed: PackedViews
    advantage_T: Tensor  # float32
    coefficient_T: Tensor  # float32, the normaliser of loss_type
    recorded_logprob_T: Tensor  # float32, the engine's at each reveal; NaN at holds and where it recorded none

    def to(self, device: torch.device) -> PolicyBatch:
        moved = {k: v.to(device) for k, v in vars(self).items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class ScoredCompletion:
    """A completion with what the loss multiplies its actions by."""

    completion: Completion
    advantage: float
    coefficient: float


def build_policy_batches(
    groups: Sequence[RolloutGroup],
    advantages: Sequence[Tensor],
    distributed: Distributed,
    *,
    loss_type: LossType,
    max_completion_length: int,
) -> list[list[ScoredCompletion]]:
    """Completions of each group with advantage and coefficient; collective, since normalisers are global."""
    num_tokens_N = torch.tensor([len(c.token_ids) for group in groups for c in group.completions])
    local_tokens, local_completions = float(num_tokens_N.sum()), float(len(num_tokens_N))
    # At least 1: dynamic sampling may leave fewer groups than steps_per_generation, and a step then has none.
    all_tokens, all_completions = (max(count, 1.0) for count in distributed.sum(local_tokens, local_completions))
    if loss_type == "bnpo":
        all_tokens = max(local_tokens, 1.0) * distributed.world_size
    coefficients = completion_coefficients(
        num_tokens_N,
        loss_type,
        all_tokens=all_tokens,
        all_completions=all_completions,
        max_completion_length=max_completion_length,
    ).tolist()
    scored, start = [], 0
    for group, advantage_G in zip(groups, advantages, strict=True):
        rows = zip(group.completions, advantage_G.tolist(), coefficients[start:], strict=False)
        scored.append([ScoredCompletion(*row) for row in rows])
        start += len(group.completions)
    return scored


def pack_policy_batches(
    groups: Sequence[Sequence[ScoredCompletion]],
    *,
    block_length: int,
    mask_token_id: int,
    likelihood: Likelihood,
    budget: int,
) -> list[PolicyBatch]:
    """Micro-batches of at most `budget` packed tokens. A group that does not fit is cut, repeating its prompt."""
    documents = [
        part for group in groups for part in _documents(group, block_length, mask_token_id=mask_token_id, budget=budget)
    ]
    bins = split_by_budget([document.packed_length(block_length) for document, _ in documents], budget)
    return [_policy_batch([documents[i] for i in members], block_length, likelihood) for members in bins]


_Part = tuple[ViewedDocument, list[ScoredCompletion]]


def _documents(group: Sequence[ScoredCompletion], block_length: int, *, mask_token_id: int, budget: int) -> list[_Part]:
    """A group as one document, or as several that each fit the budget."""
    prompt_ids = torch.tensor(group[0].completion.prompt_ids, dtype=torch.int64)
    trunk = len(prompt_ids) - len(prompt_ids) % block_length
    parts: list[_Part] = []
    branches: list[Branch] = []
    members: list[ScoredCompletion] = []
    used = trunk
    for scored in group:
        branch = completion_branch(scored.completion, block_length, mask_token_id)
        length = branch_length(len(prompt_ids), branch, block_length)
        if members and used + length > budget:
            parts.append((ViewedDocument(prompt_ids, branches), members))
            branches, members, used = [], [], trunk
        branches.append(branch)
        members.append(scored)
        used += length
    return [*parts, (ViewedDocument(prompt_ids, branches), members)]


def _policy_batch(parts: Sequence[_Part], block_length: int, likelihood: Likelihood) -> PolicyBatch:
    packed = pack([document for document, _ in parts], block_length)
    if likelihood == "reveal":
        packed = packed.reveals_only()
    members = [scored for _, part in parts for scored in part]
    advantage_N, coefficient_N = (
        torch.tensor([getattr(scored, name) for scored in members], dtype=torch.float32)
        for name in ("advantage", "coefficient")
    )
    return PolicyBatch(
        packed=packed,
        advantage_T=advantage_N[packed.branch_T],
        coefficient_T=coefficient_N[packed.branch_T],
        recorded_logprob_T=_recorded_logprobs(packed, [scored.completion for scored in members]),
    )


def _recorded_logprobs(packed: PackedViews, completions: Sequence[Completion]) -> Tensor:
    """The engine's logprob at each reveal, NaN elsewhere."""
    lengths = torch.tensor([len(completion.token_ids) for completion in completions])
    recorded = torch.cat(
        [torch.tensor(c.logprobs if c.logprobs is not None else [torch.nan] * len(c.token_ids)) for c in completions]
    )
    first_N = lengths.cumsum(0) - lengths
    recorded_T = recorded[first_N[packed.branch_T] + packed.completion_index_T]
    return recorded_T.masked_fill(~packed.is_reveal_T, torch.nan)
