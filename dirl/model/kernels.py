"""A model on a GPU -> the same model with fused RMSNorm, SwiGLU and rotary kernels, where they are installed."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.sdar import SDARMoeForCausalLM

Kernels = Literal["auto", "torch", "liger"]


def use_fused_kernels(model: BlockDiffusionModel, kernels: Kernels) -> None:
    """Patch the model in place with Liger's kernels, which need CUDA (or ROCm) and the `liger` extra.

    lm_head stays ours: it is computed in chunks, at scored positions only.

    Args:
        kernels: auto patches where a GPU and the package are there; liger insists; torch never does.
    Raises:
        UserError: liger was asked for and one of the two is missing.
    """
    is_possible = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    if kernels == "liger" and not is_possible:
        raise UserError("model.kernels=liger needs a GPU and pip install 'dirl[liger]'; use auto or torch")
    if kernels == "torch" or not is_possible:
        return
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3, apply_liger_kernel_to_qwen3_moe

    is_moe = isinstance(model, SDARMoeForCausalLM)
    apply = apply_liger_kernel_to_qwen3_moe if is_moe else apply_liger_kernel_to_qwen3
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
