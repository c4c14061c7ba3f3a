"""View builders: pure functions from a completion to the noisy copies of its blocks that are scored.

SFT and all RL objectives differ only in them. Each returns `Views`, which `packing.pack` lays out.

Shapes: K blocks touched by a completion, V views, B block length.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Generator, Tensor

from dirl.diffusion.noising import NoiseConfig, draw_mask, noise_weights
from dirl.diffusion.packing import DiffusionScheme, PackedViews, ViewedDocument, Views, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.errors import UserError

Scored = Literal["revealed", "masked"]
StepSampling = Literal["uniform", "surprisal"]


def noisy_views(
    trajectory: Trajectory,
    scored_KB: Tensor,
    levels_K: Tensor,
    mask_token_id: int,
    *,
    noise: NoiseConfig,
    generator: Generator,
) -> Views:
    """SFT: one random noisy copy of each completion block, or a complementary pair of copies.

    Args:
        trajectory: the example; positions of step 0 are prompt and never masked.
        scored_KB: completion positions that may be masked and scored; the others stay visible as context.
        levels_K: noise level of each block, drawn by the caller so that levels can be spread over a batch.
    """
    maskable_KB = scored_KB & (trajectory.steps_KB > 0)
    masked_KB = draw_mask(levels_K, maskable_KB, generator)
    weights_K = noise_weights(levels_K, noise)
    block_K = torch.arange(len(masked_KB)) + trajectory.first_block
    token_ids_KB = trajectory.token_ids_KB
    if noise.complementary:
        # Both halves are unbiased on their own, the complement at level 1 - t; a pair is their mean.
        masked_KB = torch.stack([masked_KB, maskable_KB & ~masked_KB], dim=1).flatten(0, 1)
        complement_K = noise_weights((1 - levels_K).clamp(min=noise.min_noise), noise)
        weights_K = torch.stack([weights_K, complement_K], dim=1).flatten() / 2
        block_K, token_ids_KB = block_K.repeat_interleave(2), token_ids_KB.repeat_interleave(2, dim=0)
    nowhere_KB = torch.zeros_like(masked_KB)
    return Views(
        completion_ids=trajectory.completion_ids,
        block_V=block_K,
        token_ids_VB=token_ids_KB.masked_fill(masked_KB, mask_token_id),
        target_ids_VB=token_ids_KB,
        revealed_VB=masked_KB,
        held_VB=nowhere_KB,
        weight_VB=weights_K[:, None].expand(masked_KB.shape).contiguous(),
        visited_VB=nowhere_KB,
        importance_V=torch.ones(len(block_K)),
        lead=trajectory.lead,
        engine_logprob_VB=torch.full(masked_KB.shape, torch.nan),
    )


def replay_views(trajectory: Trajectory, mask_token_id: int, *, shrink: int = 1, score: Scored = "revealed") -> Views:
    """Exact replay: one view per denoising step the decoder took, in the state it saw, with the actions it chose.

    Args:
        shrink: so many neighbouring steps of a block are merged into the state before the first of them, and all their
            tokens are scored there. 1 is exact; more is an approximation that costs fewer tokens (TraceRL).
        score: `masked`: what a step left masked is scored as well, a guess of the future; a step's tokens count their
            mean, and all of a completion's as much as otherwise (RLDF).
    """
    # Steps of a block are 1, 2, ... without gaps: each step reveals something.
    merged_KB = (trajectory.steps_KB + shrink - 1) // shrink  # 0 stays 0: the prompt's
    num_views_K = merged_KB.max(dim=1).values
    block_V = torch.arange(len(num_views_K)).repeat_interleave(num_views_K)
    first_view_K = num_views_K.cumsum(0) - num_views_K
    number_V1 = (torch.arange(len(block_V)) - first_view_K[block_V] + 1)[:, None]
    merged_VB, steps_VB, token_ids_VB = (x[block_V] for x in (merged_KB, trajectory.steps_KB, trajectory.token_ids_KB))
    revealed_VB = merged_VB == number_V1
    is_first_VB = steps_VB == (number_V1 - 1) * shrink + 1
    held_VB = merged_VB > number_V1
    if trajectory.window:  # of the masks, only those of the step's own window could have been revealed
        window_VB = trajectory.windows_KB[block_V]
        current_V1 = window_VB.masked_fill(~revealed_VB, -1).amax(dim=1, keepdim=True)
        held_VB &= window_VB == current_V1
    views = Views(
        completion_ids=trajectory.completion_ids,
        block_V=block_V + trajectory.first_block,
        token_ids_VB=token_ids_VB.masked_fill(merged_VB >= number_V1, mask_token_id),
        target_ids_VB=token_ids_VB,
        revealed_VB=revealed_VB,
        held_VB=held_VB,
        weight_VB=torch.ones(steps_VB.shape),
        visited_VB=(revealed_VB & is_first_VB) | held_VB,
        importance_V=torch.ones(len(block_V)),
        engine_logprob_VB=_recorded(trajectory, block_V, revealed_VB & is_first_VB, held_VB if shrink == 1 else None),
        confidence_threshold=trajectory.confidence_threshold,
        lead=trajectory.lead,
    )
    return views if score == "revealed" else _with_masked_scored(views)


def _recorded(trajectory: Trajectory, block_V: Tensor, revealed_VB: Tensor, held_VB: Tensor | None) -> Tensor:
    """What the engine recorded of these reveals and holds, NaN of all else; (V, B) float32 nats.

    Raises:
        ValueError: it recorded another number of holds than there are.
    """
    recorded_VB = torch.full(revealed_VB.shape, torch.nan)
    if trajectory.logprobs is not None:
        recorded_VB = trajectory.placed(trajectory.logprobs)[block_V].masked_fill(~revealed_VB, torch.nan)
    if held_VB is not None and trajectory.hold_logprobs is not None:
        if len(trajectory.hold_logprobs) != (num_holds := int(held_VB.sum())):
            raise ValueError(
                f"hold_logprobs must have one for each of {num_holds} holds, got {len(trajectory.hold_logprobs)}"
            )
        recorded_VB[held_VB] = trajectory.hold_logprobs
    return recorded_VB


def _with_masked_scored(views: Views) -> Views:
    scored_VB = views.revealed_VB | views.held_VB
    weight_V1 = len(views.completion_ids) / (len(views) * scored_VB.sum(dim=1, keepdim=True))
    return replace(
        views,
        revealed_VB=scored_VB,
        held_VB=torch.zeros_like(scored_VB),
        weight_VB=weight_V1.expand(scored_VB.shape).contiguous(),
        visited_VB=views.visited_VB & views.revealed_VB,
        engine_logprob_VB=views.engine_logprob_VB.masked_fill(views.held_VB, torch.nan),
    )


def sampled_steps(views: Views, trajectory: Trajectory, num_steps: int, sampling: StepSampling, seed: int) -> Views:
    """About `num_steps` of a completion's views, each weighted by 1 over how often it was expected to be drawn.

    Drawn at even distances along the cumulated probabilities, from one random offset: a sum over the drawn views, so
    weighted, has the sum over all views as its expectation, whatever the probabilities. `surprisal` draws a step in
    proportion to the nats of what it revealed, mixed with a tenth of `uniform`, so that no weight is out of bounds.

    Raises:
        UserError: `surprisal` of a completion whose engine recorded no log-probabilities.
    Source: AGRPO (arXiv 2510.04019), which draws by entropy; RLDF for the surprisal, without weights.
    """
    if len(views) <= num_steps:
        return views
    share_V = torch.full((len(views),), 1 / len(views), dtype=torch.float64)
    if sampling == "surprisal":
        surprisal_V = _surprisal(views, trajectory)
        if float(surprisal_V.sum()) > 0:
            share_V = 0.9 * surprisal_V / surprisal_V.sum() + 0.1 * share_V
    expected_V = share_V * num_steps
    offset = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    end_V = expected_V.cumsum(0)
    end_V[-1] = num_steps  # rounding must not lose the last draw
    drawn_V = (end_V - offset).ceil().clamp(min=0).diff(prepend=torch.zeros(1, dtype=torch.float64))
    importance_V = (views.importance_V * drawn_V / expected_V).float()
    return replace(views, importance_V=importance_V).rows(drawn_V > 0)


def _surprisal(views: Views, trajectory: Trajectory) -> Tensor:
    """Nats of what each step revealed, as the engine recorded them; (V,) float64."""
    logprobs_R = trajectory.logprobs
    if logprobs_R is None or not bool(logprobs_R.isfinite().all()):
        raise UserError("step_sampling=surprisal: the engine recorded no log-probabilities of its tokens; use uniform")
    surprisal_KB = trajectory.placed(-logprobs_R.double())
    surprisal_VB = surprisal_KB[views.block_V - trajectory.first_block]
    # What is masked here and not in the block's next view; a view may score more than that.
    masked_VB = views.revealed_VB | views.held_VB
    has_next_V1 = views.block_V[:, None] == torch.cat([views.block_V[1:], views.block_V[:1] - 1])[:, None]
    revealed_VB = masked_VB & ~(masked_VB.roll(-1, dims=0) & has_next_V1)
    return (surprisal_VB * revealed_VB).sum(dim=1).clamp(min=0)


def placeholder_pack(scheme: DiffusionScheme) -> PackedViews:
    """One block of one view: something to run a forward and a backward pass on where a rank has nothing to do."""
    ids_R = torch.zeros(scheme.block_length or 1, dtype=torch.int64)
    trajectory = Trajectory(ids_R[:0], ids_R, torch.ones_like(ids_R), scheme.block_length)
    return pack([ViewedDocument(ids_R[:0], [replay_views(trajectory, scheme.mask_token_id)])], scheme.block_length)
