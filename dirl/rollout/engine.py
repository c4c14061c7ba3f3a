"""Prompts (token ids) -> completions (token ids and the step at which each was revealed): the contract of every engine.

An engine decodes block by block. Blocks are aligned to absolute position 0, so the tail of a prompt that does not fill
a block shares its block with the first completion tokens. Token ids are the truth; text is made once, for people and
reward functions, and never goes back in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import nn

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.unmasking import UnmaskingRule, UnmaskingStrategy

# 0: stays; 1: the KV cache is freed and the weights wait on the host; 2: both are dropped, and weights pushed again
SleepLevel = Literal[0, 1, 2]


class RolloutError(RuntimeError):
    """An engine could not return one completion per prompt."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn and which of them are revealed in a denoising step."""

    temperature: float = 1.0  # 0: greedy (confidence and logprobs are then those of temperature 1)
    top_k: int = 0  # 0: off. The exact default: what is sampled is what is scored
    top_p: float = 1.0  # 1: off
    max_completion_length: int = 256  # tokens; generation ends at the last block that fits
    unmasking_strategy: UnmaskingStrategy = "low_confidence_dynamic"
    confidence_threshold: float = (
        0.9  # low_confidence_dynamic: reveal every token sampled with at least this probability
    )
    denoising_steps: int = 0  # low_confidence_static, sequential, random: steps per block; 0: one per position
    entropy_bound: float = 0.1  # entropy_bounded: nats of joint-dependence error allowed per step

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0 (0 is greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0 turns it off), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1 turns it off), got {self.top_p}")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold must be in [0, 1], got {self.confidence_threshold}")
        if self.denoising_steps < 0:
            raise ValueError(f"denoising_steps must be >= 0 (0: one per position), got {self.denoising_steps}")
        if self.entropy_bound < 0:
            raise ValueError(f"entropy_bound must be >= 0 nats, got {self.entropy_bound}")

    @property
    def distribution(self) -> TokenDistribution:
        return TokenDistribution(self.temperature, self.top_k, self.top_p)

    @property
    def unmasking(self) -> UnmaskingRule:
        return UnmaskingRule(
            self.unmasking_strategy, self.confidence_threshold, self.denoising_steps, self.entropy_bound
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Which engine decodes, where, and how much at once."""

    engine: Literal["auto", "torch", "lmdeploy"] = "auto"  # auto: lmdeploy on CUDA where it is installed, else torch
    mode: Literal["colocate", "server"] = "colocate"  # colocate: in this process; server: in others (`dirl serve`)
    max_batch_size: int = 256  # sequences decoded at once; each takes a slot of the KV cache
    max_cached_tokens: int = 0  # torch: tokens its KV cache has room for; 0: half of the memory that is free
    compile: Literal["auto", "always", "never"] = "auto"  # torch: fuse small operations (torch.compile); auto: on CUDA
    cache_max_entry_count: float = 0.5  # lmdeploy: part of the GPU memory free at start that its KV cache takes
    sleep_level: SleepLevel = 1  # lmdeploy, colocate: what it gives back while the trainer works
    server_urls: list[str] = field(default_factory=list)  # server: running `dirl serve`s, as http://HOST:PORT
    server_devices: list[str] = field(default_factory=list)  # server, no urls: CUDA device of each local rank's own one

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size must be at least 1, got {self.max_batch_size}")
        if self.max_cached_tokens < 0:
            raise ValueError(f"max_cached_tokens must be >= 0 (0: by free memory), got {self.max_cached_tokens}")
        if not 0 < self.cache_max_entry_count < 1:
            raise ValueError(f"cache_max_entry_count must be between 0 and 1, got {self.cache_max_entry_count}")
        if self.sleep_level not in (0, 1, 2):
            raise ValueError(f"sleep_level must be 0, 1 or 2, got {self.sleep_level}")
        if self.mode == "colocate" and (self.server_urls or self.server_devices):
            raise ValueError("server_urls and server_devices are read with mode=server only; set that, or remove them")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt became. R counts every token of every block that was touched, also those after EOS."""

    prompt_ids: list[int]  # (P,)
    token_ids: list[int]  # (R,)
    step_map: list[int]  # (R,) 1-based denoising step within its block at which each token was revealed
    logprobs: list[float] | None  # (R,) nats, of each token at its step, under the distribution it was drawn from
    completion_length: int  # tokens up to and including the first EOS; R when there is none
    finish_reason: Literal["stop", "length"]  # stop: an EOS was revealed
    num_denoising_steps: int  # forward passes that revealed something, over all blocks
    text: str  # of the tokens before the first EOS
    block_length: int = 0  # tokens per block; 0: not recorded (see with_texts, which adds it and the next)
    token_texts: list[str] | None = None  # (R,) what each token reads, for people

    @property
    def tokens_per_step(self) -> float:
        """Tokens up to and including EOS per denoising step."""
        return self.completion_length / self.num_denoising_steps

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"

    def _repr_html_(self) -> str:
        """What a notebook shows: the tokens, coloured by the step they were revealed at."""
        from dirl.rollout.completions import completion_html

        return completion_html(self)

    def show(self) -> None:
        """Play the denoising: with a slider in a notebook, step by step in a terminal."""
        from dirl.rollout.completions import play

        play([self])

    def to_pandas(self) -> Any:
        """One row per token; needs pandas."""
        from dirl.rollout.completions import tokens_table

        return tokens_table(self)


class RolloutEngine(Protocol):
    """Everything that can decode. Adding an engine is writing these members."""

    weights_version: int  # counts complete pushes of weights; 0 before the first

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Args:
            prompts: token ids; a prompt that stands G times is decoded G times.
            seeds: one per prompt; a sample depends on its prompt, its seed and `sampling` only.
        Raises:
            RolloutError: a completion is missing, or the weights are stale.
        """
        ...

    def update_weights(self, model: nn.Module) -> None:
        """Copy the weights of `model` into the engine, in place; `weights_version` counts up."""
        ...

    def sleep(self) -> None:
        """Give memory back while the engine is not needed."""
        ...

    def wake(self) -> None:
        """Undo `sleep`."""
        ...

    def close(self) -> None:
        """Release everything; the engine cannot be used afterwards."""
        ...
