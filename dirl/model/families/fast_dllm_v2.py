"""Fast-dLLM v2: Qwen2 with block-causal attention, where the row before a position predicts its token.

Layers and names of tensors are Qwen2's; config.json calls the block length `bd_size`.

Source: Fast-dLLM v2 (arXiv 2509.26328).
"""

from __future__ import annotations

from transformers import Qwen2ForCausalLM

from dirl.model.families.a2d import A2DQwen2Config
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family


class FastDLLMConfig(A2DQwen2Config):
    """Qwen2's configuration, shifted."""

    model_type = "Fast_dLLM_Qwen"
    mask_token_id: int = 151665
    shift: int = 1


class Fast_dLLM_QwenForCausalLM(BlockDiffusionModel, Qwen2ForCausalLM):
    """Qwen2 that reads masks and predicts one row ahead."""

    config_class = FastDLLMConfig
    confidence = "processed"
    holds_at_threshold = True


FAST_DLLM_V2 = Family(
    name="Fast-dLLM v2",
    checkpoints="Fast_dLLM_v2_1.5B, Fast_dLLM_v2_7B",
    model_class=Fast_dLLM_QwenForCausalLM,
    renamed={"bd_size": "block_size"},
    mask_token="|<MASK>|",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    trains_fill=False,
    decoder={"confidence_threshold": 0.9, "temperature": 0.0, "sub_block_length": 8},
    sft={"complementary": True, "weight": "even", "block_start": "noisy"},
    remarks="a block's first token is placed before its first step, from the last row of the block before",
)
