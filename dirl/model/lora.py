"""LoRA adapters (peft) in a block-diffusion model: put in, switched off for the reference, saved as peft saves them.

Pushing to an engine and `final/` merge them: `dirl.training.full_parameters`.

Source: LoRA (arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    target_modules: list[str] = field(default_factory=lambda: list(_ATTENTION_AND_MLP))  # names of linear layers


def add_adapters(model: BlockDiffusionModel, config: LoraConfig, seed: int) -> None:
    """Freeze the model and put adapters beside its layers, in place; the same on every rank. r=0 changes nothing.

    Raises:
        UserError: peft is missing, or a target names no linear layer.
    """
    if config.r == 0:
        return
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [name for name in config.target_modules if name not in linear]
    if unknown or not config.target_modules:
        raise UserError(f"lora.target_modules: {unknown} names no linear layer; choose among {sorted(linear)}")
    try:
        import peft
    except ImportError as error:
        raise UserError(f"lora.r={config.r} needs the peft package: pip install 'dirl[peft]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(_peft_config(config), model)
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
    described = _peft_config(config)
    described.base_model_name_or_path = base
    described.save_pretrained(str(path))


def _peft_config(config: LoraConfig):  # type: ignore[no-untyped-def]  # peft's own class
    import peft

    return peft.LoraConfig(
        r=config.r, lora_alpha=config.lora_alpha, lora_dropout=0.0, target_modules=list(config.target_modules)
    )
