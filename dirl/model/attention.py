"""Queries, keys and values of a forward pass -> attention output, by one of several plans behind one call.

A plan knows which keys each query reads and computes just that. It is built once per forward pass from the ids of the
packed tokens and travels to every layer through transformers' attention interface, as the keyword `attention_plan`:

    DensePlan   a boolean mask; plain forward passes and tests
    TiledPlan   SDPA over batches of small tiles (`tiled_attention.py`); any device, the CPU's training path
    FlexPlan    FlexAttention with a block-sparse mask (`flex_attention.py`); CUDA's training path

Shapes: N batch, L tokens, H query heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dirl.diffusion.packing import TokenTable, attention_rule

ATTENTION_NAME = "dirl_block_diffusion"  # the name transformers knows the function below by


class AttentionPlan(Protocol):
    """Which keys each query of a forward pass reads."""

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        """Attention output, (N, L, H, E)."""
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
        raise ValueError("a block-diffusion model needs an attention_plan; call the model itself, not its inner one")
    return attention_plan.attend(query, key, value, scaling), None


AttentionInterface.register(ATTENTION_NAME, _attend)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """SDPA with a mask (N, 1, Q or 1, K; True = may read, or numbers to add) and grouped heads; (N, H, Q, E).

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

    def __init__(self, mask_NLL: Tensor) -> None:
        self.mask_N1LL = mask_NLL[:, None]

    @classmethod
    def packed(cls, tokens: TokenTable) -> DensePlan:
        """The rule of the package as an L x L mask: the oracle of the other plans."""
        return cls(attention_rule(tuple(i[:, None] for i in tokens.ids), tuple(i[None, :] for i in tokens.ids))[None])

    @classmethod
    def block_causal(cls, position_NL: Tensor, is_token_NL: Tensor, block_length: int) -> DensePlan:
        """Clean sequences, one per row: full attention inside a block, causal between blocks; padding is not read."""
        block_NL = position_NL // block_length
        mask_NLL = (block_NL[:, :, None] >= block_NL[:, None, :]) & is_token_NL[:, None, :]
        # A padding query may read nothing; give it itself, since softmax over nothing is NaN.
        return cls(mask_NLL | torch.eye(mask_NLL.shape[1], dtype=torch.bool, device=mask_NLL.device))

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        return masked_attention(query_NHLE, key_NGLE, value_NGLE, self.mask_N1LL, scaling).transpose(1, 2)
