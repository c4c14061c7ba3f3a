"""A Hugging Face directory <-> a model, with the few keys of config.json that block diffusion depends on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from dirl.config import PATH, Config, bounded
from dirl.data.chat import find_mask_token_id, mask_token_id, save_tokenizer
from dirl.diffusion.packing import BlockOrigin
from dirl.errors import MissingFileError, UserError, one_line
from dirl.files import is_hub_id, whole_folder, write_json
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family
from dirl.model.families.registry import family_of, family_with_config, read_published
from dirl.model.flex_attention import AttentionName
from dirl.model.kernels import Kernels, use_fused_kernels
from dirl.model.lora import LoraConfig, save_adapters
from dirl.model.model_path import ModelFiles, find_model, tokenizer_of
from dirl.training.full_parameters import full_state_dict, named_adapter_parameters


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """Where the model comes from and how it is run."""

    # Hugging Face directory, hub id, RUN, RUN@STEP, RUN@best, or a checkpoint's directory
    path: str = field(default="outputs/tiny/base", metadata=PATH)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights
    attention: AttentionName = "auto"  # training forward: flex on CUDA, sdpa elsewhere
    kernels: Kernels = "auto"  # RMSNorm and SwiGLU: liger where a GPU and the package are there, else torch
    gradient_checkpointing: bool = False  # recompute each layer in backward: less memory, a third more time
    block_length: int = bounded(0, least=0)  # 0: what the checkpoint says (block_size)
    # where blocks are counted from: position 0, or the end of the prompt; auto: what the checkpoint says
    block_origin: Literal["auto", BlockOrigin] = "auto"


def load_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> BlockDiffusionModel:
    """A model of one of our families that knows its mask token and how many ids its tokenizer has.

    Raises:
        MissingFileError: no config.json at a path that is not a hub id.
        UserError: another kind of model, damaged or incomplete files, or a tokenizer that does not fit.
    """
    files, dtype = find_model(config.path), getattr(torch, config.dtype)
    family, published, model_config = _read_config(config, files, tokenizer)
    with damage_named(config.path):
        if files.checkpoint is None:
            model: Any = _load_pretrained(family, model_config, files.directory, dtype)
        else:
            model = model_with(family, model_config, files.read_weights(), dtype)
            with suppress(OSError):  # it has none: the model's own
                model.generation_config = GenerationConfig.from_pretrained(files.directory)
    check_finite(model, config.path)
    if family.keeps_published_config:
        model.published_config = published
    use_fused_kernels(model, config.kernels)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def check_finite(model: torch.nn.Module, path: str) -> None:
    """Raises UserError, naming the tensor: a weight is NaN or infinite."""
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and weight.numel() and not math.isfinite(sum(map(float, torch.aminmax(weight)))):
            raise UserError(f"model.path: {name} in {path!r} holds NaN or infinities; get or save the weights again")


def _load_pretrained(family: Family, model_config: Any, directory: str, dtype: torch.dtype) -> Any:
    for index in Path(directory).glob("*.index.json"):
        for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values():
            if Path(name).name != name:
                raise UserError(f"model.path: {index} names {name!r}; the files of a model lie beside its index")
    loaded: Any = family.model_class.from_pretrained(
        directory, config=model_config, dtype=dtype, output_loading_info=True
    )
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would go on with random numbers in their place
        raise UserError(f"model.path: the weights in {directory!r} lack {missing[:3]}; get or save them again")
    return model


def model_with(
    family: Family, model_config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype
) -> BlockDiffusionModel:
    """A model of these weights, which are named as its own parameters are.

    Raises:
        RuntimeError: they are those of another model.
    """
    with torch.device("meta"):
        model: Any = family.model_class(model_config)
    kept = model._keep_in_fp32_modules_strict or ()
    found = {name: t if any(part in name for part in kept) else t.to(dtype) for name, t in weights.items()}
    if model_config.tie_word_embeddings:  # files hold one of the two
        tied = {"model.embed_tokens.weight", "lm_head.weight"}
        found |= dict.fromkeys(tied, found[min(tied & found.keys())])
    model.load_state_dict(found, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(model_config)  # its frequencies are in no file
    return model.eval()


def random_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> BlockDiffusionModel:
    """The model `load_model` would return with other weights, for one who will be sent them; reads config.json alone.

    Raises:
        MissingFileError, UserError: as `load_model`.
    """
    family, _, model_config = _read_config(config, find_model(config.path), tokenizer)
    model: Any = family.model_class._from_config(model_config, dtype=getattr(torch, config.dtype))
    return model


def _read_config(
    config: ModelConfig, files: ModelFiles, tokenizer: PreTrainedTokenizerBase
) -> tuple[Family, dict[str, Any], Any]:
    """The family, its config.json as it is published, and the configuration of our class."""
    path = files.directory
    if not Path(path, "config.json").is_file() and not is_hub_id(path):
        raise MissingFileError(f"model.path: no config.json in {path!r}; name a Hugging Face directory, hub id or run")
    with damage_named(path):
        published = read_published(path)
        family = family_of(published, path)
        model_config = family.read(published)
    model_config.mask_token_id = _mask_token_id(family, published, tokenizer)
    model_config.tokenizer_length = len(tokenizer)
    model_config.block_size = config.block_length or files.block_length or model_config.block_size
    if config.block_origin != "auto":
        model_config.block_origin = config.block_origin
    if getattr(model_config, "full_attention", False) and getattr(model_config, "block_origin", "start") != "start":
        raise UserError(
            "model.block_origin=prompt_end is of blocks, and the model of model.path has none; leave it auto"
        )
    if len(tokenizer) > model_config.vocab_size:
        raise UserError(
            f"model.path: the tokenizer has {len(tokenizer)} tokens, the model {model_config.vocab_size} rows; "
            "use the tokenizer the model was made with"
        )
    return family, published, model_config


def _mask_token_id(family: Family, published: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """What config.json names, where the family's does; else the tokenizer's mask token. They may not differ."""
    named = published.get("mask_token_id") if family.config_names_mask else None
    if named is None:
        return mask_token_id(tokenizer)
    found = find_mask_token_id(tokenizer)
    if found not in (named, None):
        raise UserError(
            f"model.path: config.json says mask_token_id {named}, the tokenizer's mask token is {found}; "
            "use the tokenizer the model was made with"
        )
    return int(named)


@contextmanager
def damage_named(path: str) -> Iterator[None]:
    """Libraries fail in many ways on files that are damaged or of another shape."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever class; it stays the cause
        raise UserError(f"model.path: cannot load {path!r}, get or save it again: {one_line(error, 200)}") from error


