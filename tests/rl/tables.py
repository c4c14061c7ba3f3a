"""Tables of actions without a model behind them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dirl.diffusion.packing import Actions, PackedViews, TokenTable
from dirl.model.logprobs import ActionScores
from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.policy_loss import policy_loss
from dirl.training.optimizer import Loss

NAN = float("nan")


def table(
    num_actions: int,
    *,
    completion: list[int] | None = None,
    token: list[int] | None = None,
    view: list[int] | None = None,
    block: list[int] | None = None,
    engine_logprob_T: Tensor | None = None,
    **columns: Tensor,
) -> PolicyBatch:
    """Reveals of one completion in one view, or as the lists say; further columns by their names."""
    zeros_T = torch.zeros(num_actions, dtype=torch.int64)

    def ids(values: list[int] | None) -> Tensor:
        return zeros_T if values is None else torch.tensor(values)

    actions = Actions.of(
        index_T=torch.arange(num_actions),
        target_T=zeros_T,
        is_reveal_T=zeros_T == 0,
        is_visited_T=zeros_T == 0,
        weight_T=torch.ones(num_actions),
        view_T=ids(view),
        block_T=ids(block),
        branch_T=ids(completion),
        completion_index_T=ids(token),
        **({} if engine_logprob_T is None else {"engine_logprob_T": engine_logprob_T}),
    )
    blank = PolicyBatch.blank(PackedViews(TokenTable(*[zeros_T] * 6), actions))
    ones = {"advantage_T": torch.ones(num_actions), "coefficient_T": torch.ones(num_actions)}
    return replace(blank, completion_T=ids(completion), **{**ones, **columns})  # type: ignore[arg-type]


def loss_of(logprob_T: Tensor, batch: PolicyBatch, objective: ObjectiveConfig, fresh_since: int | None = None) -> Loss:
    """The loss of a model that gave these log-probabilities."""
    return policy_loss(ActionScores(logprob_T, torch.zeros_like(logprob_T)), batch, objective, fresh_since=fresh_since)
