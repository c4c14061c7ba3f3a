"""A model on a GPU -> the same model with fused RMSNorm, SwiGLU and rotary kernels, where they are installed."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel

Kernels = Literal["auto", "torch", "liger"]
# transformers' class that a family is made of -> Liger's name for it.
_LIGER_NAMES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "LlamaForCausalLM": "llama",
}


def use_fused_kernels(model: BlockDiffusionModel, kernels: Kernels) -> None:
    """Patch the model in place with Liger's kernels, which need CUDA (or ROCm) and the `liger` extra.

    lm_head stays ours: it is computed in chunks, at scored positions only.

    Args:
        kernels: auto patches where a GPU, the package and kernels for this model are there; liger insists; torch never
            does.
    Raises:
        UserError: liger was asked for and one of the three is missing.
    """
    is_possible = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    if kernels == "liger" and not is_possible:
        raise UserError("model.kernels=liger needs a GPU and pip install 'dirl[liger]'; use auto or torch")
    names = [_LIGER_NAMES[base.__name__] for base in type(model).__mro__ if base.__name__ in _LIGER_NAMES]
    if kernels == "liger" and not names:
        raise UserError(f"model.kernels=liger: Liger has no kernels for {type(model).__name__}; use auto or torch")
    if kernels == "torch" or not is_possible or not names:
        return
    import liger_kernel.transformers as liger

    apply = getattr(liger, f"apply_liger_kernel_to_{names[0]}")
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
