"""A model as it is trained (sharded by ZeRO-3 or FSDP2, with LoRA) -> its parameters as a plain process has them.

This is what engines are sent and what `final/` contains. Parameters are gathered one after another, so that a full copy
of the model never exists where the caller does not make one.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dirl.errors import UserError
from dirl.training.distributed import read_shards


def named_full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names as in the checkpoint, and whole tensors on the model's device, without gradient; LoRA is merged on the fly.

    Collective where the model is sharded: every rank must go through to the end. A tensor may be freed when the next
    one is asked for: copy what you keep.
    """
    model = _bare(model)
    adapted = dict(_adapted_layers(model))
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if owner in adapted and leaf == "weight":
            yield f"{owner}.weight", _merged(adapted[owner])
            continue
        with _gathered([parameter]):
            yield _plain_name(name), _full(parameter)


def full_parameter_kinds(model: nn.Module) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The dtypes and shapes of `named_full_parameters`, in its order, without communication."""
    return {
        _plain_name(name): (parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)))
        for name, parameter in _bare(model).named_parameters()
        if ".lora_" not in name
    }


def model_size(model: nn.Module) -> dict[str, int]:
    """Its parameters, and the weights of its layers' matrices that each token meets: of experts those it is sent to."""
    shapes = {name: shape for name, (_, shape) in full_parameter_kinds(model).items()}
    configs = (getattr(module, "config", None) for module in _bare(model).modules())
    config = next((config for config in configs if config is not None), None)
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    met = 0
    for name, shape in shapes.items():
        if ".layers." in name and len(shape) >= 2:
            is_of_experts = chosen and ".experts." in name and len(shape) == 3
            met += math.prod(shape) * chosen // shape[0] if is_of_experts else math.prod(shape)
    return {"parameters": sum(map(math.prod, shapes.values())), "layer_weights_per_token": met}


def is_sharded(model: nn.Module) -> bool:
    """Whether one rank alone lacks the weights."""
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "full_tensor") for parameter in model.parameters())


def full_state_dict(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """All full parameters in main memory; empty where `keep` is False, on ranks that only take part in gathering."""
    state = {}
    for name, tensor in named_full_parameters(model):
        if keep:
            state[name] = tensor.detach().cpu().clone()
    return state


def named_adapter_parameters(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The LoRA matrices alone, whole and in main memory; collective like `named_full_parameters`."""
    state = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            with _gathered([parameter]):
                whole = _full(parameter)  # on every rank: FSDP2 gathers here
                if keep:
                    state[name] = whole.cpu().clone()
    return state


def merged_state(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The whole state dict of a model -> that of a model without LoRA, by the same rule as `named_full_parameters`.

    Args:
        scaling: lora_alpha / r; read where there are adapters.
    """
    merged = {_plain_name(name): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, a in state.items():
        owner, _, adapter = name.partition(".lora_A.")
        if adapter:
            b = state[f"{owner}.lora_B.{adapter}"]
            merged[f"{owner}.weight"] = _sum_of(merged[f"{owner}.weight"], a, b, scaling)
    return merged


def read_weights(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of the first module in what `Distributed.save_state` wrote, by its names, whole and in main memory.

    Args:
        dtype: what the module computed in; DeepSpeed has kept float32 numbers, which it rounded to that at each step.
    Raises:
        UserError: DeepSpeed wrote it, and is not installed.
    """
    if (directory / "pytorch_model").is_dir():
        return {name: tensor.to(dtype) for name, tensor in _read_zero(directory).items()}
    shards = directory / "pytorch_model_fsdp_0"
    return read_shards(shards) if shards.is_dir() else load_file(directory / "model.safetensors")


def _read_zero(directory: Path) -> dict[str, Tensor]:
    try:
        from deepspeed.utils import zero_to_fp32
    except ImportError as error:
        raise UserError(f"{directory} was written by DeepSpeed: pip install 'dirl[deepspeed]' to read it") from error
    with redirect_stdout(io.StringIO()):  # it prints its progress
        state = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(directory), "pytorch_model")
    whole = directory / "pytorch_model/mp_rank_00_model_states.pt"
    if whole.is_file():  # ZeRO-1 writes weights that are not trained (beside adapters) here alone
        module = torch.load(whole, map_location="cpu", mmap=True, weights_only=True)["module"]
        state = {**module, **state}
    return state


def digest_of_weights(model: nn.Module) -> str:
    """A hash of names and values; about a second per GB."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _bare(model: nn.Module) -> nn.Module:
    """The module inside DDP's or DeepSpeed's wrapper, whose parameters have the checkpoint's names."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _plain_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _merged(layer: Any) -> Tensor:
    """W + scaling * B A of a LoRA layer, added in float32."""
    (adapter,) = layer.lora_A.keys()
    base, a, b = layer.base_layer.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    with _gathered([base, a, b]):
        return _sum_of(_full(base), _full(a), _full(b), layer.scaling[adapter])


def _sum_of(base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (base.float() + scaling * (b.float() @ a.float())).to(base.dtype)


def _full(parameter: Tensor) -> Tensor:
    """FSDP2 keeps parameters as DTensors; everything else is whole already."""
    whole: Any = parameter.detach()
    with torch.no_grad():
        return whole.full_tensor() if hasattr(whole, "full_tensor") else whole


def _gathered(parameters: list[Any]) -> AbstractContextManager[Any]:
    """Parameters that ZeRO-3 has partitioned are whole inside."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
