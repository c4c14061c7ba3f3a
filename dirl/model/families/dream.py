"""Dream, Dream-Coder and DiffuCoder: Qwen2 with full attention, where the row before a position predicts its token.

Layers and names of tensors are Qwen2's. There are no blocks: the decoder reveals at any place of the canvas.

Source: Dream (arXiv 2508.15487); DiffuCoder (arXiv 2506.20639).
"""

from __future__ import annotations

from transformers import Qwen2ForCausalLM

from dirl.model.families.a2d import A2DQwen2Config
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family


class DreamConfig(A2DQwen2Config):
    """Qwen2's configuration, shifted and unmasked."""

    model_type = "Dream"
    mask_token_id: int = 151666
    shift: int = 1
    full_attention: bool = True


class DreamModel(BlockDiffusionModel, Qwen2ForCausalLM):
    """The whole model, lm_head included, though its published class is called as a backbone would be."""

    config_class = DreamConfig
    confidence = "processed"


DREAM = Family(
    name="Dream",
    checkpoints="Dream-7B, Dream-Coder-7B, DiffuCoder-7B",
    model_class=DreamModel,
    config_names_mask=True,
    mask_token="<|mask|>",
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    trains_fill=True,
    decoder={
        "unmasking_strategy": "entropy_bounded",
        "entropy_bound": 0.0,
        "temperature": 0.2,
        "top_p": 0.95,
        "generation_window": 0,
    },
    sft={"noise_level": "sequence"},
    remarks="SFT also by distance to what is known",
)
