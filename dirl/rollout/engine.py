"""Prompts (token ids) -> completions (token ids, and which denoising step revealed each): every engine's contract.

An engine decodes block by block; under full attention one canvas of prompt and masks, window by window. Blocks are
aligned to absolute position 0, so the tail of a prompt that does not fill a block shares its block with the first
completion tokens. Token ids are the truth; text is made once, for people and reward functions, and never goes back in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from torch import nn

from dirl.config import Config, bounded
from dirl.diffusion.distribution import Confidence, TokenDistribution
from dirl.diffusion.packing import DiffusionScheme
from dirl.diffusion.unmasking import UnmaskingRule, UnmaskingStrategy
from dirl.errors import UserError

# 0: stays; 1: the KV cache is freed and the weights wait on the host; 2: both are dropped, and weights pushed again
SleepLevel = Literal[0, 1, 2]
# Full attention: which keys the steps of a window take as they were when it began (`local/canvas.py`). none: exact
ApproximateCache = Literal["none", "prefix", "dual"]


LEAST_TEMPERATURE = 1e-3


class RolloutError(UserError):
    """An engine could not return one completion per prompt."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Config):
    """How tokens are drawn and which of them are revealed in a denoising step."""

    temperature: float = bounded(1.0, least=0)  # 0: greedy (confidence and logprobs are then those of temperature 1)
    top_k: int = bounded(0, least=0)  # 0: off. The exact default: what is sampled is what is scored
    top_p: float = bounded(1.0, above=0, most=1)  # 1: off
    max_completion_length: int = bounded(256, least=1)  # tokens; generation ends at the last block that fits
    unmasking_strategy: UnmaskingStrategy = "low_confidence_dynamic"
    # low_confidence_dynamic: reveal every token sampled with at least this probability
    confidence_threshold: float = bounded(0.9, least=0, most=1)
    # the probability that is compared: under the distribution drawn from, after temperature only, or before it
    confidence: Literal["auto", Confidence] = "auto"  # auto: as the model's family has it
    at_threshold: Literal["auto", "reveal", "hold"] = "auto"  # what a token of just that probability does
    # low_confidence_static, sequential, random: steps per block; 0: one per position
    denoising_steps: int = bounded(0, least=0)
    entropy_bound: float = bounded(0.1, least=0)  # entropy_bounded: nats of joint-dependence error allowed per step
    # full attention: tokens of a window, all revealed before any right of it (LLaDA's block_length); 0: one window
    generation_window: int = bounded(32, least=0)
    # blocks: tokens of a block that are all revealed before any right of them (Fast-dLLM v2); 0: the whole block
    sub_block_length: int = bounded(0, least=0)
    # also record the log-probability of each position that a step leaves masked to stay so. RL turns it on by itself
    # where objective.likelihood=trajectory trains off-policy; takes the rows of such positions through lm_head again
    record_holds: bool = False

    def check(self) -> None:
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"temperature must be 0 (greedy) or at least {LEAST_TEMPERATURE}, below which logits overflow, got "
                f"{self.temperature}"
            )

    def rules(self, scheme: DiffusionScheme) -> tuple[TokenDistribution, UnmaskingRule]:
        """How a model's logits become tokens, and which of them a step reveals.

        Raises:
            UserError: sub-blocks of a model that has no blocks.
        """
        if scheme.is_full and self.sub_block_length:
            raise UserError(
                f"sub_block_length={self.sub_block_length} divides blocks, and this model has none; set "
                "generation_window, and sub_block_length=0"
            )
        confidence = scheme.confidence if self.confidence == "auto" else self.confidence
        holds = scheme.holds_at_threshold if self.at_threshold == "auto" else self.at_threshold == "hold"
        return TokenDistribution(self.temperature, self.top_k, self.top_p, confidence), UnmaskingRule(
            self.unmasking_strategy,
            self.confidence_threshold,
            self.denoising_steps,
            self.entropy_bound,
            self.sub_block_length,
            holds,
        )


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Config):
    """Which engine decodes, where, and how much at once."""

    engine: Literal["auto", "torch", "lmdeploy"] = "auto"  # auto: lmdeploy on CUDA where it is installed, else torch
    mode: Literal["colocate", "server"] = "colocate"  # colocate: in this process; server: in others (`dirl serve`)
    max_batch_size: int = bounded(256, least=1)  # sequences decoded at once; each takes a slot of the KV cache
    # torch: tokens its KV cache has room for; 0: half of the memory that is free
    max_cached_tokens: int = bounded(0, least=0)
    compile: Literal["auto", "always", "never"] = "auto"  # torch: fuse small operations (torch.compile); auto: on CUDA
    # full attention: keys that the steps of a window take as they were when it began. none: exact; prefix: those before
    # it; dual: those after it too. Completions are then another policy's
    approximate_cache: ApproximateCache = "none"
    # lmdeploy: part of the GPU memory free at start that its KV cache takes
    cache_max_entry_count: float = bounded(0.5, above=0, below=1)
    sleep_level: SleepLevel = 2  # lmdeploy, colocate: what it gives back while the trainer works
    server_urls: list[str] = field(default_factory=list)  # server: running `dirl serve`s, as http://HOST:PORT
    server_devices: list[str] = field(default_factory=list)  # server, no urls: CUDA device of each local rank's own one
    server_wait_seconds: float = bounded(120.0, least=0)  # server: how long one may be away before the run ends
    # server: how weights get there. http; collective: broadcast by gloo, or by NCCL from GPU to GPU; auto: so where it
    # can be formed
    weight_transfer: Literal["auto", "http", "collective"] = "auto"
    weight_transfer_host: str = "127.0.0.1"  # server: this trainer's address for the collective, on which it listens

    def check(self) -> None:
        if self.mode == "colocate" and (self.server_urls or self.server_devices):
            raise ValueError("server_urls and server_devices are read with mode=server only; set that, or remove them")


