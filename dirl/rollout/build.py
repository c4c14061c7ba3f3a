"""A model and a name -> a rollout engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from dirl.model.sdar import BlockDiffusionModel
from dirl.rollout.engine import RolloutEngine
from dirl.rollout.torch_engine import TorchEngine


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine decodes, and how much at once."""

    engine: Literal["auto", "torch"] = "auto"  # auto: the best one this machine can run
    max_batch_size: int = 256  # sequences decoded at once; each takes a slot of the KV cache

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {self.max_batch_size}")


def build_engine(model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, config: EngineConfig) -> RolloutEngine:
    """The engine of `config`, holding the weights of `model`."""
    return TorchEngine(model, tokenizer, max_batch_size=config.max_batch_size)
