"""A directory or hub id -> its family: by what `architectures[0]` of its config.json says, and by nothing else.

Not by model_type, which two families share; and not through transformers' Auto classes, which ask on the terminal
whether to run the code a checkpoint brings along.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from dirl.errors import ConfigError, UserError
from dirl.model.families.a2d import A2D_LLAMA, A2D_QWEN2, A2D_QWEN3, A2D_QWEN3_MOE
from dirl.model.families.dream import DREAM
from dirl.model.families.family import Family
from dirl.model.families.fast_dllm_v2 import FAST_DLLM_V2
from dirl.model.families.llada import LLADA, LLADA_MOE
from dirl.model.families.llada2 import LLADA2
from dirl.model.families.sdar import SDAR, SDAR_MOE
from dirl.model.model_path import find_model

FAMILIES = (
    *(SDAR, SDAR_MOE, LLADA2, FAST_DLLM_V2, LLADA, LLADA_MOE, DREAM),
    *(A2D_QWEN2, A2D_QWEN3, A2D_QWEN3_MOE, A2D_LLAMA),
)
# Architecture -> the family that `dirl convert` makes of it.
AUTOREGRESSIVE = {
    "Qwen2ForCausalLM": A2D_QWEN2,
    "Qwen3ForCausalLM": A2D_QWEN3,
    "Qwen3MoeForCausalLM": A2D_QWEN3_MOE,
    "LlamaForCausalLM": A2D_LLAMA,
}
# architectures[0] or model_type -> why there is no family for it.
REFUSED = {
    "DiffusionGemmaForBlockDiffusion": "it denoises random tokens and has no masks: use transformers' own code",
    "llada2_moe_veomni": "its experts are stacked for training: undo that with dFactory's moe_convertor.py",
}


def read_published(path: str) -> dict[str, Any]:
    """The config.json of what `model.path` names, as it is.

    Raises:
        OSError: there is none.
        ValueError: it is no JSON object.
    """
    file = cached_file(find_model(path).directory, "config.json")
    published = json.loads(Path(str(file)).read_text(encoding="utf-8"))
    if not isinstance(published, dict):
        raise ValueError("config.json holds no JSON object")
    return published


def family_of(published: dict[str, Any], path: str) -> Family:
    """The family whose checkpoint this config.json describes.

    Raises:
        UserError: an architecture without one, in one line that says what to do.
    """
    architecture = next(iter(published.get("architectures") or []), "")
    for family in FAMILIES:
        if family.architecture == architecture and published.get("model_type") not in REFUSED:
            return family
    raise UserError(f"model.path: {path!r} {_complaint(architecture, published.get('model_type'), path)}")


def family_with_config(config: Any) -> Family:
    """The family that a configuration of ours belongs to."""
    (family,) = (family for family in FAMILIES if family.config_class is type(config))
    return family


def published_decoder(name: str, path: str) -> Mapping[str, Any]:
    """The preset `published` of sampling: keys of SamplingConfig as the family of model.path is decoded elsewhere."""
    return _preset_family("sampling", name, path).decoder


def published_order(name: str, path: str) -> Mapping[str, Any]:
    """The same for rollouts, without what is sampled: RL learns nothing from greedy decoding."""
    of_sampling = ("temperature", "top_k", "top_p")
    return {key: value for key, value in published_decoder(name, path).items() if key not in of_sampling}


def published_noise(name: str, path: str) -> Mapping[str, Any]:
    """The preset `published` of SFT's noise: keys of NoiseConfig as the family of model.path is trained elsewhere."""
    return _preset_family("noise", name, path).sft


def _preset_family(section: str, name: str, path: str) -> Family:
    if name != "published":
        raise ConfigError(f"{section}={name}: no such preset; there is published, the values of the model's own family")
    if not path:
        raise ConfigError(f"{section}=published: they are those of a family, and model.path names no model; set it")
    return family_of(read_published(path), path)


def _complaint(architecture: str, model_type: object, path: str) -> str:
    for name in (architecture, str(model_type)):
        if name in REFUSED:
            return f"is a {name}, which is not supported: {REFUSED[name]}"
    known = f"known are {', '.join(family.architecture for family in FAMILIES)}"
    if architecture in AUTOREGRESSIVE:
        return f"is an autoregressive {architecture}; make it a diffusion model: dirl convert {path} OUT ({known})"
    if not architecture:
        return f"names no architectures in its config.json; {known}"
    return f"is a {architecture}, for which there is no family; {known}"
