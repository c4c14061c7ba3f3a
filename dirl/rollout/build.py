"""A model and a name -> a rollout engine."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.memory import EngineLoad
from dirl.rollout.engine import EngineConfig, RolloutEngine, SamplingConfig
from dirl.rollout.lmdeploy.version import check_version
from dirl.rollout.local.canvas import PASS_TOKENS
from dirl.rollout.local.engine import PREFILL_TOKENS, TorchEngine
from dirl.rollout.watch import Observer

logger = logging.getLogger(__name__)

LMDEPLOY_MODELS = ("sdar", "sdar_moe")  # block-diffusion models that its engine knows, by model_type


def build_engine(
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EngineConfig,
    *,
    bf16: bool = False,
    observer: Observer | None = None,
) -> RolloutEngine:
    """The engine of `config`, holding the weights of `model`.

    Args:
        bf16: decode under autocast to bfloat16, as a trainer with `bf16: true` scores. LMDeploy always decodes so.
        observer: looks on; only TorchEngine in this process can be watched.
    Raises:
        UserError: the engine that was asked for cannot run here.
    """
    _announce_cache(config, model)
    if config.mode == "server":
        try:
            from dirl.rollout.server.engine import connect
        except ModuleNotFoundError as error:
            raise UserError(f"rollout.mode=server needs the package {error.name}: pip install 'dirl[serve]'") from error
        return connect(model, tokenizer, config, bf16=bf16)
    if chosen_engine(config, model) == "torch":
        compiled = config.compile == "always" or (config.compile == "auto" and torch.cuda.is_available())
        return TorchEngine(
            model,
            tokenizer,
            config,
            compiled=compiled,
            autocast=torch.bfloat16 if bf16 else None,
            observer=observer,
        )
    from dirl.rollout.lmdeploy.engine import LMDeployEngine

    return LMDeployEngine(
        model,
        tokenizer,
        max_batch_size=config.max_batch_size,
        cache_max_entry_count=config.cache_max_entry_count,
        sleep_level=config.sleep_level,
    )


def _announce_cache(config: EngineConfig, model: BlockDiffusionModel) -> None:
    """Say that completions will not be exact, where that was asked for.

    Raises:
        UserError: an approximation was asked for, and the model's cache is exact.
    """
    kind = config.approximate_cache
    if kind == "none":
        return
    if model.scheme.block_length:
        raise UserError(
            f"rollout.approximate_cache={kind}: attention of a {model.config.model_type} model is block-causal, whose "
            "cache is exact; use none"
        )
    logger.warning(
        "rollout.approximate_cache=%s: keys and values are as they were when a window began; completions and their "
        "log-probabilities are this approximation's, not the model's",
        kind,
    )


def chosen_engine(config: EngineConfig, model: BlockDiffusionModel | None = None) -> Literal["torch", "lmdeploy"]:
    """The engine that `auto` stands for on this machine, or the one that was named, if it can run.

    Args:
        model: that it shall decode with, which LMDeploy may not know; None: one that it knows.
    """
    installed, has_cuda = _lmdeploy_version(), torch.cuda.is_available()
    counts_from_start = model is None or model.scheme.block_origin == "start"
    is_known = model is None or (model.config.model_type in LMDEPLOY_MODELS and counts_from_start)
    if config.engine == "torch" or (config.engine == "auto" and not (installed and has_cuda and is_known)):
        return "torch"
    if not counts_from_start:
        raise UserError(
            "rollout.engine=lmdeploy: it counts blocks from position 0, model.block_origin is prompt_end; use torch"
        )
    if model is not None and not is_known:
        raise UserError(
            f"rollout.engine=lmdeploy: it decodes {' and '.join(LMDEPLOY_MODELS)}, and model.path is a model of type "
            f"{model.config.model_type}; use torch"
        )
    if installed is None:
        raise UserError("rollout.engine=lmdeploy: it is not installed; pip install 'dirl[lmdeploy]', or use torch")
    check_version(installed)
    if not has_cuda:
        raise UserError("rollout.engine=lmdeploy: it needs a CUDA device, and there is none; use torch")
    return "lmdeploy"


def engine_load(config: EngineConfig, sampling: SamplingConfig, longest_prompt: int) -> EngineLoad | None:
    """What a memory estimate needs to know of the engine in this process; None where there is none."""
    if config.mode == "server":
        return None
    name = chosen_engine(config) if config.engine == "auto" else config.engine  # a named one may run elsewhere
    longest = longest_prompt + sampling.max_completion_length
    return EngineLoad(
        name=name,
        longest_prompt=longest_prompt,
        longest=longest,
        batch_size=config.max_batch_size,
        prefill_tokens=PREFILL_TOKENS,
        canvas_tokens=PASS_TOKENS,
        window=min(sampling.generation_window or longest, sampling.max_completion_length),
        max_cached_tokens=config.max_cached_tokens,
        cache_share=config.cache_max_entry_count,
        sleeps=name == "lmdeploy" and config.sleep_level > 0,
    )


def _lmdeploy_version() -> str | None:
    try:
        return importlib.metadata.version("lmdeploy")
    except importlib.metadata.PackageNotFoundError:
        return None
