"""An autoregressive checkpoint -> a block-diffusion directory: same layers, same numbers, one more token, other words.

With block length 1 and a shift of 1 the converted model *is* its source: each token reads the tokens before it and
itself, and its row predicts the next. Training then enlarges the block (`stages`).

Source: dllm's a2d (github.com/ZHZisZZ/dllm); the shift keeps what the source's rows mean, as in Dream and Fast-dLLM v2.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedTokenizerBase

from dirl.config import Config, bounded
from dirl.data.chat import add_mask_token, load_tokenizer
from dirl.errors import MissingFileError, UserError
from dirl.files import is_hub_id, whole_folder
from dirl.model.checkpoint import damage_named, model_with, save_model
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.family import Family
from dirl.model.families.registry import AUTOREGRESSIVE, family_of, read_published


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Config):
    """What the new model is told of masks."""

    block_length: int = bounded(4, least=1)  # tokens a block; what it is trained with decides (model.block_length)
    shift: int = bounded(1, least=0, most=1)  # 1: the row before a position predicts it, as in the source
    full_attention: bool = False  # every position reads every other, and there are no blocks


def convert(source: str, output: str | Path, config: ConvertConfig) -> BlockDiffusionModel:
    """Write the block-diffusion directory; returns its model, in the source's precision.

    Args:
        source: Hugging Face directory, hub id, or a .gguf file (or a directory with only that), whose numbers are
            restored to float32.
    Raises:
        UserError: no autoregressive model of a known architecture, or something stands at `output`.
    """
    path = Path(output)
    if path.exists():
        raise UserError(f"{output} is there already; name a new directory for the converted model")
    autoregressive, tokenizer = _load(source)
    family = _family_for(autoregressive, source)
    mask = add_mask_token(tokenizer, autoregressive.config.vocab_size)
    weights = _with_rows(autoregressive.state_dict(), max(len(tokenizer), autoregressive.config.vocab_size), mask)
    model = _with_weights(
        family,
        autoregressive,
        weights,
        {
            "block_size": config.block_length,
            "shift": config.shift,
            "full_attention": config.full_attention,
            "mask_token_id": mask,
            "tokenizer_length": len(tokenizer),
        },
    )
    with whole_folder(path, "make room") as temporary:
        save_model(model, tokenizer, temporary)
    return model


def _load(source: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The source's model and tokenizer; a diffusion model is sent away before its weights are read."""
    file = _gguf_file(Path(source))
    if file is not None:
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"reading {file} needs the gguf package: pip install 'dirl[gguf]'")
        if not file.is_file():
            raise MissingFileError(f"no file {source}; name a .gguf file, a Hugging Face directory or a hub id")
        with damage_named(source):
            restored = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=restored, dtype=torch.float32
            )
        return model, load_tokenizer(file)
    if not Path(source, "config.json").is_file() and not is_hub_id(source):
        raise MissingFileError(f"no config.json in {source!r}; give a Hugging Face directory, a hub id or a .gguf file")
    with damage_named(source):
        published = read_published(source)
        architecture = next(iter(published.get("architectures") or []), "")
        if architecture not in AUTOREGRESSIVE:
            known = family_of(published, source)  # or the line that says what is known
            raise UserError(f"{source!r} is a {known.architecture}: a diffusion model already; train it as it is")
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    return model, load_tokenizer(source)


def _gguf_file(path: Path) -> Path | None:
    """The .gguf file that is named, or that is all there is in a directory."""
    if path.suffix == ".gguf":
        return path
    found = [] if (path / "config.json").is_file() else list(path.glob("*.gguf"))
    return found[0] if len(found) == 1 else None


def _family_for(autoregressive: Any, source: str) -> Family:
    name = type(autoregressive).__name__
    if name not in AUTOREGRESSIVE:
        raise UserError(f"{source!r} is a {name}; {', '.join(AUTOREGRESSIVE)} can be converted")
    return AUTOREGRESSIVE[name]


def _with_rows(weights: Mapping[str, Tensor], num_rows: int, mask: int) -> dict[str, Tensor]:
    """Weights whose vocabulary has so many rows, the mask token's being the mean of those the source had."""
    found = dict(weights)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows_VD = found[name]
        mean_1D = rows_VD.float().mean(dim=0, keepdim=True).to(rows_VD.dtype)
        grown_VD = torch.cat([rows_VD, mean_1D.expand(num_rows - len(rows_VD), -1)])
        grown_VD[mask] = mean_1D
        found[name] = grown_VD
    return found


def _with_weights(
    family: Family, autoregressive: Any, weights: dict[str, Tensor], values: Mapping[str, Any]
) -> BlockDiffusionModel:
    described = autoregressive.config.to_dict()
    for name in ("model_type", "architectures", "quantization_config"):
        described.pop(name, None)
    config = family.config_class.from_dict({**described, **values, "vocab_size": len(weights["lm_head.weight"])})
    model = model_with(family, config, weights, autoregressive.dtype)
    model.generation_config = autoregressive.generation_config
    return model
