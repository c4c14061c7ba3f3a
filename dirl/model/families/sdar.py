"""SDAR and SDAR-MoE: transformers' Qwen3 and Qwen3-MoE with block-diffusion attention.

SDAR is Qwen3 layer for layer, with the same parameter names; only the mask differs: tokens of a block see each other,
and blocks see the blocks before them. Registered with Auto*, so that a directory whose config.json says
`"model_type": "sdar"` loads without remote code.

Source: SDAR (arXiv 2510.06303).
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from dirl.model.families.block_diffusion import BlockDiffusionModel

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
