"""Log-probability differences of actions -> the ratios they share, at every level.

A ratio whose actions lie in several micro-batches needs what the others hold of it: `elsewhere`, from one pass without
gradient. With that as a constant, each micro-batch has exactly its share of the gradient.

Shapes: T actions, N completions of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dirl.diffusion.packing import Actions
from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import Level, ObjectiveConfig


class Elsewhere(NamedTuple):
    """Weighted sums over the actions of each action's completion that lie in other micro-batches; (T,) float32."""

    behavior_T: Tensor  # of logprob - behaviour logprob
    kl_T: Tensor  # of logprob - logprob of what the KL is taken to


def estimate_weights(actions: Actions) -> Tensor:
    """What an action's log-probability counts in a sum over actions: a reveal its weight, a hold 1; (T,) float32."""
    return torch.where(actions.is_reveal_T, actions.weight_T, 1.0)


def summed(batch: PolicyBatch, value_T: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
    """The sum over each action's level, and its share of what is made of the sum; no share (None) is a whole one.

    Actions of one sum share one term c s(sum), so each carries 1 / (how many they are) of it.
    """
    if level == "action":
        return value_T, None
    row_T = _rows_of_equal(*_LEVELS[level](batch))
    zeros_T = torch.zeros_like(value_T)
    sum_T = zeros_T.index_add(0, row_T, value_T)[row_T]
    count_T = zeros_T.index_add(0, row_T, torch.ones_like(zeros_T))[row_T]
    # So a term counts once, and on-policy every level has the gradient of the level `action`.
    return sum_T, 1.0 / count_T


def counted_once(batch: PolicyBatch, term_T: Tensor, level: Level) -> Tensor:
    """The same gradient, and a value that adds up to the term's over the micro-batches its completion lies in."""
    if level != "sequence" or not batch.is_split:
        return term_T
    return term_T - term_T.detach() * (1 - 1 / batch.num_parts_T)


# What actions of one ratio have in common; only a completion's may lie in several micro-batches, never a block's.
_LEVELS: dict[Level, Callable[[PolicyBatch], tuple[Tensor, ...]]] = {
    "token": lambda batch: (batch.completion_T, batch.packed.actions.completion_index_T),
    "step": lambda batch: (batch.completion_T, batch.packed.actions.view_T),
    "block": lambda batch: (batch.completion_T, batch.packed.actions.block_T),
    "sequence": lambda batch: (batch.completion_T,),
}


def _rows_of_equal(*columns: Tensor) -> Tensor:
    """The same number, below T, for rows that are equal in all columns; (T,) int64."""
    row_T = torch.zeros_like(columns[0])
    for column_T in columns:
        # Sorted by what was equal so far and then by this column; a number is where its first row stands.
        order_T = column_T.argsort(stable=True)
        order_T = order_T[row_T[order_T].argsort(stable=True)]
        same_T = (row_T[order_T][1:] == row_T[order_T][:-1]) & (column_T[order_T][1:] == column_T[order_T][:-1])
        number_T = torch.cat([torch.zeros_like(order_T[:1]), (~same_T).long().cumsum(0)])
        row_T = torch.zeros_like(row_T).scatter(0, order_T, number_T)
    return row_T


def behavior_of(batch: PolicyBatch, own_T: Tensor) -> Tensor:
    """Log-probability by the policy that sampled; NaN stands for the policy itself."""
    return torch.where(batch.behavior_logprob_T.isnan(), own_T, batch.behavior_logprob_T)


def kl_to(batch: PolicyBatch, own_T: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Log-probability by what the KL is taken to."""
    if objective.kl_to == "behavior":
        return behavior_of(batch, own_T)
    return torch.where(batch.ref_logprob_T.isnan(), own_T, batch.ref_logprob_T)


def has_sequences(objective: ObjectiveConfig) -> bool:
    """Whether a ratio or a KL is one of whole completions, which borders of micro-batches may cut."""
    has_ratios = objective.importance_sampling_level == "sequence" and objective.surrogate in ("clip", "cispo")
    return has_ratios or (objective.kl_level == "sequence" and objective.beta > 0)


def elsewhere(
    batches: Sequence[PolicyBatch], own: Sequence[Tensor], num_completions: int, objective: ObjectiveConfig
) -> list[Elsewhere]:
    """What each micro-batch needs to know of the others.

    Args:
        own: what the policy gives the actions of each now; (T,) float32.
    """
    sums = []
    for batch, own_T in zip(batches, own, strict=True):
        weight_T, zeros_N = estimate_weights(batch.packed.actions), own_T.new_zeros(num_completions)
        others = (behavior_of(batch, own_T), kl_to(batch, own_T, objective))
        sums.append([zeros_N.index_add(0, batch.completion_T, weight_T * (own_T - other_T)) for other_T in others])
    behavior_N, kl_N = (torch.stack(columns).sum(dim=0) for columns in zip(*sums, strict=True))
    return [
        Elsewhere((behavior_N - here_N)[batch.completion_T], (kl_N - kl_here_N)[batch.completion_T])
        for batch, (here_N, kl_here_N) in zip(batches, sums, strict=True)
    ]
