"""A model -> the same model with fused RMSNorm and SwiGLU kernels for its passes on a GPU, where they are installed."""

from __future__ import annotations

import importlib.util
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel

Kernels = Literal["auto", "torch", "liger"]
# transformers' classes that families are made of, whose RMSNorm and SwiGLU are Llama's
_LLAMA_LIKE = {"Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"}


def use_fused_kernels(model: BlockDiffusionModel, kernels: Kernels) -> None:
    """Give the modules of this model Liger's kernels, which need CUDA (or ROCm) and the `liger` extra.

    Liger's own `apply_liger_kernel_to_*` replace classes and functions of transformers: every later model of this
    process would have them, also on a CPU or without storage. Here a module asks its input, and other models keep what
    they have. torch.compile sees transformers' code, which it fuses itself.

    Args:
        kernels: auto where a GPU, the package and kernels for this model are there; liger insists; torch never.
    Raises:
        UserError: liger was asked for and one of the three is missing.
    """
    is_possible = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None
    if kernels == "liger" and not is_possible:
        raise UserError("model.kernels=liger needs a GPU and pip install 'dirl[liger]'; use auto or torch")
    is_known = any(base.__name__ in _LLAMA_LIKE for base in type(model).__mro__)
    if kernels == "liger" and not is_known:
        raise UserError(f"model.kernels=liger: Liger has no kernels for {type(model).__name__}; use auto or torch")
    if kernels == "torch" or not is_possible or not is_known:
        return
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)
        elif isinstance(getattr(module, "gate_proj", None), nn.Linear) and model.config.hidden_act == "silu":
            module.forward = MethodType(_swiglu, module)


def _is_fused(hidden: Tensor) -> bool:
    return hidden.is_cuda and not torch.compiler.is_compiling()


def _norm(self: Any, hidden: Tensor) -> Tensor:
    if not _is_fused(hidden):
        return type(self).forward(self, hidden)  # type: ignore[no-any-return]
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden, self.weight, self.variance_epsilon)  # type: ignore[no-any-return]


def _swiglu(self: Any, hidden: Tensor) -> Tensor:
    if not _is_fused(hidden):
        return type(self).forward(self, hidden)  # type: ignore[no-any-return]
    from liger_kernel.transformers.functional import liger_swiglu

    return self.down_proj(liger_swiglu(self.gate_proj(hidden), self.up_proj(hidden)))  # type: ignore[no-any-return]
