"""A Hugging Face directory <-> a model, with the few keys of config.json that block diffusion depends on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from dirl.config import PATH, Config, bounded
from dirl.data.chat import load_tokenizer, mask_token_id, save_tokenizer
from dirl.errors import MissingFileError, UserError, one_line
from dirl.files import is_hub_id, write_json
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.sdar import SDARConfig, SDARMoeConfig
from dirl.model.flex_attention import AttentionName
from dirl.model.kernels import Kernels, use_fused_kernels
from dirl.model.lora import LoraConfig, save_adapters
from dirl.training.full_parameters import full_state_dict, named_adapter_parameters


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Where the model comes from and how it is run."""

    path: str = field(default="outputs/tiny/base", metadata=PATH)  # Hugging Face directory, or a hub id
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    attention: AttentionName = "auto"  # training forward: flex on CUDA, sdpa elsewhere
    kernels: Kernels = "auto"  # RMSNorm, SwiGLU, rotary: liger where a GPU and the package are there, else torch
    gradient_checkpointing: bool = False  # recompute each layer in backward: less memory, a third more time
    block_length: int = bounded(0, least=0)  # 0: what the checkpoint says (block_size)


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> BlockDiffusionModel:
    """An SDAR or SDAR-MoE model that knows its mask token and how many ids its tokenizer has.

    Raises:
        MissingFileError: no config.json at a path that is not a hub id.
        UserError: another kind of model, damaged or incomplete files, or a tokenizer that does not fit.
    """
    path = config.path
    if not Path(path, "config.json").is_file() and not is_hub_id(path):
        raise MissingFileError(f"model.path: no config.json in {path!r}; give a Hugging Face directory or a hub id")
    with _damage_named(path):
        model_config = AutoConfig.from_pretrained(path)
    if not isinstance(model_config, (SDARConfig, SDARMoeConfig)):
        raise UserError(f"model.path: {path!r} is a {model_config.model_type!r} model; need sdar or sdar_moe")
    model_config.mask_token_id = mask_token_id(tokenizer)
    model_config.tokenizer_length = len(tokenizer)
    model_config.block_size = config.block_length or model_config.block_size
    if len(tokenizer) > model_config.vocab_size:
        raise UserError(
            f"model.path: the tokenizer has {len(tokenizer)} tokens, the model {model_config.vocab_size} rows; "
            "use the tokenizer the model was made with"
        )
    with _damage_named(path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=model_config, dtype=getattr(torch, config.dtype), output_loading_info=True
        )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(f"model.path: the weights in {path!r} lack {missing[:3]}; get or save them again")
    use_fused_kernels(model, config.kernels)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@contextmanager
def _damage_named(path: str) -> Iterator[None]:
    """Libraries fail in many ways on files that are damaged or of another shape."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path: cannot load {path!r}, get or save it again: {one_line(error, 200)}") from error


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    path: str, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a Hugging Face directory or hub id, ready to generate."""
    tokenizer = load_tokenizer(path)
    return load_model(ModelConfig(path=path, dtype=dtype), tokenizer).eval(), tokenizer


def save_model(
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a directory that loads here, in plain transformers code for SDAR, and in LMDeploy.

    Args:
        weights: whole parameters by name, where the model's own are sharded or adapted; None: the model's.
    """
    model.save_pretrained(path, state_dict=dict(weights) if weights is not None else None)
    save_tokenizer(tokenizer, path)
    # transformers 5 keeps the rotary base under rope_parameters only; older SDAR code would fall back to 10000.
    config_file = Path(path, "config.json")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("auto_map", None)  # it names code files of the source checkpoint, which are not copied
    config.setdefault("rope_theta", config["rope_parameters"]["rope_theta"])
    write_json(config_file, dict(sorted(config.items())))


def write_final(
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    base: str,
    lora: LoraConfig,
    is_main: bool,
) -> Path:
    """output_dir/final, complete or absent, from a model that is whole, sharded or adapted; collective.

    LoRA adapters are merged, and stand beside in final/adapter in peft's form.
    """
    final, temporary = output_dir / "final", output_dir / "final.tmp"
    weights = full_state_dict(model, keep=is_main)
    adapters = named_adapter_parameters(model, keep=is_main)
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(model, tokenizer, temporary, weights)
        if adapters:
            save_adapters(adapters, lora, base, temporary / "adapter")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    return final
