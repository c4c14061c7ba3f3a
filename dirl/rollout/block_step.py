"""Logits of many blocks -> the next state of each: one denoising step without a look at the device from the host.

Every position is drawn, masked or not, and only masked ones are used: picking out the masked ones first would make the
host wait for the device, which an engine that schedules ahead must not do.

Shapes: N sequences, B block length, T = N x B positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dirl.diffusion.distribution import counter_uniform, entropy, sample
from dirl.diffusion.unmasking import reveal_positions
from dirl.rollout.engine import SamplingConfig

_LOGITS_PER_CHUNK = 1 << 26  # float32 logits handled at once: 256 MB, and twice that for their float64 sums


@dataclass(frozen=True)
class BlockState:
    """The current blocks of sequences, with how each token came to be there."""

    token_ids_NB: Tensor  # int64
    masked_NB: Tensor  # bool
    steps_NB: Tensor  # int64, denoising step within the block, from 1; 0 where masked or of the prompt
    logprobs_NB: Tensor  # float32 nats at that step; 0 where masked or of the prompt


@dataclass(frozen=True)
class Draws:
    """What a distribution per position gave."""

    token_ids: Tensor  # int64
    logprobs: Tensor  # float32, under the distribution sampled from
    confidences: Tensor  # float32, probability before top-k and top-p
    entropies: Tensor  # float32, nats; zeros unless asked for


def denoise(
    state: BlockState,
    logits_TV: Tensor,
    sampling: SamplingConfig,
    suppressed_V: Tensor,
    seed_N: Tensor,
    position_NB: Tensor,
) -> BlockState:
    """The state after one step; a block with no masks stays as it is.

    Random numbers depend on (seed, position, step) only and are those of TorchEngine: the same logits and seed give the
    same completion in any engine, batch or order.

    Args:
        position_NB: absolute positions.
    """
    step_N1 = state.steps_NB.amax(dim=1, keepdim=True)
    seed_NB, draw_NB = (x.expand_as(position_NB) for x in (seed_N[:, None], step_N1))
    uniform_NB = counter_uniform(seed_NB, position_NB, 2 * draw_NB)
    drawn = draw_tokens(logits_TV, sampling, suppressed_V, uniform_NB.flatten())
    token_NB, logprob_NB, confidence_NB, entropy_NB = (
        x.view_as(position_NB) for x in (drawn.token_ids, drawn.logprobs, drawn.confidences, drawn.entropies)
    )
    order_NB = counter_uniform(seed_NB, position_NB, 2 * draw_NB + 1)
    revealed_NB = reveal_positions(sampling.unmasking, state.masked_NB, confidence_NB, entropy_NB, order_NB)
    return BlockState(
        token_ids_NB=torch.where(revealed_NB, token_NB, state.token_ids_NB),
        masked_NB=state.masked_NB & ~revealed_NB,
        steps_NB=torch.where(revealed_NB, step_N1 + 1, state.steps_NB),
        logprobs_NB=torch.where(revealed_NB, logprob_NB, state.logprobs_NB),
    )


def draw_tokens(logits_TV: Tensor, sampling: SamplingConfig, suppressed_V: Tensor, uniform_T: Tensor) -> Draws:
    """One token per position, in chunks of positions."""
    rows = max(1, _LOGITS_PER_CHUNK // logits_TV.shape[1])
    parts = [
        _draw(logits, sampling, suppressed_V, uniform)
        for logits, uniform in zip(logits_TV.split(rows), uniform_T.split(rows), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def _draw(logits_TV: Tensor, sampling: SamplingConfig, suppressed_V: Tensor, uniform_T: Tensor) -> Draws:
    confidence_TV = sampling.distribution.confidence_logprobs(logits_TV, suppressed_V)
    sampling_TV = sampling.distribution.sampling_logprobs(confidence_TV)
    token_T = sampling_TV.argmax(dim=-1) if sampling.temperature == 0 else sample(sampling_TV, uniform_T)
    chosen_T1 = token_T[:, None]
    needs_entropy = sampling.unmasking_strategy == "entropy_bounded"
    return Draws(
        token_ids=token_T,
        logprobs=sampling_TV.gather(1, chosen_T1).squeeze(1),
        confidences=confidence_TV.gather(1, chosen_T1).squeeze(1).exp(),
        entropies=entropy(sampling_TV) if needs_entropy else torch.zeros_like(sampling_TV[:, 0]),
    )