def default_device() -> torch.device:
    """The first GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    path: str, *, dtype: Literal["float32", "bfloat16"] = "float32"
) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a Hugging Face directory, hub id, run or checkpoint, ready to generate."""
    tokenizer = tokenizer_of(path)
    return load_model(ModelConfig(path=path, dtype=dtype), tokenizer).eval(), tokenizer


def save_model(
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a directory that loads here, in the code its family is published with and, for SDAR, in LMDeploy.

    Args:
        weights: whole parameters by name, where the model's own are sharded or adapted; None: the model's.
    """
    model.save_pretrained(path, state_dict=dict(weights) if weights is not None else None)
    save_tokenizer(tokenizer, path)
    config_file = Path(path, "config.json")
    write_json(config_file, _config_to_save(model, json.loads(config_file.read_text(encoding="utf-8"))))


def _config_to_save(model: BlockDiffusionModel, written: dict[str, Any]) -> dict[str, Any]:
    """The published config.json the model came with, or else what transformers has written."""
    if model.published_config is not None:
        return family_with_config(model.config).publish(model.config, model.published_config, written["dtype"])
    written.pop("auto_map", None)  # it names code files of the source checkpoint, which are not copied
    # transformers 5 keeps the rotary base under rope_parameters only; older code would fall back to 10000.
    rope = dict(written["rope_parameters"])
    written.setdefault("rope_theta", rope.pop("rope_theta"))
    if rope.get("rope_type", "default") != "default":  # nor does it know of a scale under that name
        written.setdefault("rope_scaling", rope)
    return dict(sorted(written.items()))


def write_snapshot(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, is_main: bool
) -> None:
    """A directory, complete or absent, of a model that is whole, sharded or adapted (then merged); collective."""
    weights = full_state_dict(model, keep=is_main)
    if is_main:
        with whole_folder(directory, "make room", is_lasting=False) as temporary:
            save_model(model, tokenizer, temporary, weights)


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
    final = output_dir / "final"
    weights = full_state_dict(model, keep=is_main)
    adapters = named_adapter_parameters(model, keep=is_main)
    if is_main:
        remedy = "make room, and the same command continues from the newest checkpoint"
        with whole_folder(final, remedy) as temporary:
            save_model(model, tokenizer, temporary, weights)
            if adapters:
                save_adapters(adapters, lora, base, temporary / "adapter")
    return final
