"""What a run without numbers (`dry_run.py`) has in place of documents, and of code that needs a GPU or numbers.

It holds what the real thing holds: FlexAttention, which has no backward on a CPU; lm_head in half precision, of which a
GPU makes no float32 copy; and experts, whose loop asks which of them were chosen.

Shapes: L packed tokens, T actions, K experts a token, D hidden, V vocabulary, C tokens of an expert, N batch, H query
heads, G key/value heads, E head dimension.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dirl.diffusion.packing import Actions, TokenTable


def nominal_tokens(num_tokens: int, longest: int, block_length: int) -> TokenTable:
    """A pack as a run's may be: documents of the longest kind, each block clean and in one view.

    Args:
        longest: tokens of a document.
        block_length: 0: full attention, where one document has a view after the other.
    """
    index_L = torch.arange(num_tokens)
    if block_length == 0:
        none_L, view_L = torch.zeros_like(index_L), index_L // longest
        return TokenTable(none_L, index_L % longest, none_L, none_L + 1, none_L, view_L + 1)
    length = max(1, min(longest, num_tokens // 2) // block_length) * block_length
    document_L, place_L = index_L // (2 * length), index_L % (2 * length)
    block_L = place_L % length // block_length
    view_L = torch.where(place_L < length, 0, 1 + block_L + document_L * (length // block_length))
    return TokenTable(torch.zeros_like(index_L), place_L % length, document_L, document_L + 1, block_L, view_L)


def nominal_actions(count: int, per_view: int, *, has_holds: bool) -> Actions:
    """So many actions that all say the same, the last view shorter than the others."""
    whole_T, real_T, yes_T = torch.zeros(count, dtype=torch.int64), torch.zeros(count), torch.zeros(count).bool()
    integers = ("index_T", "target_T", "view_T", "block_T", "branch_T", "completion_index_T")
    numbers = ("weight_T", "importance_T", "threshold_T", "engine_logprob_T")
    columns = dict.fromkeys(integers, whole_T) | dict.fromkeys(numbers, real_T)
    ends = (*range(per_view, count, per_view), count)
    return Actions(**columns, is_reveal_T=yes_T, is_visited_T=yes_T, has_holds=has_holds, view_ends=ends)


class FlexStandIn:
    """FlexAttention's inputs, output and gradients, for any device."""

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        output: Tensor = _Flex.apply(query_NHLE, key_NGLE, value_NGLE)
        return output.transpose(1, 2)


class _Flex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)  # of the exponentials, in logarithms
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        *inputs, _, _ = ctx.saved_tensors
        return tuple(torch.empty_like(tensor) for tensor in inputs)


class HeadStandIn(nn.Module):
    """lm_head on a GPU: float32 logits of half-precision weights, without a float32 copy of these."""

    def __init__(self, weight_VD: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight_VD

    def forward(self, hidden_TD: Tensor) -> Tensor:
        logits_TV: Tensor = _HalfLogits.apply(hidden_TD.to(self.weight.dtype), self.weight)
        return logits_TV


class _HalfLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD)
        return hidden_TD.new_empty(len(hidden_TD), len(weight_VD), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD, weight_VD = ctx.saved_tensors
        gradient_TV = gradients[0].to(weight_VD.dtype)
        return gradient_TV @ weight_VD, gradient_TV.T @ hidden_TD


def _evenly(self: Any, hidden_LD: Tensor, chosen_LK: Tensor, weight_LK: Tensor) -> Tensor:
    """transformers' loop over its experts, each chosen by as many tokens as any other."""
    mask = chosen_LK.new_empty(*chosen_LK.shape, self.num_experts + 1)  # one-hot, alive throughout
    output_LD = torch.zeros_like(hidden_LD)
    for expert in range(self.num_experts):
        count = chosen_LK.numel() * (expert + 1) // self.num_experts - chosen_LK.numel() * expert // self.num_experts
        token_C, slot_C = mask.new_zeros(2, count).unbind(0)
        gate, up = nn.functional.linear(hidden_LD[token_C], self.gate_up_proj[expert]).chunk(2, dim=-1)
        out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
        out = out * weight_LK[token_C, slot_C, None]
        output_LD.index_add_(0, token_C, out.to(output_LD.dtype))
    return output_LD


def choose_evenly(model: nn.Module) -> None:
    """Let every expert of a model be chosen by as many tokens as any other, in place."""
    for module in model.modules():
        if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            module.forward = MethodType(_evenly, module)
