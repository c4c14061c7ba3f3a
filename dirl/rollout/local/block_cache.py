"""The KV cache of block decoding: S slots of fixed length, written in place, read up to the end of a query's block.

One forward pass may have tokens of many slots, several blocks each: whole prompts, clean blocks that were just finished
and the noisy blocks that follow either. Every token writes its key and value at (slot, position) and then reads the
positions before the end of its own block, so that reading a prompt or finishing a block and starting the next is one
pass. A noisy block's entries are overwritten by its clean ones before any later block reads them.

Shapes: S slots, A some of them, L cache length, B block length, T tokens of a pass, C cache entries they write, R rows
of queries, W lanes a row, H query heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dirl.model.attention import masked_attention
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.local.slots import padded

_IN_PLACE_FROM = 2 / 3  # share of the slots that are read; below it copying them takes less than padding rows


@dataclass(frozen=True)
class Entries:
    """Which token is written where: `place_C` counts positions in the cache's slots laid end to end."""

    place_C: Tensor
    token_C: Tensor | None  # None: each token once, in order


class LayerCache(NamedTuple):
    """One layer's keys and values; (S, L, G, E) each."""

    keys: Tensor
    values: Tensor

    def write(self, entries: Entries, key_TGE: Tensor, value_TGE: Tensor) -> None:
        """Store keys and values of a pass's tokens."""
        for tensor, new_TGE in zip(self, (key_TGE, value_TGE), strict=True):
            new = new_TGE.flatten(1)  # a token's heads in one row: copied in one piece
            if entries.token_C is not None:
                new = new.index_select(0, entries.token_C)
            tensor.flatten(0, 1).flatten(1)[entries.place_C] = new.to(tensor.dtype)


class Rotary:
    """Rotary embedding of some positions: cosines, and sines whose first half is negated, (T, 1, E) each.

    Some models turn only the first numbers of a head: E is as many.
    """

    def __init__(self, cosine_T1E: Tensor, signed_sine_T1E: Tensor) -> None:
        self.cosine_T1E, self.signed_sine_T1E = cosine_T1E, signed_sine_T1E

    @classmethod
    def up_to(cls, length: int, model: BlockDiffusionModel, like: Tensor) -> Rotary:
        """Of the positions 0 to length - 1."""
        position_1T = torch.arange(length, device=like.device)[None]
        cosine_T1E, sine_T1E = (x[0, :, None] for x in model.model.rotary_emb(like, position_1T))
        first, second = sine_T1E.chunk(2, dim=-1)
        return cls(cosine_T1E, torch.cat([-first, second], dim=-1))

    def __getitem__(self, positions: slice | Tensor) -> Rotary:
        return Rotary(self.cosine_T1E[positions], self.signed_sine_T1E[positions])

    def turn(self, heads_THE: Tensor) -> Tensor:
        """Queries or keys of those positions, turned."""
        if (num_turned := self.cosine_T1E.shape[-1]) < heads_THE.shape[-1]:
            turned, rest = heads_THE[..., :num_turned], heads_THE[..., num_turned:]
            return torch.cat([self.turn(turned), rest], dim=-1)
        swapped_THE = heads_THE.roll(heads_THE.shape[-1] // 2, dims=-1)
        return (heads_THE * self.cosine_T1E).add_(swapped_THE.mul_(self.signed_sine_T1E))


class BlockCache:
    """Keys and values of every layer, and the rotary embedding of every position.

    Args:
        dtype: of keys and values; None: that of the weights.
    """

    def __init__(
        self, model: BlockDiffusionModel, num_slots: int, length: int, dtype: torch.dtype | None = None
    ) -> None:
        config, like = model.config, next(model.parameters())
        head_dim = model.model.layers[0].self_attn.head_dim  # not every configuration says
        shape = (num_slots, length, config.num_key_value_heads, head_dim)

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)

        self.rotary = Rotary.up_to(length, model, like)
        self.layers = [LayerCache(zeros(), zeros()) for _ in range(config.num_hidden_layers)]

    @property
    def keys(self) -> Tensor:
        """Of the first layer: all have its shape, precision and device."""
        return self.layers[0].keys

    def entries(self, sections: Sequence[QueryRows]) -> Entries:
        """What the tokens of a pass write, for `LayerCache.write` in every layer."""
        *starts, num_tokens = accumulate((len(rows.position_T) for rows in sections), initial=0)
        length = self.keys.shape[1]
        place_C = torch.cat([rows.slot_C * length + rows.position_T[rows.token_C] for rows in sections])
        token_C = torch.cat([rows.token_C + start for rows, start in zip(sections, starts, strict=True)])
        return Entries(place_C, None if len(token_C) == num_tokens else token_C)

    def resize(self, model: BlockDiffusionModel, num_slots: int, length: int) -> None:
        """More slots, or longer ones; layer by layer, so that little is held twice."""
        if length > self.keys.shape[1]:
            self.rotary = Rotary.up_to(length, model, next(model.parameters()))
        for index, layer in enumerate(self.layers):
            self.layers[index] = LayerCache(*(padded(tensor, num_slots, length) for tensor in layer))

    def keep_slots(self, slot_N: Tensor) -> None:
        """Drop all slots but these; slot_N[i] becomes slot i. Only those that change their number are copied."""
        target_M = (slot_N != torch.arange(len(slot_N), device=slot_N.device)).nonzero().squeeze(1)
        for layer in self.layers:
            for tensor in layer:
                tensor[target_M] = tensor[slot_N[target_M]]
        self.layers = [LayerCache(keys[: len(slot_N)], values[: len(slot_N)]) for keys, values in self.layers]


