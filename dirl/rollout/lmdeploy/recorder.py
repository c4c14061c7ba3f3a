"""LMDeploy's block-diffusion classes, extended to decode as the trainer scores and to tell how they decoded.

The stock classes (0.18.0) return no step map and no usable logprobs, draw all positions of a block and neighbouring
requests from shared random numbers, compute logits in the model's dtype, fix the unmasking rule and the mask token at
start, ignore an EOS in the prompt's own block and drop the tokens after one. Here the schedule, the paged KV cache, the
kernels and the CUDA graphs stay theirs; what happens to the logits is `block_step.Sampler`, TorchEngine's own,
with random streams per request, position and denoising step.

How a sequence travels: `make_extra_inputs` puts its seed and its block's history beside the stock mask;
`post_sampling` advances them; `RecordingStepInputs` carries them from step to step on the device; `make_extra_outputs`
sends them to the host, where `RecordedSequence` files every finished block. The finished `Trace` leaves through the
stock response field `routed_experts`, which takes any object. A sequence that is preempted resumes from what it filed,
with the same draws.

These are private interfaces of LMDeploy: see `version.py`.

Shapes: N sequences, B block length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from lmdeploy.pytorch import consts
from lmdeploy.pytorch.messages import MessageStatus
from lmdeploy.pytorch.models import module_map
from lmdeploy.pytorch.models import sdar as stock_sdar
from lmdeploy.pytorch.models import sdar_moe as stock_sdar_moe
from lmdeploy.pytorch.strategies import dllm as stock_dllm
from lmdeploy.pytorch.strategies.dllm.model_agent import (
    DLLMExtraInputs,
    DLLMExtraOutputs,
    DLLMModelAgentStrategy,
    DLLMStoppingCriteria,
)
from lmdeploy.pytorch.strategies.dllm.sequence import DLLMSequenceStrategy, SchedulerSequenceDLLM
from lmdeploy.pytorch.strategies.dllm.step_inputs import DLLMStepInputs
from torch import Tensor

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.model.families.block_diffusion import float32_product
from dirl.rollout.block_step import Blocks, Sampler

_MASKED, _UNMASKED, _CACHED = consts.DLLM_MASKED, consts.DLLM_UNMASKED, consts.DLLM_CACHED


def install() -> None:
    """Make engines that are built from now on in this process record. Idempotent.

    LMDeploy looks these names up when it builds an engine, in the scheduler and in the model's worker.
    """
    stock_dllm.DLLMStrategyFactory = RecordingStrategyFactory
    for name in ("SDARForCausalLM", "SDARMoeForCausalLM"):
        module_map.MODULE_MAP[name] = f"{__name__}.{name}"


@dataclass(frozen=True)
class Trace:
    """What a finished sequence was: every token of every block it touched."""

    token_ids: list[int]  # (R,)
    step_map: list[int]  # (R,)
    logprobs: list[float]  # (R,) nats
    holds: list[float]  # nats, as `Completion.hold_logprobs`; empty where they are not recorded


# -- on the device


@dataclass
class RecordingInputs(DLLMExtraInputs):
    """The stock mask (N x B, flat) with each sequence's seed and the history of its block."""

    seeds: Tensor  # (N,) int64
    steps: Tensor  # (N, B) int64
    logprobs: Tensor  # (N, B) float32
    holds: Tensor | None = None  # (N, B) float32, of the step just taken: no step reads those before it

    def next_record(self) -> dict[str, Tensor]:
        """The record for the step that follows; a block that is in the cache makes room for a new one."""
        is_done_N1 = (self.dllm_mask.view_as(self.steps) == _CACHED).all(dim=1, keepdim=True)
        return {
            "seeds": self.seeds,
            "steps": self.steps.masked_fill(is_done_N1, 0),
            "logprobs": self.logprobs.masked_fill(is_done_N1, 0.0),
        }


@dataclass
class RecordingOutputs(DLLMExtraOutputs):
    """What goes back to the host after each step."""

    steps: Tensor  # (N, B) int64
    logprobs: Tensor  # (N, B) float32
    holds: Tensor | None  # (N, B) float32, of this step; NaN where nothing is held


_RECORD = ("seeds", "steps", "logprobs")


