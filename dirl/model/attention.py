"""Queries, keys and values of a forward pass -> attention output, by one of several plans behind one call.

A plan knows which keys each query reads and computes just that. It is built once per forward pass from the ids of the
packed tokens and travels to every layer through transformers' attention interface, as the keyword `attention_plan`:

    DensePlan   a boolean mask; plain forward passes and tests
    TiledPlan   SDPA over batches of small tiles (`tiled_attention.py`); any device, the CPU's training path
    FlexPlan    FlexAttention with a block-sparse mask; CUDA's training path

Shapes: B batch, L tokens, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Protocol

import torch
import torch._dynamo
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dirl.diffusion.views import PackedViews, attention_rule

ATTENTION_NAME = "dirl_block_diffusion"  # the name transformers knows the function below by
FLEX_TILE = 128  # tokens per side of a FlexAttention tile


class AttentionPlan(Protocol):
    """Which keys each query of a forward pass reads."""

    def attend(self, layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
        """Attention output, (B, L, H, D)."""
        ...


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    attention_plan: AttentionPlan | None = None,
    **_: Any,  # transformers hands every backend more than it needs
) -> tuple[Tensor, None]:
    if attention_plan is None:
        raise ValueError("a block-diffusion model needs an attention_plan; call SDARForCausalLM, not its inner model")
    return attention_plan.attend(module.layer_idx, query, key, value, scaling), None  # type: ignore[arg-type]


AttentionInterface.register(ATTENTION_NAME, _attend)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """SDPA with a mask (B, 1, Q or 1, K; True = may read, or numbers to add) and grouped heads; (B, H, Q, D).

    The heads that share a key/value head are laid out as further queries of it: repeating keys and values instead
    takes longer than the attention itself when queries are few, as in decoding.
    """
    num_heads, num_queries = query.shape[1:3]
    groups = num_heads // key.shape[1]
    if groups == 1:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    folded = query.unflatten(1, (-1, groups)).flatten(2, 3)
    if mask.shape[2] > 1:
        mask = mask.repeat(1, 1, groups, 1)
    output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return output.unflatten(2, (groups, num_queries)).flatten(1, 2)


class DensePlan:
    """A boolean mask over all pairs."""

    def __init__(self, mask_BLL: Tensor) -> None:
        self.mask_B1LL = mask_BLL[:, None]

    @classmethod
    def packed(cls, packed: PackedViews) -> DensePlan:
        """The rule of the package as an L x L mask: the oracle of the other plans."""
        ids = (packed.document_L, packed.branch_L, packed.block_L, packed.view_L)
        return cls(attention_rule(tuple(i[:, None] for i in ids), tuple(i[None, :] for i in ids))[None])

    @classmethod
    def block_causal(cls, position_BL: Tensor, is_token_BL: Tensor, block_length: int) -> DensePlan:
        """Clean sequences, one per row: full attention inside a block, causal between blocks; padding is not read."""
        block_BL = position_BL // block_length
        mask_BLL = (block_BL[:, :, None] >= block_BL[:, None, :]) & is_token_BL[:, None, :]
        # A padding query may read nothing; give it itself, since softmax over nothing is NaN.
        return cls(mask_BLL | torch.eye(mask_BLL.shape[1], dtype=torch.bool, device=mask_BLL.device))

    def attend(self, layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
        return masked_attention(query_BHLD, key_BGLD, value_BGLD, self.mask_B1LL, scaling).transpose(1, 2)


class FlexPlan:
    """FlexAttention over the id vectors; the tiles to compute come from the ids' ranges, never from L x L pairs."""

    def __init__(self, packed: PackedViews, backend: Literal["TRITON", "FLASH"] | None = None) -> None:
        self.length = len(packed)
        self.block_mask = tile_block_mask(packed)
        self.kernel_options: dict[str, Any] | None = {"BACKEND": backend} if backend else None

    def attend(self, layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
        output = _flex(query_BHLD.is_cuda)(
            query_BHLD,
            key_BGLD,
            value_BGLD,
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


def tile_block_mask(packed: PackedViews) -> BlockMask:
    """BlockMask of the rule from tile-level ranges of the ids: O((L/128)^2) work."""
    ids = (packed.document_L, packed.branch_L, packed.block_L, packed.view_L)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attention_rule(tuple(i[q] for i in ids), tuple(i[k] for i in ids))

    partial_NN, full_NN = tile_reads(packed)
    num_partial, partial_indices = _ordered_columns(partial_NN)
    num_full, full_indices = _ordered_columns(full_NN)
    return BlockMask.from_kv_blocks(
        num_partial, partial_indices, num_full, full_indices, BLOCK_SIZE=FLEX_TILE, mask_mod=mask_mod
    )


def tile_reads(packed: PackedViews) -> tuple[Tensor, Tensor]:
    """Which tiles of keys each tile of queries reads in part and in full; (L/128, L/128) bool each.

    In part is an upper bound from ranges (the mask decides inside the tile); in full is exact where it says so.

    Raises:
        ValueError: the pack's length is not a multiple of the tile.
    """
    if len(packed) % FLEX_TILE:
        raise ValueError(f"pad packs to a multiple of {FLEX_TILE} tokens for FlexAttention, got {len(packed)}")
    tiles = [i.view(-1, FLEX_TILE) for i in (packed.document_L, packed.branch_L, packed.block_L, packed.view_L)]
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


def _ordered_columns(reads_NN: Tensor) -> tuple[Tensor, Tensor]:
    """True columns of each row, counted and listed first; (1, 1, N) and (1, 1, N, N) int32."""
    order = reads_NN.int().argsort(dim=1, descending=True, stable=True).int()
    return reads_NN.sum(dim=1, dtype=torch.int32)[None, None], order[None, None].contiguous()


# flex_flash: FlexAttention with its FLASH back-end, which newer torch has and the flash-attn-4 package provides.
AttentionName = Literal["auto", "sdpa", "flex", "flex_flash"]


def training_plan(packed: PackedViews, attention: AttentionName = "auto") -> AttentionPlan:
    """The plan of a training forward pass: FlexAttention on CUDA, SDPA tiles elsewhere, unless one is asked for."""
    from dirl.model.tiled_attention import TiledPlan

    if not uses_flex(packed, attention):
        return TiledPlan(packed)
    return FlexPlan(packed, "FLASH" if attention == "flex_flash" else None)


def uses_flex(packed: PackedViews, attention: AttentionName) -> bool:
    return attention in ("flex", "flex_flash") or (attention == "auto" and packed.token_ids_L.is_cuda)


def padded_for_flex(packed: PackedViews, budget: int = 0) -> PackedViews:
    """The pack at one of four lengths an octave, or at `budget` where that is less and enough (up to a whole tile).

    FlexAttention compiles anew for every length it meets.
    """
    step = max(FLEX_TILE, 1 << max(0, len(packed).bit_length() - 3))
    length = -(-len(packed) // step) * step
    if budget >= len(packed):
        length = min(length, -(-budget // FLEX_TILE) * FLEX_TILE)
    return packed.padded(length)
