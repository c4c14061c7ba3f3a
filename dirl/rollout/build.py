"""A model and a name -> a rollout engine."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from dirl.config import Config, bounded
from dirl.errors import UserError
from dirl.model.sdar import BlockDiffusionModel
from dirl.rollout.engine import RolloutEngine, SleepLevel
from dirl.rollout.lmdeploy.version import check_version
from dirl.rollout.local.engine import TorchEngine


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    """Which engine decodes, where, and how much at once."""

    engine: Literal["auto", "torch", "lmdeploy"] = "auto"  # auto: lmdeploy on CUDA where it is installed, else torch
    mode: Literal["colocate", "server"] = "colocate"  # colocate: in this process; server: in others (`dirl serve`)
    max_batch_size: int = bounded(256, least=1)  # sequences decoded at once; each takes a slot of the KV cache
    compile: Literal["auto", "always", "never"] = "auto"  # torch: fuse small operations (torch.compile); auto: on CUDA
    # lmdeploy: part of the GPU memory free at start that its KV cache takes
    cache_max_entry_count: float = bounded(0.5, above=0, below=1)
    sleep_level: SleepLevel = 1  # lmdeploy, colocate: what it gives back while the trainer works
    server_urls: list[str] = field(default_factory=list)  # server: running `dirl serve`s, as http://HOST:PORT
    server_devices: list[str] = field(default_factory=list)  # server, no urls: CUDA device of each local rank's own one

    def check(self) -> None:
        if self.mode == "colocate" and (self.server_urls or self.server_devices):
            raise ValueError("server_urls and server_devices are read with mode=server only; set that, or remove them")


def build_engine(model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig) -> RolloutEngine:
    """The engine of `config`, holding the weights of `model`.

    Raises:
        UserError: the engine that was asked for cannot run here.
    """
    if config.mode == "server":
        from dirl.rollout.server.engine import connect

        return connect(model, tokenizer, config)
    if chosen_engine(config) == "torch":
        compiled = config.compile == "always" or (config.compile == "auto" and torch.cuda.is_available())
        return TorchEngine(model, tokenizer, max_batch_size=config.max_batch_size, compiled=compiled)
    from dirl.rollout.lmdeploy.engine import LMDeployEngine

    return LMDeployEngine(
        model,
        tokenizer,
        max_batch_size=config.max_batch_size,
        cache_max_entry_count=config.cache_max_entry_count,
        sleep_level=config.sleep_level,
    )


def chosen_engine(config: EngineConfig) -> Literal["torch", "lmdeploy"]:
    """The engine that `auto` stands for on this machine, or the one that was named, if it can run."""
    installed, has_cuda = _lmdeploy_version(), torch.cuda.is_available()
    if config.engine == "torch" or (config.engine == "auto" and not (installed and has_cuda)):
        return "torch"
    if installed is None:
        raise UserError("rollout.engine=lmdeploy: it is not installed; pip install 'dirl[lmdeploy]', or use torch")
    check_version(installed)
    if not has_cuda:
        raise UserError("rollout.engine=lmdeploy: it needs a CUDA device, and there is none; use torch")
    return "lmdeploy"


def _lmdeploy_version() -> str | None:
    try:
        return importlib.metadata.version("lmdeploy")
    except importlib.metadata.PackageNotFoundError:
        return None