class QueryRows(Protocol):
    """Tokens of a pass that stand together, laid out as rows of queries, one row a slot."""

    position_T: Tensor
    token_C: Tensor  # which of these tokens ...
    slot_C: Tensor  # ... is written to which slot; each at least once
    last_token_C: Tensor  # the last token ...
    last_slot_C: Tensor  # ... of each slot's row

    def attend(self, query_THE: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Output of these tokens, (T, H, E), from a layer's whole cache, (S, L, G, E) each."""
        ...


class BlockRows:
    """One block of each of some slots; its queries read up to the block's own end.

    Where most of the cache's slots are among them it is read in place, with a padding row for each of the others;
    otherwise the entries of these slots are copied.

    Args:
        slot_A, start_A: the slots, each once, and at which position the block begins.
        keys: of any layer of the cache they will read, (S, L, G, E).
    """

    def __init__(self, slot_A: Tensor, start_A: Tensor, keys: Tensor, block_length: int) -> None:
        num_slots = len(keys)
        reads_in_place = len(slot_A) >= _IN_PLACE_FROM * num_slots
        self.slot_A, self.block_length = slot_A, block_length
        self.flash = flash_decode(keys.device.type, keys.dtype)
        self.end_A = start_A + block_length
        lane_B = torch.arange(block_length, device=slot_A.device)
        self.position_T = (start_A[:, None] + lane_B).flatten()
        self.slot_C = slot_A.repeat_interleave(block_length)
        self.token_C = torch.arange(len(self.slot_C), device=slot_A.device)
        self.last_token_C, self.last_slot_C = self.token_C[block_length - 1 :: block_length], slot_A
        self.slot_R: Tensor | None = None if reads_in_place else slot_A
        self.row_A: Tensor | None = None  # row of each slot; None: in order
        end_R = self.end_A
        if reads_in_place and len(slot_A) < num_slots:
            # Padding rows read position 0 only: softmax over nothing is NaN.
            end_R = torch.ones(num_slots, dtype=torch.int64, device=slot_A.device).index_put((slot_A,), self.end_A)
            self.row_A = slot_A
        self.mask_R11L = _reads_up_to(end_R[:, None], keys.dtype)

    def attend(self, query_THE: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        query_ABHE = query_THE.to(keys.dtype).unflatten(0, (-1, self.block_length))
        if self.flash is not None:
            return self.flash(
                query_ABHE,
                keys,
                values,
                cache_seqlens=self.end_A.int(),
                cache_batch_idx=self.slot_A.int(),
                softmax_scale=scaling,
                causal=False,
            ).flatten(0, 1)
        query_RBHE = query_ABHE
        if self.row_A is not None:
            query_RBHE = query_ABHE.new_zeros(len(self.mask_R11L), *query_ABHE.shape[1:])
            query_RBHE[self.row_A] = query_ABHE
        keys, values = read_slots(keys, values, self.slot_R, self.mask_R11L.shape[-1])
        output_RBHE = masked_attention(query_RBHE.transpose(1, 2), keys, values, self.mask_R11L, scaling).transpose(
            1, 2
        )
        return (output_RBHE if self.row_A is None else output_RBHE[self.row_A]).flatten(0, 1)


class PromptRows:
    """The full blocks of distinct prompts from position 0 on, of different lengths, one row each.

    Args:
        lengths: of the prompts, which end with a block; the first one may lack tokens.
        slots: those of each prompt; the first one's keys are read, the others receive the same.
        keys: of any layer of the cache they will read, (S, L, G, E).
    """

    def __init__(self, lengths: Sequence[int], slots: Sequence[Sequence[int]], keys: Tensor, block_length: int) -> None:
        device, length_R = keys.device, torch.tensor(lengths, device=keys.device)
        copies = [(row, slot) for row, of_prompt in enumerate(slots) for slot in of_prompt]
        self.slot_R = torch.tensor([of_prompt[0] for of_prompt in slots], device=device)
        self.position_T = torch.cat([torch.arange(length, device=device) for length in lengths])
        self.place = (torch.arange(len(lengths), device=device).repeat_interleave(length_R), self.position_T)
        tokens = torch.arange(len(self.position_T), device=device).split(list(lengths))
        self.token_C = torch.cat([tokens[row] for row, _ in copies])
        self.slot_C = torch.cat([torch.full_like(tokens[row], slot) for row, slot in copies])
        self.last_token_C = torch.stack([tokens[row][-1] for row, _ in copies])
        self.last_slot_C = torch.tensor([slot for _, slot in copies], device=device)
        end_RW = torch.ones(len(lengths), max(lengths), dtype=torch.int64, device=device)
        lead_T = (-length_R % block_length)[self.place[0]]
        end_RW[self.place] = ((self.position_T + lead_T) // block_length + 1) * block_length - lead_T
        self.mask_R1WL = _reads_up_to(end_RW, keys.dtype)

    def attend(self, query_THE: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        num_rows, _, num_lanes, read_length = self.mask_R1WL.shape
        query_RWHE = keys.new_zeros(num_rows, num_lanes, *query_THE.shape[1:])
        query_RWHE[self.place] = query_THE.to(keys.dtype)
        keys, values = read_slots(keys, values, self.slot_R, read_length)
        output_RHWE = masked_attention(query_RWHE.transpose(1, 2), keys, values, self.mask_R1WL, scaling)
        return output_RHWE.transpose(1, 2)[self.place]


def read_slots(keys: Tensor, values: Tensor, slot_R: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """The first positions of some slots, or of all, as attention wants them; (R, G, length, E) each."""
    keys, values = keys[:, :length], values[:, :length]
    if slot_R is not None:
        keys, values = keys.index_select(0, slot_R), values.index_select(0, slot_R)
    return keys.transpose(1, 2), values.transpose(1, 2)


def _reads_up_to(end_RW: Tensor, dtype: torch.dtype) -> Tensor:
    """0 at the key positions before each query's end, -inf after it; (R, 1, W, L).

    Added to scores; SDPA would make the same of a boolean mask, in every layer anew.
    """
    is_after_R1WL = (torch.arange(int(end_RW.max()), device=end_RW.device) >= end_RW[..., None])[:, None]
    return torch.zeros(is_after_R1WL.shape, dtype=dtype, device=end_RW.device).masked_fill_(is_after_R1WL, -torch.inf)


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