@dataclass
class RecordingStepInputs(DLLMStepInputs):
    """Carries the record along wherever the stock class carries the mask."""

    extra_inputs: Any = None  # RecordingInputs

    def merge_prefill(
        self, inputs: Any, extra_inputs: RecordingInputs, *args: Any, **kwargs: Any
    ) -> None:  # the stock arguments, handed through
        record = extra_inputs.next_record()
        if self.model_inputs is not None:
            record = {name: torch.cat([getattr(self.extra_inputs, name), record[name]]) for name in _RECORD}
        super().merge_prefill(inputs, extra_inputs, *args, **kwargs)
        self.extra_inputs = RecordingInputs(self.extra_inputs.dllm_mask, **record)

    def reindex(self, delta: Any) -> None:
        record = {name: getattr(self.extra_inputs, name)[delta.indices] for name in _RECORD}
        super().reindex(delta)
        self.extra_inputs = RecordingInputs(self.extra_inputs.dllm_mask, **record)

    def step_decode(self, model_inputs: Any, extra_inputs: RecordingInputs, *args: Any, **kwargs: Any) -> None:
        record = extra_inputs.next_record()
        super().step_decode(model_inputs, extra_inputs, *args, **kwargs)
        self.extra_inputs = RecordingInputs(self.extra_inputs.dllm_mask, **record)


class RecordingAgentStrategy(DLLMModelAgentStrategy):
    """Draws and reveals tokens as the trainer scores them, and keeps the record.

    The engine is driven with temperature 1 and top-k 1, so that LMDeploy hands the logits on unchanged (its own draw is
    an argmax, and unused). The rules that are applied instead are `rules`, which may change between batches.
    """

    def __init__(self, dllm_config: Any, dllm_mask_token: int) -> None:
        super().__init__(dllm_config=dllm_config, dllm_mask_token=dllm_mask_token)
        self.rules, self.records_holds = (TokenDistribution(), UnmaskingRule()), False
        self.suppressed_V: Tensor | None = None  # bool on the device; set before the first request

    def make_extra_inputs(self, seqs: Sequence[RecordedSequence], model_inputs: Any) -> RecordingInputs:
        stock = super().make_extra_inputs(seqs, model_inputs)
        return RecordingInputs(
            stock.dllm_mask,
            seeds=torch.tensor([seq.sampling_param.random_seed for seq in seqs], dtype=torch.int64),
            steps=torch.from_numpy(np.stack([seq.block_steps for seq in seqs])),
            logprobs=torch.from_numpy(np.stack([seq.block_logprobs for seq in seqs])),
        )

    def slice_extra_inputs(
        self, extra_inputs: RecordingInputs, model_inputs: Any, model_outputs: Any, **_: Any
    ) -> RecordingInputs:
        mask = self.slice_outputs(extra_inputs.dllm_mask, model_inputs.seq_length)
        return RecordingInputs(mask, extra_inputs.seeds, extra_inputs.steps, extra_inputs.logprobs)

    def make_stopping_criteria(self, seqs: Sequence[RecordedSequence]) -> DLLMStoppingCriteria:
        """As stock, but an EOS counts from the end of the prompt on, not only from the end of its block."""
        stock = super().make_stopping_criteria(seqs)
        return replace(stock, output_start_pos=torch.tensor([seq.input_end_pos for seq in seqs]))

    def make_extra_outputs(self, extra_inputs: RecordingInputs) -> RecordingOutputs:
        return RecordingOutputs(extra_inputs.dllm_mask, extra_inputs.steps, extra_inputs.logprobs, extra_inputs.holds)

    @torch.inference_mode()
    def post_sampling(
        self, inputs: Any, logits: Tensor, next_token_ids: Tensor, extra_inputs: RecordingInputs
    ) -> tuple[Tensor, RecordingInputs]:
        """One denoising step. Blocks that were whole before it are in the cache after it.

        The mask is never written in place: its old value may still be on its way to the host.
        """
        assert self.suppressed_V is not None
        mask_NB = extra_inputs.dllm_mask.view(-1, self.block_size)
        token_NB = self.slice_outputs(inputs.input_ids.flatten(), inputs.seq_length).view_as(mask_NB)
        end_N1 = (inputs.history_lengths + inputs.seq_length)[:, None]
        position_NB = end_N1 - self.block_size + torch.arange(self.block_size, device=mask_NB.device)
        blocks = Blocks(mask_NB == _MASKED, position_NB, extra_inputs.steps.amax(dim=1), extra_inputs.seeds)
        sampler = Sampler(_as_they_are, *self.rules, self.suppressed_V, self.records_holds)
        step = sampler.denoise(logits, blocks)
        is_whole_N1 = (mask_NB == _UNMASKED).all(dim=1, keepdim=True)
        new_mask_NB = mask_NB.masked_fill(step.revealed_NB, _UNMASKED).masked_fill(is_whole_N1, _CACHED)
        steps_NB = torch.where(step.revealed_NB, blocks.step_N[:, None] + 1, extra_inputs.steps)
        logprobs_NB = torch.where(step.revealed_NB, step.logprobs_NB, extra_inputs.logprobs)
        token_NB = torch.where(step.revealed_NB, step.token_ids_NB, token_NB)
        record = RecordingInputs(new_mask_NB.flatten(), extra_inputs.seeds, steps_NB, logprobs_NB, step.holds_NB)
        return token_NB.flatten(), record


