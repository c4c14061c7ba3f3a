"""Decoding's forward pass: new tokens through the layers of a block-diffusion model, over a cache of the earlier ones.

The layers are the model's own modules; what differs from its plain forward is what is left out. Tokens stand in one
row whatever their sequences, keys go straight into the cache, and the last layer computes no more than was asked for:
of a finished block, or of a prompt, its keys and values; of a noisy block, the positions that are still masked. The
layers of all families have the same parts, some without norms of queries and keys.

Shapes: T tokens of the pass, N those whose hidden states are wanted, D hidden; H query heads, G key/value
heads, E head dimension, X = H * E.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.flex_attention import raise_recompile_limit
from dirl.rollout.local.block_cache import BlockCache, LayerCache, QueryRows, Rotary

DecoderLayer: TypeAlias = Any  # of Llama, Qwen2, Qwen3, Glm4Moe, ... in transformers


class CachedForward:
    """The pass of one model.

    Args:
        compiled: fuse the small operations around attention with torch.compile; the first passes then take longer.
    """

    def __init__(self, model: BlockDiffusionModel, *, compiled: bool = False) -> None:
        self.model = model
        self._project: Callable[..., tuple[Tensor, Tensor, Tensor]] = compiled_of(_project) if compiled else _project
        self._feed_forward: Callable[..., Tensor] = compiled_of(_feed_forward) if compiled else _feed_forward

    def __call__(
        self,
        cache: BlockCache,
        token_ids_T: Tensor,
        sections: Sequence[QueryRows],
        wanted_N: Tensor | None = None,
        *,
        first_section: int = -1,
    ) -> Tensor:
        """Write the tokens' keys and values to the cache; (N, D), the wanted tokens' last hidden states.

        Args:
            sections: the tokens, in order, as rows of queries.
            wanted_N: indices into the tokens from the first of `first_section` on. None: only the cache is wanted.
            first_section: the first one of which hidden states are wanted.
        """
        inner = self.model.model
        hidden_TD = inner.embed_tokens(token_ids_T)
        rotary = cache.rotary[torch.cat([rows.position_T for rows in sections])]
        entries = cache.entries(sections)
        *layers, last = zip(inner.layers, cache.layers, strict=True)
        for layer, layer_cache in layers:
            query_THE, key_TGE, value_TGE = self._project(layer, hidden_TD, rotary, 0)
            layer_cache.write(entries, key_TGE, value_TGE)
            hidden_TD = self._feed_forward(layer, hidden_TD, _attend(layer, query_THE, layer_cache, sections))
        layer, layer_cache = last
        read = sections[first_section:]
        start = len(hidden_TD) - (0 if wanted_N is None else sum(len(rows.position_T) for rows in read))
        query_THE, key_TGE, value_TGE = self._project(layer, hidden_TD, rotary, start)
        layer_cache.write(entries, key_TGE, value_TGE)
        if wanted_N is None:
            return hidden_TD[:0]
        attended_TX = _attend(layer, query_THE, layer_cache, read)
        hidden_ND = hidden_TD[start:].index_select(0, wanted_N)
        return inner.norm(self._feed_forward(layer, hidden_ND, attended_TX.index_select(0, wanted_N)))


def _project(layer: DecoderLayer, hidden_TD: Tensor, rotary: Rotary, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of the tokens from `start` on, (T - start, H, E); keys and values of all, (T, G, E)."""
    attention, normed_TD = layer.self_attn, layer.input_layernorm(hidden_TD)
    heads = (-1, attention.head_dim)
    query_THE = attention.q_proj(normed_TD[start:]).unflatten(-1, heads)
    key_TGE = attention.k_proj(normed_TD).unflatten(-1, heads)
    if hasattr(attention, "q_norm"):
        query_THE, key_TGE = attention.q_norm(query_THE), attention.k_norm(key_TGE)
    value_TGE = attention.v_proj(normed_TD).unflatten(-1, heads)
    return rotary[start:].turn(query_THE), rotary.turn(key_TGE), value_TGE


def _attend(layer: DecoderLayer, query_THE: Tensor, layer_cache: LayerCache, sections: Sequence[QueryRows]) -> Tensor:
    """What the queries read, heads side by side; (T, H * E)."""
    queries = query_THE.split([len(rows.position_T) for rows in sections])
    scaling = layer.self_attn.scaling
    outputs = [rows.attend(query, *layer_cache, scaling) for query, rows in zip(queries, sections, strict=True)]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)


def _feed_forward(layer: DecoderLayer, hidden_TD: Tensor, attended_TX: Tensor) -> Tensor:
    hidden_TD = hidden_TD + layer.self_attn.o_proj(attended_TX)
    # A mixture of experts wants rows of a batch.
    return hidden_TD + layer.mlp(layer.post_attention_layernorm(hidden_TD)[None])[0]


@cache
def compiled_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for the layers of all models and passes of all sizes."""
    raise_recompile_limit()
    return torch.compile(function, dynamic=True)
