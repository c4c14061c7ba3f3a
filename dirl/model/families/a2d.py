"""Autoregressive models made into diffusion models: Qwen2, Qwen3, Qwen3-MoE and Llama with another attention mask.

dllm's `bd3lm` (block-causal) and `mdlm` (full attention) checkpoints, and what `dirl convert` writes. The layers, the
tensors' names and most of config.json are the source model's. dllm's config.json says neither which of the two trained
it nor the block length; here `block_size`, `shift`, `full_attention` and `mask_token_id` may stand in it and count.

Source: dllm (github.com/ZHZisZZ/dllm), pipelines/a2d.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family, register_weight_names


class A2DQwen2Config(Qwen2Config):
    """Qwen2's configuration plus what diffusion needs."""

    model_type = "a2d-qwen2"
    head_dim: int | None = None  # Qwen2 has no such key
    block_size: int = 32
    mask_token_id: int = 151665  # the first id behind Qwen2.5's tokens; a loaded model has its tokenizer's
    tokenizer_length: int | None = None  # ids from here on have no token and are never sampled; None: vocab_size
    shift: int = 0
    full_attention: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class A2DQwen3Config(Qwen3Config):
    """Qwen3's configuration plus what diffusion needs."""

    model_type = "a2d-qwen3"
    block_size: int = 32
    mask_token_id: int = 151669
    tokenizer_length: int | None = None
    shift: int = 0
    full_attention: bool = False


class A2DQwen3MoeConfig(Qwen3MoeConfig):
    """Qwen3-MoE's configuration plus what diffusion needs."""

    model_type = "a2d-qwen3_moe"
    head_dim: int | None = None
    block_size: int = 32
    mask_token_id: int = 151669
    tokenizer_length: int | None = None
    shift: int = 0
    full_attention: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class A2DLlamaConfig(LlamaConfig):
    """Llama's configuration plus what diffusion needs."""

    model_type = "a2d-llama"
    block_size: int = 32
    mask_token_id: int = 128256
    tokenizer_length: int | None = None
    shift: int = 0
    full_attention: bool = False


class A2DQwen2LMHeadModel(BlockDiffusionModel, Qwen2ForCausalLM):
    """Qwen2 that reads masks."""

    config_class = A2DQwen2Config
    confidence = "untempered"


class A2DQwen3LMHeadModel(BlockDiffusionModel, Qwen3ForCausalLM):
    """Qwen3 that reads masks."""

    config_class = A2DQwen3Config
    confidence = "untempered"


class A2DQwen3MoeLMHeadModel(BlockDiffusionModel, Qwen3MoeForCausalLM):
    """Qwen3-MoE that reads masks."""

    config_class = A2DQwen3MoeConfig
    confidence = "untempered"


class A2DLlamaLMHeadModel(BlockDiffusionModel, LlamaForCausalLM):
    """Llama that reads masks."""

    config_class = A2DLlamaConfig
    confidence = "untempered"


_VALUES: dict[str, Any] = {
    "config_names_mask": True,  # ours do; dllm's leave it to the tokenizer
    "mask_token": "<|mask|>",
    "trains_fill": True,
    "decoder": {"unmasking_strategy": "low_confidence_static", "temperature": 0.0},
    "sft": {"noise_level": "sequence"},
    "remarks": "bd3lm decodes in blocks counted from the end of the prompt: `model.block_origin=prompt_end`",
}
_QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")
A2D_QWEN2 = Family(
    name="A2D Qwen2",
    checkpoints="dllm's bd3lm and mdlm of Qwen2.5, converted models",
    model_class=A2DQwen2LMHeadModel,
    stop_tokens=_QWEN_STOPS,
    **_VALUES,
)
A2D_QWEN3 = Family(
    name="A2D Qwen3",
    checkpoints="dllm's bd3lm and mdlm of Qwen3, converted models",
    model_class=A2DQwen3LMHeadModel,
    stop_tokens=_QWEN_STOPS,
    **_VALUES,
)
A2D_QWEN3_MOE = Family(
    name="A2D Qwen3-MoE",
    checkpoints="converted models",
    model_class=A2DQwen3MoeLMHeadModel,
    stop_tokens=_QWEN_STOPS,
    **_VALUES,
)
A2D_LLAMA = Family(
    name="A2D Llama",
    checkpoints="dllm's bd3lm and mdlm of Llama, converted models",
    model_class=A2DLlamaLMHeadModel,
    stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
    **_VALUES,
)

register_weight_names(A2DQwen3MoeConfig.model_type)