def _as_they_are(logits_TV: Tensor) -> Tensor:
    """The head of an engine that computes logits itself."""
    return logits_TV


# -- on the host


@dataclass
class RecordedSequence(SchedulerSequenceDLLM):
    """A sequence that files its blocks as they are finished, whole: a stop word does not cut its block."""

    step_map: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    holds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_steps = np.zeros(self.dllm_block_length, dtype=np.int64)
        self.block_logprobs = np.zeros(self.dllm_block_length, dtype=np.float32)

    def observe(self, steps: np.ndarray, logprobs: np.ndarray) -> None:
        """The state of the current block after the step whose tokens follow."""
        self.block_steps, self.block_logprobs = steps.copy(), logprobs.copy()

    def _update_token_ids_decode(self, token_ids: np.ndarray, dllm_mask: np.ndarray) -> None:
        num_before = self.num_new_tokens
        super()._update_token_ids_decode(token_ids, dllm_mask)
        num_new = self.num_new_tokens - num_before
        if num_new:
            self.step_map += self.block_steps[-num_new:].tolist()
            self.logprobs += self.block_logprobs[-num_new:].tolist()
        if (dllm_mask == _CACHED).all():
            self.observe(np.zeros_like(self.block_steps), np.zeros_like(self.block_logprobs))

    def set_stop_pos(self, pos: int) -> None:
        """Stock forgets the tokens after the stop; they were context of those before it."""

    @property
    def routed_experts(self) -> Trace | None:
        """The trace of a finished sequence, in the field that travels to the response."""
        if self.status != MessageStatus.STOPPED:
            return None
        return Trace(self.generated_ids.tolist(), list(self.step_map), list(self.logprobs), list(self.holds))


class RecordingSequenceStrategy(DLLMSequenceStrategy):
    """Makes recorded sequences and shows each its steps before its tokens."""

    def make_sequence(self, *args: Any, **kwargs: Any) -> RecordedSequence:
        stock = super().make_sequence(*args, **kwargs)
        made = {f.name: getattr(stock, f.name) for f in fields(SchedulerSequenceDLLM) if f.init}
        return RecordedSequence(**made)

    def update_running(
        self, running: Sequence[RecordedSequence], batched_outputs: Any, model_inputs: Any, delta: Any, **kwargs: Any
    ) -> None:
        recorded = batched_outputs.extra_outputs
        holds = [[]] * len(running) if recorded.holds is None else recorded.holds.tolist()
        columns = recorded.steps.numpy(), recorded.logprobs.numpy(), holds
        for seq, steps, logprobs, held in zip(running, *columns, strict=True):
            if seq.status == MessageStatus.RUNNING:
                seq.observe(steps, logprobs)
                seq.holds += [hold for hold in held if not math.isnan(hold)]
        super().update_running(running, batched_outputs, model_inputs, delta, **kwargs)


# -- the wiring


class RecordingStrategyFactory(stock_dllm.DLLMStrategyFactory):
    """The stock factory with the classes above, and the mask token of the checkpoint instead of a constant."""

    def __init__(self, model_config: Any, dllm_config: Any) -> None:
        super().__init__(model_config=model_config, dllm_config=dllm_config)
        model_config.dllm_mask_token = model_config.hf_config.mask_token_id

    def build_model_agent_strategy(self) -> RecordingAgentStrategy:
        return RecordingAgentStrategy(self.dllm_config, self.model_config.dllm_mask_token)

    def build_sequence_strategy(self) -> RecordingSequenceStrategy:
        return RecordingSequenceStrategy(self.dllm_block_length, self.model_config.dllm_mask_token)

    def build_step_inputs(self) -> RecordingStepInputs:
        return RecordingStepInputs(
            _block_size=self.dllm_block_length, _dllm_mask_token=self.model_config.dllm_mask_token
        )


class _Float32Head:
    """Logits accumulated and kept in float32: rounding them to bfloat16 would move every logprob."""

    lm_head: Any

    def get_logits(self, hidden_states: Tensor) -> Tensor:
        logits = float32_product(hidden_states.flatten(0, -2), self.lm_head.weight.T)
        return logits.unflatten(0, hidden_states.shape[:-1])


class SDARForCausalLM(_Float32Head, stock_sdar.SDARForCausalLM):
    """The stock model with float32 logits."""


class SDARMoeForCausalLM(_Float32Head, stock_sdar_moe.SDARMoeForCausalLM):
    """The stock model with float32 logits."""
