"""The KV cache of block decoding: S slots of fixed length, written in place, read up to the end of a query's block.

One forward pass may hold tokens of many slots, several blocks each: the clean block that was just finished and the
noisy block that follows it, or a whole prompt. Every token writes its key and value at (slot, position) and then reads
the positions before the end of its own block, so that finishing a block and starting the next is one pass. A noisy
block's entries are overwritten by its clean ones before any later block reads them.

Shapes: S slots, L cache length, T tokens of a pass, R rows (slots in use), W tokens a row at most, H and G heads.
"""

from __future__ import annotations

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


class CachePlan:
    """Attention of one decoding pass over a BlockCache.

    Args:
        slot_T, position_T: where each token of the pass belongs; the tokens of a slot stand together.
        row_T, lane_T: the token's place in the padded (R, W) layout of queries.
        slot_R: slot of each row; None: row i is slot i and every slot has a row.
    """

    def __init__(
        self, cache: BlockCache, slot_T: Tensor, position_T: Tensor, *, block_length: int, rows: RowLayout
    ) -> None:
        self.cache, self.slot_T, self.position_T, self.rows = cache, slot_T, position_T, rows
        end_T = (position_T // block_length + 1) * block_length
        # Padding lanes read position 0 only: softmax over nothing is NaN.
        end_RW = torch.ones(rows.shape, dtype=end_T.dtype, device=end_T.device)
        end_RW[rows.row_T, rows.lane_T] = end_T
        self.read_length = int(end_T.max())
        key_position = torch.arange(self.read_length, device=end_T.device)
        self.mask_R1WL = (key_position < end_RW[..., None])[:, None]

    def attend(self, layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slot_T, :, self.position_T] = key_BGLD[0].transpose(0, 1)
        values[self.slot_T, :, self.position_T] = value_BGLD[0].transpose(0, 1)
        if self.rows.slot_R is not None:
            keys, values = keys[self.rows.slot_R], values[self.rows.slot_R]
        query_THD = query_BHLD[0].transpose(0, 1)
        query_RWHD = query_THD.new_zeros(*self.rows.shape, *query_THD.shape[1:])
        query_RWHD[self.rows.row_T, self.rows.lane_T] = query_THD
        output = masked_attention(
            query_RWHD.transpose(1, 2),
            keys[:, :, : self.read_length],
            values[:, :, : self.read_length],
            self.mask_R1WL,
            scaling,
        )
        return output.transpose(1, 2)[self.rows.row_T, self.rows.lane_T][None]


class RowLayout:
    """Tokens of a pass laid out as padded rows, one row a slot."""

    def __init__(self, row_T: Tensor, lane_T: Tensor, num_rows: int, slot_R: Tensor | None) -> None:
        self.row_T, self.lane_T, self.slot_R = row_T, lane_T, slot_R
        self.shape = (num_rows, int(lane_T.max()) + 1)
