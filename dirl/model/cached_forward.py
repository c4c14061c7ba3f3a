"""Decoding's forward pass: new tokens through the layers of a block-diffusion model, over a cache of the earlier ones.

The layers are the model's own modules; what differs from its plain forward is what is left out. Tokens stand in one
row whatever their sequences, keys go straight into the cache, and the last layer computes no more than was asked for:
of a finished block, or of a prompt, its keys and values; of a noisy block, the positions that are still masked.

Shapes: T tokens of the pass, N those whose hidden states are wanted, D hidden; H, G heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dirl.model.block_cache import BlockCache, Entries, QueryRows
from dirl.model.sdar import BlockDiffusionModel

DecoderLayer: TypeAlias = Any  # Qwen3DecoderLayer or Qwen3MoeDecoderLayer
Attention: TypeAlias = Any  # its `self_attn`


def cached_forward(
    model: BlockDiffusionModel,
    cache: BlockCache,
    token_ids_T: Tensor,
    parts: Sequence[QueryRows],
    wanted_N: Tensor | None = None,
) -> Tensor:
    """Write the tokens' keys and values to the cache; (N, D), the wanted tokens' last hidden states.

    Args:
        parts: the tokens, in order, as rows of queries; none reads what a later pass writes.
        wanted_N: indices into the last part's tokens. None: only the cache is wanted.
    """
    inner = model.model
    hidden_TD = inner.embed_tokens(token_ids_T)
    rotary = _Rotary.at(inner.rotary_emb, hidden_TD, torch.cat([rows.position_T for rows in parts]))
    entries = cache.entries(parts)
    *layers, last = inner.layers
    for layer in layers:
        normed_TD = layer.input_layernorm(hidden_TD)
        _write(layer.self_attn, normed_TD, rotary, cache, entries)
        attended_TX = _attend(layer.self_attn, normed_TD, rotary, cache, parts)
        hidden_TD = _feed_forward(layer, hidden_TD, attended_TX)
    normed_TD = last.input_layernorm(hidden_TD)
    _write(last.self_attn, normed_TD, rotary, cache, entries)
    if wanted_N is None:
        return hidden_TD[:0]
    asked = slice(len(hidden_TD) - len(parts[-1].position_T), None)
    attended_TX = _attend(last.self_attn, normed_TD[asked], rotary[asked], cache, parts[-1:])
    return inner.norm(_feed_forward(last, hidden_TD[asked][wanted_N], attended_TX[wanted_N]))


class _Rotary:
    """Rotary embedding at the tokens' positions: cosines, and sines whose first half is negated, (T, 1, E) each."""

    def __init__(self, cosine_T1E: Tensor, signed_sine_T1E: Tensor) -> None:
        self.cosine_T1E, self.signed_sine_T1E = cosine_T1E, signed_sine_T1E

    @classmethod
    def at(cls, embedding: nn.Module, like: Tensor, position_T: Tensor) -> _Rotary:
        cosine_T1E, sine_T1E = (x[0, :, None] for x in embedding(like, position_T[None]))
        first, second = sine_T1E.chunk(2, dim=-1)
        return cls(cosine_T1E, torch.cat([-first, second], dim=-1))

    def __getitem__(self, tokens: slice) -> _Rotary:
        return _Rotary(self.cosine_T1E[tokens], self.signed_sine_T1E[tokens])

    def turn(self, heads_THE: Tensor) -> Tensor:
        swapped_THE = heads_THE.roll(heads_THE.shape[-1] // 2, dims=-1)
        return (heads_THE * self.cosine_T1E).add_(swapped_THE.mul_(self.signed_sine_T1E))


def _write(attention: Attention, normed_TD: Tensor, rotary: _Rotary, cache: BlockCache, entries: Entries) -> None:
    key_TGE, value_TGE = (
        projection(normed_TD).unflatten(-1, (-1, attention.head_dim))
        for projection in (attention.k_proj, attention.v_proj)
    )
    cache.write(attention.layer_idx, entries, rotary.turn(attention.k_norm(key_TGE)), value_TGE)


def _attend(
    attention: Attention, normed_TD: Tensor, rotary: _Rotary, cache: BlockCache, parts: Sequence[QueryRows]
) -> Tensor:
    """What the tokens' queries read, heads side by side; (T, H * E)."""
    query_THE = attention.q_norm(attention.q_proj(normed_TD).unflatten(-1, (-1, attention.head_dim)))
    queries = rotary.turn(query_THE).split([len(rows.position_T) for rows in parts])
    keys, values = cache.keys[attention.layer_idx], cache.values[attention.layer_idx]
    outputs = [rows.attend(query, keys, values, attention.scaling) for query, rows in zip(queries, parts, strict=True)]
    return torch.cat(outputs).flatten(1)


def _feed_forward(layer: DecoderLayer, hidden_TD: Tensor, attended_TX: Tensor) -> Tensor:
    hidden_TD = hidden_TD + layer.self_attn.o_proj(attended_TX)
    # A mixture of experts wants rows of a batch.
    return hidden_TD + layer.mlp(layer.post_attention_layernorm(hidden_TD)[None])[0]
