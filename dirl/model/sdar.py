"""SDAR and SDAR-MoE: transformers' Qwen3 and Qwen3-MoE with block-diffusion attention.

SDAR is Qwen3 layer for layer, with the same parameter names; only the mask differs: tokens of a block see each other,
and blocks see the blocks before them. Registered with Auto*, so that a directory whose config.json says
`"model_type": "sdar"` loads without remote code.

A plain call, `model(input_ids)`, applies the block mask to clean rows. The packed forward of training hands in
an `attention_plan` of its own; decoding runs the layers itself (`cached_forward.py`).

Source: SDAR (arXiv 2510.06303).
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from dirl.model.attention import ATTENTION_NAME, AttentionPlan, DensePlan

SDAR_MASK_TOKEN_ID = 151669  # <|MASK|> in SDAR's vocabulary


class SDARConfig(Qwen3Config):
    """Qwen3's configuration plus what block diffusion needs."""

    model_type = "sdar"
    block_size: int = 4  # block_length everywhere else in this package; SDAR's checkpoints call it block_size
    mask_token_id: int = SDAR_MASK_TOKEN_ID
    tokenizer_length: int | None = None  # ids from here on have no token and are never sampled; None: vocab_size


class SDARMoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration plus what block diffusion needs."""

    model_type = "sdar_moe"
    block_size: int = 4
    mask_token_id: int = SDAR_MASK_TOKEN_ID
    tokenizer_length: int | None = None


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices of any one precision, accumulated and kept in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _LogitsOfHalfPrecision(torch.autograd.Function):
    """Float32 logits of half-precision hidden states and weights; gradients as nn.Linear's."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD)
        return float32_product(hidden_TD, weight_VD.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        hidden_TD, weight_VD = ctx.saved_tensors
        gradient_TV = gradients[0].to(weight_VD.dtype)
        return gradient_TV @ weight_VD, gradient_TV.T @ hidden_TD


class LogitsHead(nn.Linear):
    """Float32 logits, whatever the weights' precision and autocast: rounding them moves every logprob."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            if self.weight.dtype == torch.float32:
                return super().forward(input.float())
            rows_TD = input.to(self.weight.dtype).flatten(0, -2)
            logits_TV: Tensor = _LogitsOfHalfPrecision.apply(rows_TD, self.weight)
            return logits_TV.unflatten(0, input.shape[:-1])


class _BlockDiffusion:
    """What both models share; stands before the transformers class in the order of resolution."""

    config: Any  # SDARConfig or SDARMoeConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_plan: AttentionPlan | None = None,
        **kwargs: Any,  # transformers' own forward options
    ) -> Any:
        """Logits under the block mask, or under `attention_plan` where one is given.

        Args:
            input_ids: (N, L); blocks are aligned to position 0 of each row.
            attention_mask: (N, L), 1 where a token is real; rows are padded on the right.
        """
        if attention_plan is None:
            if input_ids is None:
                raise ValueError("SDAR needs input_ids to build its block mask")
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
            is_token = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            attention_plan = DensePlan.block_causal(position_ids, is_token.bool(), self.config.block_size)
        kwargs["use_cache"] = False  # decoding has its own forward pass and cache
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, position_ids=position_ids, attention_plan=attention_plan, **kwargs
        )


class SDARForCausalLM(_BlockDiffusion, Qwen3ForCausalLM):
    """Qwen3 with block-diffusion attention."""

    config_class = SDARConfig

    def __init__(self, config: SDARConfig) -> None:
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)
        self.lm_head.__class__ = LogitsHead  # the same parameter, tied or not


class SDARMoeForCausalLM(_BlockDiffusion, Qwen3MoeForCausalLM):
    """Qwen3-MoE with block-diffusion attention."""

    config_class = SDARMoeConfig

    def __init__(self, config: SDARMoeConfig) -> None:
        config._attn_implementation = ATTENTION_NAME
        super().__init__(config)
        self.lm_head.__class__ = LogitsHead  # the same parameter, tied or not


BlockDiffusionModel: TypeAlias = SDARForCausalLM | SDARMoeForCausalLM


def _register() -> None:
    for config, model in ((SDARConfig, SDARForCausalLM), (SDARMoeConfig, SDARMoeForCausalLM)):
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, model)
    # Without Qwen3-MoE's mapping the experts of a checkpoint would be left at random values, with a report only.
    mapping = get_checkpoint_conversion_mapping("qwen3_moe")
    if mapping is None:
        raise ImportError("this transformers version has no checkpoint mapping for qwen3_moe; install 5.10 or newer")
    register_checkpoint_conversion_mapping("sdar_moe", mapping, overwrite=True)


_register()
