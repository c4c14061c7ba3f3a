"""The layout other frameworks train on: rows of a clean sequence and one noisy copy of it, padded to a width.

A row is expressed in the ids of packed views, so that the same model, attention rule and scoring run on it: the noisy
copy of a block is a view, padding is a document of its own whose tokens see only themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import Actions, PackedViews, TokenTable
from dirl.model.attention import DensePlan
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.flex_attention import FlexPlan, padded_for_flex
from dirl.model.logprobs import score_actions


def clean_and_noisy_row(
    clean_ids: Tensor, noisy_ids: Tensor, scored: Tensor, *, block_length: int, start: int = 0, width: int = 0
) -> PackedViews:
    """[clean | noisy from `start` on | padding up to `width`]; (L,) each.

    Args:
        clean_ids, noisy_ids: of the whole sequence; the part of the copy before `start` (a block border) is left out.
        scored: positions in the sequence whose tokens are scored in the noisy copy; `completion_index_T` holds them.
    """
    length = len(clean_ids)
    position = torch.cat([torch.arange(length), torch.arange(start, length)])
    block = position // block_length
    is_noisy = torch.arange(len(position)) >= length
    padding = torch.zeros(max(width - len(position), 0), dtype=torch.int64)
    own = torch.arange(len(padding))
    tokens = TokenTable(
        token_ids_L=torch.cat([clean_ids, noisy_ids[start:], padding]),
        position_L=torch.cat([position, padding]),
        document_L=torch.cat([torch.zeros_like(position), padding + 1]),
        branch_L=torch.zeros(len(position) + len(padding), dtype=torch.int64),
        block_L=torch.cat([block, own]),
        view_L=torch.cat([is_noisy * (block + 1), own + 2 + int(block.max())]),
    )
    scored_block = scored // block_length
    actions = Actions.of(
        index_T=length - start + scored,
        target_T=clean_ids[scored],
        is_reveal_T=torch.ones_like(scored, dtype=torch.bool),
        is_visited_T=torch.ones_like(scored, dtype=torch.bool),
        weight_T=torch.ones(len(scored)),
        view_T=scored_block + 1,
        block_T=scored_block,
        branch_T=torch.zeros_like(scored),
        completion_index_T=scored,
    )
    return PackedViews(tokens, actions)


def score_row(model: BlockDiffusionModel, row: PackedViews, rule: ScoringRule) -> Tensor:
    """Log-probabilities of a row's actions: FlexAttention with a block-sparse mask on a GPU, else a dense mask."""
    tokens, actions = row.tokens, row.actions
    if tokens.token_ids_L.is_cuda:
        tokens = padded_for_flex(tokens)
    plan = FlexPlan(tokens) if tokens.token_ids_L.is_cuda else DensePlan.packed(tokens)
    hidden = model.model(
        input_ids=tokens.token_ids_L[None], position_ids=tokens.position_L[None], attention_plan=plan, use_cache=False
    ).last_hidden_state[0]
    return score_actions(hidden[actions.index_T], model.lm_head, actions, rule).logprob_T
