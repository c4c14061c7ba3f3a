"""A pack -> FlexAttention over its id vectors, and the choice between it and SDPA tiles for a training pass.

Shapes: N batch, L packed tokens, H query heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dirl.diffusion.packing import TokenTable, attention_rule
from dirl.model.attention import AttentionPlan
from dirl.model.tiled_attention import TiledPlan

FLEX_TILE = 128  # tokens per side of a FlexAttention tile
# flex_flash: FlexAttention with its FLASH back-end, which newer torch has and the flash-attn-4 package provides.
AttentionName = Literal["auto", "sdpa", "flex", "flex_flash"]


class FlexPlan:
    """FlexAttention over the id vectors; the tiles to compute come from the ids' ranges, never from L x L pairs."""

    def __init__(self, tokens: TokenTable, backend: Literal["TRITON", "FLASH"] | None = None) -> None:
        self.block_mask = tile_block_mask(tokens)
        self.kernel_options: dict[str, Any] | None = {"BACKEND": backend} if backend else None

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        output = _flex(query_NHLE.is_cuda)(
            query_NHLE,
            key_NGLE,
            value_NGLE,
            block_mask=self.block_mask,
            scale=scaling,
            enable_gqa=True,
            kernel_options=self.kernel_options,
        )
        return output.transpose(1, 2)


@cache
def _flex(compiled: bool) -> Callable[..., Tensor]:
    """One compiled wrapper for all layers and steps; dynamic=False since packs come in a few fixed lengths."""
    if not compiled:
        return flex_attention  # type: ignore[return-value]
    # Each padded length, with and without gradient, is one entry. Past the limit attention would silently run unfused,
    # with L x L scores; fullgraph makes reaching it an error.
    raise_recompile_limit()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)  # type: ignore[return-value]


def raise_recompile_limit() -> None:
    """Let a function have many compiled versions; Dynamo's default of 8 then runs it uncompiled without a word."""
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 256)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 1024)


def tile_block_mask(tokens: TokenTable) -> BlockMask:
    """BlockMask of the rule from tile-level ranges of the ids: O((L/128)^2) work."""
    ids = tokens.ids

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attention_rule(tuple(i[q] for i in ids), tuple(i[k] for i in ids))

    partial, full = tile_reads(tokens)
    num_partial, partial_indices = _ordered_columns(partial)
    num_full, full_indices = _ordered_columns(full)
    return BlockMask.from_kv_blocks(
        num_partial, partial_indices, num_full, full_indices, BLOCK_SIZE=FLEX_TILE, mask_mod=mask_mod
    )


def tile_reads(tokens: TokenTable) -> tuple[Tensor, Tensor]:
    """Which tiles of keys each tile of queries reads in part and in full; (L/128, L/128) bool each.

    In part is an upper bound from ranges (the mask decides inside the tile); in full is exact where it says so.

    Raises:
        ValueError: the pack's length is not a multiple of the tile.
    """
    if len(tokens) % FLEX_TILE:
        raise ValueError(f"pad packs to a multiple of {FLEX_TILE} tokens for FlexAttention, got {len(tokens)}")
    tiles = [i.view(-1, FLEX_TILE) for i in tokens.ids]
    low = [t.amin(dim=1) for t in tiles]
    high = [t.amax(dim=1) for t in tiles]

    def overlap(which: int) -> Tensor:
        return (low[which][:, None] <= high[which][None, :]) & (low[which][None, :] <= high[which][:, None])

    document, branch, block, view = range(4)
    is_clean = tiles[view] == 0
    first_clean_block = tiles[block].masked_fill(~is_clean, torch.iinfo(torch.int64).max).amin(dim=1)
    branch_possible = overlap(branch) | (low[branch] == 0)[None, :]
    clean_earlier = first_clean_block[None, :] < high[block][:, None]
    possible = overlap(document) & branch_possible & (clean_earlier | (overlap(view) & overlap(block)))

    one_document = (low[document] == high[document])[:, None] & (low[document] == high[document])[None, :]
    one_branch = (low[branch] == high[branch])[:, None] & (low[branch] == high[branch])[None, :] & overlap(branch)
    in_trunk = (high[branch] == 0)[None, :]
    all_clean_earlier = is_clean.all(dim=1)[None, :] & (high[block][None, :] < low[block][:, None])
    full = one_document & overlap(document) & (one_branch | in_trunk) & all_clean_earlier
    return possible & ~full, full


def _ordered_columns(reads: Tensor) -> tuple[Tensor, Tensor]:
    """True columns of each row, counted and listed first; (1, 1, L/128) and (1, 1, L/128, L/128) int32."""
    order = reads.int().argsort(dim=1, descending=True, stable=True).int()
    return reads.sum(dim=1, dtype=torch.int32)[None, None], order[None, None].contiguous()


def training_plan(tokens: TokenTable, attention: AttentionName = "auto") -> AttentionPlan:
    """The plan of a training forward pass: FlexAttention on CUDA, SDPA tiles elsewhere, unless one is asked for."""
    if not uses_flex(tokens, attention):
        return TiledPlan(tokens)
    return FlexPlan(tokens, "FLASH" if attention == "flex_flash" else None)


def uses_flex(tokens: TokenTable, attention: AttentionName) -> bool:
    return attention in ("flex", "flex_flash") or (attention == "auto" and tokens.token_ids_L.is_cuda)


def padded_for_flex(tokens: TokenTable, budget: int = 0) -> TokenTable:
    """The pack at one of four lengths an octave, or at `budget` where that is less and enough (up to a whole tile).

    FlexAttention compiles anew for every length it meets.
    """
    unit = max(FLEX_TILE, 1 << max(0, len(tokens).bit_length() - 3))
    length = -(-len(tokens) // unit) * unit
    if budget >= len(tokens):
        length = min(length, -(-budget // FLEX_TILE) * FLEX_TILE)
    return tokens.padded(length)
