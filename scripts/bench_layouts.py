"""The layout other frameworks train on: rows of a clean sequence and one noisy copy of it, padded to a width.

A row is expressed in the ids of packed views, so that the same model, attention rule and scoring run on it: the noisy
copy of a block is a view, padding is a document of its own whose tokens see only themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import Actions, PackedViews, TokenTable, attention_rule
from dirl.model.attention import AttentionPlan, DensePlan, masked_attention
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.flex_attention import FLEX_TILE, FlexPlan, padded_for_flex
from dirl.model.logprobs import score_actions

TOKEN_COLUMNS = [field.name for field in fields(TokenTable)]


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


def joined(rows: Sequence[PackedViews]) -> PackedViews:
    """Rows that are not padded, one after another in one: what packing without views of blocks makes of them."""
    start_R = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)[:-1]
    view_R = torch.tensor([0, *(int(row.tokens.view_L.max()) for row in rows)]).cumsum(0)[:-1]
    tokens = [{name: getattr(row.tokens, name) for name in TOKEN_COLUMNS} for row in rows]
    actions = [row.actions.columns() for row in rows]
    for number, (start, view) in enumerate(zip(start_R.tolist(), view_R.tolist(), strict=True)):
        tokens[number]["document_L"] = tokens[number]["document_L"] + number
        tokens[number]["view_L"] = tokens[number]["view_L"] + view * (tokens[number]["view_L"] > 0)
        actions[number] |= {
            "index_T": actions[number]["index_T"] + start,
            "view_T": actions[number]["view_T"] + view,
            "branch_T": actions[number]["branch_T"] + number,
        }
    table = TokenTable(**{name: torch.cat([one[name] for one in tokens]) for name in TOKEN_COLUMNS})
    return PackedViews(table, Actions.of(**{name: torch.cat([one[name] for one in actions]) for name in actions[0]}))


class TilesPlan:
    """Only the tiles of 128 x 128 in which anything is read: what a block-sparse kernel computes, for a CPU."""

    def __init__(self, tokens: TokenTable) -> None:
        mask_LL = attention_rule(tuple(i[:, None] for i in tokens.ids), tuple(i[None, :] for i in tokens.ids))
        tile_L = torch.arange(len(tokens)) // FLEX_TILE
        self._rows: list[tuple[slice, slice | Tensor, Tensor]] = []  # queries, the keys of their tiles, what they read
        for start in range(0, len(tokens), FLEX_TILE):
            queries = slice(start, start + FLEX_TILE)
            key_N = torch.isin(tile_L, tile_L[mask_LL[queries].any(0)]).nonzero().squeeze(1)
            first, last = int(key_N[0]), int(key_N[-1])
            keys = slice(first, last + 1) if last - first + 1 == len(key_N) else key_N  # without a copy where it can be
            self._rows.append((queries, keys, mask_LL[queries][:, keys][None, None]))

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        parts = [
            masked_attention(query_NHLE[:, :, queries], key_NGLE[:, :, keys], value_NGLE[:, :, keys], mask, scaling)
            for queries, keys, mask in self._rows
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)


def plan_of(row: PackedViews, attention: str) -> AttentionPlan:
    """`tiles`: block-sparse, FlexAttention's on a GPU; `dense`: a mask over all pairs."""
    if attention == "dense":
        return DensePlan.packed(row.tokens)
    return FlexPlan(padded_for_flex(row.tokens)) if row.tokens.token_ids_L.is_cuda else TilesPlan(row.tokens)


def score_row(model: BlockDiffusionModel, row: PackedViews, plan: AttentionPlan, rule: ScoringRule) -> Tensor:
    """Log-probabilities of a row's actions, under a plan that was made beforehand."""
    tokens, actions = row.tokens, row.actions
    if isinstance(plan, FlexPlan):
        tokens = padded_for_flex(tokens)
    hidden = model.model(
        input_ids=tokens.token_ids_L[None], position_ids=tokens.position_L[None], attention_plan=plan, use_cache=False
    ).last_hidden_state[0]
    return score_actions(hidden[actions.index_T], model.lm_head, actions, rule).logprob_T
