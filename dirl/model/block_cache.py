"""The KV cache of block decoding: S slots of fixed length, written in place, read up to the end of a query's block.

One forward pass may hold tokens of many slots, several blocks each: the clean block that was just finished and the
noisy block that follows it, or a whole prompt. Every token writes its key and value at (slot, position) and then reads
the positions before the end of its own block, so that finishing a block and starting the next is one pass. A noisy
block's entries are overwritten by its clean ones before any later block reads them.

Shapes: S slots, L cache length, T tokens of a pass, R rows (slots in use), W tokens a row at most, H and G heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class QueryRows:
    """Tokens of a pass that stand together, as R rows of W queries: one row a slot."""

    tokens: slice  # which of the pass
    slot_R: Tensor | None  # slot of each row; None: row i is slot i and every slot has a row
    place: tuple[Tensor, Tensor] | None  # row and lane of each token; None: the tokens fill the rows in order
    mask_R1WL: Tensor  # bool, keys each query may read; W is 1 where a row's queries read the same keys
    num_lanes: int  # W

    @classmethod
    def of_blocks(
        cls, tokens: slice, slot_X: Tensor, block_X: Tensor, *, num_slots: int | None, block_length: int
    ) -> QueryRows:
        """One block of each of some slots, which reads up to its own end.

        Args:
            num_slots: of the cache, to read it in place, with a padding row for every slot that is not among them;
                None: copy what these slots hold.
        """
        lane_B = torch.arange(block_length, device=slot_X.device)
        end_R, place, slot_R = (block_X + 1) * block_length, None, slot_X if num_slots is None else None
        if num_slots is not None and len(slot_X) < num_slots:
            # Padding rows read position 0 only: softmax over nothing is NaN.
            end_R = torch.ones(num_slots, dtype=end_R.dtype, device=end_R.device).index_put((slot_X,), end_R)
            place = (slot_X.repeat_interleave(block_length), lane_B.repeat(len(slot_X)))
        return cls(tokens, slot_R, place, _reads_up_to(end_R[:, None]), block_length)

    @classmethod
    def of_prompts(cls, slot_R: Tensor, row_T: Tensor, position_T: Tensor, block_length: int) -> QueryRows:
        """Whole prompts from position 0 on, of different lengths."""
        num_lanes = int(position_T.max()) + 1
        end_RW = torch.ones(len(slot_R), num_lanes, dtype=torch.int64, device=slot_R.device)
        end_RW[row_T, position_T] = (position_T // block_length + 1) * block_length
        return cls(slice(None), slot_R, (row_T, position_T), _reads_up_to(end_RW), num_lanes)

    def attend(self, query_THD: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Output of these tokens, (T, H, D)."""
        query_THD, read_length = query_THD[self.tokens], self.mask_R1WL.shape[-1]
        keys, values = keys[:, :, :read_length], values[:, :, :read_length]
        if self.slot_R is not None:
            keys, values = keys[self.slot_R], values[self.slot_R]
        if self.place is None:
            query_RWHD = query_THD.unflatten(0, (-1, self.num_lanes))
        else:
            query_RWHD = query_THD.new_zeros(len(self.mask_R1WL), self.num_lanes, *query_THD.shape[1:])
            query_RWHD[self.place] = query_THD
        output_RWHD = masked_attention(query_RWHD.transpose(1, 2), keys, values, self.mask_R1WL, scaling).transpose(
            1, 2
        )
        return output_RWHD.flatten(0, 1) if self.place is None else output_RWHD[self.place]


def _reads_up_to(end_RW: Tensor) -> Tensor:
    """True at the key positions before each query's end; (R, 1, W, L)."""
    return (torch.arange(int(end_RW.max()), device=end_RW.device) < end_RW[..., None])[:, None]


class CachePlan:
    """Attention of one decoding pass over a BlockCache.

    Args:
        slot_T, position_T: where each token of the pass belongs.
        parts: the same tokens as rows of queries, in order.
    """

    def __init__(self, cache: BlockCache, slot_T: Tensor, position_T: Tensor, parts: Sequence[QueryRows]) -> None:
        self.cache, self.slot_T, self.position_T, self.parts = cache, slot_T, position_T, parts

    def attend(self, layer: int, query_BHLD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, scaling: float) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.slot_T, :, self.position_T] = key_BGLD[0].transpose(0, 1)
        values[self.slot_T, :, self.position_T] = value_BGLD[0].transpose(0, 1)
        query_THD = query_BHLD[0].transpose(0, 1)
        return torch.cat([part.attend(query_THD, keys, values, scaling) for part in self.parts])[None]