@dataclass(frozen=True)
class Request:
    """One prompt waiting to be decoded."""

    index: int  # its name among those that are decoded with it; `generate`: place in the caller's list
    prompt_ids: Sequence[int]
    seed: int
    end: int  # first position that may not be touched
    threshold: float | None = None  # of its own; None: that of the sampling
    is_enough: Callable[[], bool] | None = None  # asked after each block: True ends the completion there
    prefix: Completion | None = None  # whole blocks of its completion that were decoded before: it goes on behind them

    @property
    def known_ids(self) -> list[int]:
        """What stands before the tokens to decode: the prompt, and the prefix."""
        return [*self.prompt_ids, *(self.prefix.token_ids if self.prefix else ())]


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
    confidence_threshold: float | None = None  # that it was decoded with, where it had one of its own
    # of tokens that were revealed before any right of them. Full attention: step_map counts over all windows; else a
    # part of a block
    generation_window: int = 0
    num_unwritten: int = 0  # full attention: masks that stood after the R tokens to the end
    # nats, of each position that a step decided to leave masked, in the order of the decisions: by block, by denoising
    # step in it, from left to right, as replay has its holds. None: not recorded
    hold_logprobs: list[float] | None = None
    # (R,) optimizer steps that the weights which sampled each token had taken; empty: what its group says, for all
    sampled_at: list[int] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Tokens up to and including EOS per denoising step."""
        return self.completion_length / self.num_denoising_steps

    @property
    def is_truncated(self) -> bool:
        return self.finish_reason == "length"


class RolloutEngine(Protocol):
    """Everything that can decode. Adding an engine is writing these members."""

    weights_version: int  # counts complete pushes of weights; 0 before the first

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in the order of the prompts.

        Args:
            prompts: token ids; a prompt that stands G times is decoded G times.
            seeds: one per prompt; a sample depends on its prompt, its seed, its threshold and `sampling` only.
            thresholds: one per prompt, in the place of the confidence_threshold of `sampling`. None: that, for all.
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


@runtime_checkable
class OpenEngine(RolloutEngine, Protocol):
    """An engine that takes requests in while it decodes others."""

    def decode(self, queue: deque[Request], sampling: SamplingConfig) -> Iterator[tuple[int, Completion]]:
        """Completions of all requests in the queue as they end, each with its request's index.

        Whoever looks on (`Observer.stepped`) may append requests meanwhile; under block diffusion these join what is in
        flight as soon as there is room, under full attention they follow it.

        Args:
            sampling: of all of them; its max_completion_length is read under full attention only.
        """
        ...
