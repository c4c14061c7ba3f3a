"""How far engine and trainer differ on the same actions under the same weights, and what corrects for it.

An engine never computes exactly what the trainer computes (other kernels, other precision), so its samples come from a
slightly different policy. `importance_weights` corrects for that: the surrogate is also multiplied with the probability
ratio of the trainer's policy, as it sampled, and the engine's, cut at `importance_sampling_clip_max`.

Shapes: T actions. Source: TRL's GRPO trainer (vllm_importance_sampling_mode).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ImportanceSampling, ObjectiveConfig
from dirl.training.distributed import Distributed
from dirl.training.optimizer import StepOutcome

Gauged = tuple[dict[str, Tensor], dict[str, Tensor]]  # sums, and largest values


def importance_weights(
    trainer_logprob_T: Tensor,
    engine_logprob_T: Tensor,
    completion_T: Tensor,
    correction: ImportanceSampling,
    clip_max: float,
) -> Tensor:
    """Probability ratio of trainer and engine for each action, cut as `correction` says; (T,) float32, no gradient.

    The ratio of an action (token_*) or of all actions of its completion together (sequence_*). Actions that the engine
    has no logprob of count as equal: their log-ratio is 0.

    Args:
        trainer_logprob_T: by the trainer, under the weights that the engine sampled with.
        engine_logprob_T: as the engine recorded them; NaN where it recorded none.
        completion_T: int64, the completion of each action, all of whose actions are here; below T.
        correction: `none` is not cut.
    """
    ratio_T = _raw_ratios(trainer_logprob_T, engine_logprob_T, completion_T, correction)
    if correction.endswith("truncate"):
        return ratio_T.clamp(max=clip_max)
    if correction.endswith("mask"):
        return ratio_T.masked_fill(ratio_T > clip_max, 0.0)
    return ratio_T


def _raw_ratios(
    trainer_logprob_T: Tensor, engine_logprob_T: Tensor, completion_T: Tensor, correction: ImportanceSampling
) -> Tensor:
    difference_T = (trainer_logprob_T.detach() - engine_logprob_T).nan_to_num(nan=0.0)
    if correction.startswith("sequence"):
        difference_T = torch.zeros_like(difference_T).index_add(0, completion_T, difference_T)[completion_T]
    return difference_T.exp()


def gauge(batch: PolicyBatch, own_T: Tensor, objective: ObjectiveConfig, fresh_since: int | None) -> Gauged:
    """How far trainer and engine differ on the same actions under the same weights: sums, and largest values.

    The trainer's side of fresh actions is what the policy gives now; of those that had to wait, what was remembered.
    """
    if fresh_since is None:
        is_compared_T, then_T = torch.zeros_like(own_T, dtype=torch.bool), own_T
    else:
        is_fresh_T = batch.sampled_at_T >= fresh_since
        then_T = torch.where(is_fresh_T, own_T, batch.behavior_logprob_T)
        is_compared_T = ~batch.engine_logprob_T.isnan() & (is_fresh_T | batch.is_remembered_T)
    correction = objective.importance_sampling_correction
    difference_T = (then_T - batch.engine_logprob_T).abs()
    ratio_T = _raw_ratios(then_T, batch.engine_logprob_T, batch.completion_T, correction)
    is_cut_T = is_compared_T & (ratio_T > objective.importance_sampling_clip_max) & (correction != "none")

    def compared(value_T: Tensor, otherwise: float) -> Tensor:
        return torch.where(is_compared_T, value_T, otherwise)

    def largest(value_T: Tensor) -> Tensor:
        return torch.cat([value_T, value_T.new_full((1,), -math.inf)]).amax()

    sums = {
        "compared": is_compared_T.sum(),
        "difference": compared(difference_T, 0.0).sum(),
        "ratio": compared(ratio_T, 0.0).sum(),
        "cut": is_cut_T.sum(),
    }
    return sums, {
        "difference": largest(compared(difference_T, -math.inf)),
        "ratio": largest(compared(ratio_T, -math.inf)),
        "minus_ratio": largest(compared(-ratio_T, -math.inf)),
    }


def gauged_over_ranks(found: Sequence[Gauged], distributed: Distributed) -> StepOutcome:
    """What the packs of all ranks come to; collective. A rank may have none."""
    sums = [sum(float(sums[name]) for sums, _ in found) for name in _SUMS]
    largest = [max((float(largest[name]) for _, largest in found), default=-math.inf) for name in _LARGEST]
    return StepOutcome(
        {},
        dict(zip(_SUMS, distributed.sum(*sums), strict=True)),
        {name: distributed.max(value) for name, value in zip(_LARGEST, largest, strict=True)},
    )


_SUMS = ("compared", "difference", "ratio", "cut")
_LARGEST = ("difference", "ratio", "minus_ratio")
