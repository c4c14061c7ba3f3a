"""The KV cache of block decoding: S slots of fixed length, written in place, read up to the end of a query's block.

One forward pass may hold tokens of many slots, several blocks each: the clean block that was just finished and the
noisy block that follows it, or a whole prompt. Every token writes its key and value at (slot, position) and then reads
the positions before the end of its own block, so that finishing a block and starting the next is one pass. A noisy
block's entries are overwritten by its clean ones before any later block reads them.

Shapes: S slots, X some of them, L cache length, B block length, T tokens of a pass, R rows of queries, W lanes a row,
H and G heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from dirl.model.attention import masked_attention
from dirl.model.sdar import BlockDiffusionModel


class BlockCache:
    """Keys and values of every layer; (S, G, L, D) each."""

    def __init__(self, model: BlockDiffusionModel, num_slots: int, length: int) -> None:
        config, like = model.config, next(model.parameters())
        shape = (num_slots, config.num_key_value_heads, length, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(key) for key in self.keys]

    def copy_slots(self, source_N: Tensor, target_N: Tensor, length: int) -> None:
        """Copy the first `length` positions of some slots to others, for prompts that stand several times."""
        for tensor in (*self.keys, *self.values):
            tensor[target_N, :, :length] = tensor[source_N, :, :length]

    def keep_slots(self, slot_N: Tensor) -> None:
        """Drop all slots but these, which are renumbered in order."""
        self.keys = [key.index_select(0, slot_N) for key in self.keys]
        self.values = [value.index_select(0, slot_N) for value in self.values]


class QueryRows(Protocol):
    """Tokens of a pass that stand together, laid out as rows of queries, one row a slot."""

    def attend(self, query_THD: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Output of these tokens, (T, H, D), from a layer's whole cache."""
        ...


class BlockRows:
    """One block of each of some slots; its queries read up to the block's own end.

    Where at least half of the cache's slots are among them it is read in place, with a padding row for each of the
    others; otherwise what these slots hold is copied.

    Args:
        slot_X, block_X: the slots, each once, and which block of theirs it is.
        num_slots: of the cache.
    """

    def __init__(self, slot_X: Tensor, block_X: Tensor, num_slots: int, block_length: int) -> None:
        reads_in_place = 2 * len(slot_X) >= num_slots
        self.slot_X, self.block_length = slot_X, block_length
        self.end_X = (block_X + 1) * block_length
        self.slot_R: Tensor | None = None if reads_in_place else slot_X
        self.row_X: Tensor | None = None  # row of each slot; None: in order
        end_R = self.end_X
        if reads_in_place and len(slot_X) < num_slots:
            # Padding rows read position 0 only: softmax over nothing is NaN.
            end_R = torch.ones(num_slots, dtype=torch.int64, device=slot_X.device).index_put((slot_X,), self.end_X)
            self.row_X = slot_X
        self.mask_R11L = _reads_up_to(end_R[:, None])

    def attend(self, query_THD: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        query_XBHD = query_THD.unflatten(0, (-1, self.block_length))
        flash = flash_decode(query_THD.device.type, query_THD.dtype)
        if flash is not None:
            return flash(
                query_XBHD,
                keys.transpose(1, 2),
                values.transpose(1, 2),
                cache_seqlens=self.end_X.int(),
                cache_batch_idx=self.slot_X.int(),
                softmax_scale=scaling,
                causal=False,
            ).flatten(0, 1)
        query_RBHD = query_XBHD
        if self.row_X is not None:
            query_RBHD = query_THD.new_zeros(len(self.mask_R11L), *query_XBHD.shape[1:])
            query_RBHD[self.row_X] = query_XBHD
        keys, values = _read(keys, values, self.slot_R, self.mask_R11L.shape[-1])
        output_RBHD = masked_attention(query_RBHD.transpose(1, 2), keys, values, self.mask_R11L, scaling).transpose(
            1, 2
        )
        return (output_RBHD if self.row_X is None else output_RBHD[self.row_X]).flatten(0, 1)


class PromptRows:
    """Whole prompts from position 0 on, of different lengths, one row each.

    Args:
        slot_R: slot of each prompt.
        row_T, position_T: prompt and position of each token.
    """

    def __init__(self, slot_R: Tensor, row_T: Tensor, position_T: Tensor, block_length: int) -> None:
        self.slot_R, self.place = slot_R, (row_T, position_T)
        end_RW = torch.ones(len(slot_R), int(position_T.max()) + 1, dtype=torch.int64, device=slot_R.device)
        end_RW[self.place] = (position_T // block_length + 1) * block_length
        self.mask_R1WL = _reads_up_to(end_RW)

    def attend(self, query_THD: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        num_rows, _, num_lanes, read_length = self.mask_R1WL.shape
        query_RWHD = query_THD.new_zeros(num_rows, num_lanes, *query_THD.shape[1:])
        query_RWHD[self.place] = query_THD
        keys, values = _read(keys, values, self.slot_R, read_length)
        output_RHWD = masked_attention(query_RWHD.transpose(1, 2), keys, values, self.mask_R1WL, scaling)
        return output_RHWD.transpose(1, 2)[self.place]


def _read(keys: Tensor, values: Tensor, slot_R: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    keys, values = keys[:, :, :length], values[:, :, :length]
    if slot_R is None:
        return keys, values
    return keys.index_select(0, slot_R), values.index_select(0, slot_R)


def _reads_up_to(end_RW: Tensor) -> Tensor:
    """True at the key positions before each query's end; (R, 1, W, L)."""
    return (torch.arange(int(end_RW.max()), device=end_RW.device) < end_RW[..., None])[:, None]


@cache
def flash_decode(device: str, dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """flash-attn's attention over a KV cache where that package is installed and this device and dtype can use it.

    It reads each slot in place and up to its own length: no padding, no copies.
    """
    if device != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


class CachePlan:
    """Attention of one decoding pass over a BlockCache.

    Args:
        slot_T, position_T: where each token of the pass belongs.
        parts: the same tokens as rows of queries, in order, each with the number of its tokens.
    """

    def __init__(
        self, cache: BlockCache, slot_T: Tensor, position_T: Tensor, parts: Sequence[tuple[int, QueryRows]]
    ) -> None:
        self.cache, self.slot_T, self.position_T, self.parts = cache, slot_T, position_T, parts

    def attend(self, layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slot_T, :, self.position_T] = key_BGLD[0].transpose(0, 1)
        values[self.slot_T, :, self.position_T] = value_BGLD[0].transpose(0, 1)
        queries = query_BHLD[0].transpose(0, 1).split([num_tokens for num_tokens, _ in self.parts])
        outputs = [
            rows.attend(query_THD, keys, values, scaling)
            for query_THD, (_, rows) in zip(queries, self.parts, strict=True)
        ]
        return torch.cat(outputs)[None]
