"""SDAR, SDAR-MoE and TraDo: transformers' Qwen3 and Qwen3-MoE with block-diffusion attention.

SDAR is Qwen3 layer for layer, with the same parameter names; only the mask differs: tokens of a block see each other,
and blocks see the blocks before them. Registered with Auto*, so that a directory whose config.json says
`"model_type": "sdar"` loads in plain transformers code too, without remote code.

Source: SDAR (arXiv 2510.06303).
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family, register_weight_names

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


class SDARForCausalLM(BlockDiffusionModel, Qwen3ForCausalLM):
    """Qwen3 with block-diffusion attention."""

    config_class = SDARConfig


class SDARMoeForCausalLM(BlockDiffusionModel, Qwen3MoeForCausalLM):
    """Qwen3-MoE with block-diffusion attention."""

    config_class = SDARMoeConfig


_VALUES: dict[str, Any] = {
    "keeps_published_config": False,  # LMDeploy and SDAR's own code read what transformers writes, plus rope_theta
    "mask_token": "<|MASK|>",
    "stop_tokens": ("<|im_end|>", "<|endoftext|>"),
    "trains_fill": False,
    "decoder": {"confidence_threshold": 0.9, "temperature": 1.0},
    "sft": {"min_noise": 0.1, "max_noise": 0.9},
    "remarks": "TraDo's SFT may take the decoder's own steps as well",
}
SDAR = Family(
    name="SDAR",
    checkpoints="SDAR-1.7B/4B/8B, TraDo-4B/8B-Instruct, TraDo-8B-Thinking",
    model_class=SDARForCausalLM,
    **_VALUES,
)
SDAR_MOE = Family(name="SDAR-MoE", checkpoints="SDAR-30B-A3B", model_class=SDARMoeForCausalLM, **_VALUES)


def _register() -> None:
    for config, model in ((SDARConfig, SDARForCausalLM), (SDARMoeConfig, SDARMoeForCausalLM)):
        AutoConfig.register(config.model_type, config)
        AutoModelForCausalLM.register(config, model)
    register_weight_names(SDARMoeConfig.model_type)


_register()
