"""LoRA adapters (peft) in a block-diffusion model: put in, switched off for the reference, saved as peft saves them.

Pushing to an engine and `final/` merge them: `dirl.training.full_parameters`.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dirl.config import Config, bounded
from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel

_ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Config):
    """What is trained instead of the weights; there is no dropout, since replay must see the policy that sampled."""

    r: int = bounded(0, least=0)  # rank of the adapters; 0: train the weights themselves
    lora_alpha: int = bounded(16, least=1)  # the update is scaled with lora_alpha / r
    target_modules: list[str] = field(default_factory=list)  # names of linear layers; []: attention's and the MLP's


def adapted_layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Linear]:
    """The linear layers that adapters stand beside, by their full names; experts, being one tensor, are none.

    Raises:
        UserError: a target names no linear layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = {_last(name) for name in layers}
    unknown = [name for name in config.target_modules if name not in names]
    if unknown:
        raise UserError(f"lora.target_modules: {unknown} names no linear layer; choose among {sorted(names)}")
    targets = config.target_modules or _ATTENTION_AND_MLP
    return {name: layer for name, layer in layers.items() if _last(name) in targets}


def add_adapters(model: BlockDiffusionModel, config: LoraConfig, seed: int) -> None:
    """Freeze the model and put adapters beside its layers, in place; the same on every rank. r=0 changes nothing.

    Raises:
        UserError: peft is missing, or a target names no linear layer.
    """
    if config.r == 0:
        return
    targets = {_last(name) for name in adapted_layers(model, config)}
    try:
        import peft
    except ImportError as error:
        raise UserError(f"lora.r={config.r} needs the peft package: pip install 'dirl[peft]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(config, targets), model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # small updates of bfloat16 numbers round to nothing


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters: the policy that training started from."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]  # enable_adapters() would also freeze them
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]


def save_adapters(parameters: Mapping[str, Tensor], config: LoraConfig, base: str, path: Path) -> None:
    """A directory that `peft.PeftModel.from_pretrained` loads over the base model."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": t.contiguous() for name, t in parameters.items()}
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    described = _peft_config(config, {_last(name.partition(".lora_")[0]) for name in parameters})
    described.base_model_name_or_path = base
    described.save_pretrained(str(path))


def _last(name: str) -> str:
    """Of a module's full name."""
    return name.rpartition(".")[2]


def _peft_config(config: LoraConfig, targets: Collection[str]):  # type: ignore[no-untyped-def]  # peft's own class
    import peft

    return peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=sorted(targets))
