"""How far engine and trainer differ on the same actions under the same weights, and what corrects for it.

An engine never computes exactly what the trainer computes (other kernels, other precision), so its samples come from a
slightly different policy. `importance_weights` corrects for that: the surrogate is also multiplied with the probability
ratio of the trainer's policy, as it sampled, and the engine's, cut at `importance_sampling_clip_max`.

Shapes: T actions. Source: TRL's GRPO trainer (vllm_importance_sampling_mode).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ImportanceSampling, ObjectiveConfig
from dirl.training.distributed import Distributed
from dirl.training.optimizer import StepOutcome


class Gauged(NamedTuple):
    """A comparison of one micro-batch, on the device: the fields of `Loss` that bear these names."""

    sums: dict[str, Tensor]
    largest: dict[str, Tensor]
    samples: dict[str, Tensor]


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
    """How far trainer and engine differ on the same actions under the same weights.

    The trainer's side of fresh actions is what the policy gives now. Of those that had to wait it is what was
    remembered, which is the trainer's own with a correction only: without one the engine is taken at its word.
    """
    correction = objective.importance_sampling_correction
    is_compared_T, then_T = torch.zeros_like(own_T, dtype=torch.bool), own_T
    if fresh_since is not None:
        is_fresh_T = batch.sampled_at_T >= fresh_since
        then_T = torch.where(is_fresh_T, own_T, batch.behavior_logprob_T)
        is_remembered_T = batch.is_remembered_T & (correction != "none")
        is_compared_T = ~batch.engine_logprob_T.isnan() & (is_fresh_T | is_remembered_T)
    difference_T = (then_T - batch.engine_logprob_T).abs()
    ratio_T = _raw_ratios(then_T, batch.engine_logprob_T, batch.completion_T, correction)
    is_cut_T = is_compared_T & (ratio_T > objective.importance_sampling_clip_max) & (correction != "none")
    is_reveal_T = batch.packed.actions.is_reveal_T
    of_reveals_T, of_holds_T = is_compared_T & is_reveal_T, is_compared_T & ~is_reveal_T

    def largest(value_T: Tensor, which_T: Tensor) -> Tensor:
        return torch.cat([torch.where(which_T, value_T, -math.inf), value_T.new_full((1,), -math.inf)]).amax()

    sums = {
        "compared": of_reveals_T.sum(),
        "compared_holds": of_holds_T.sum(),
        "difference": torch.where(of_reveals_T, difference_T, 0.0).sum(),
        "hold_difference": torch.where(of_holds_T, difference_T, 0.0).sum(),
        "ratio": torch.where(is_compared_T, ratio_T, 0.0).sum(),
        "cut": is_cut_T.sum(),
    }
    most = {
        "difference": largest(difference_T, of_reveals_T),
        "hold_difference": largest(difference_T, of_holds_T),
        "ratio": largest(ratio_T, is_compared_T),
        "minus_ratio": largest(-ratio_T, is_compared_T),
    }
    return Gauged(sums, most, {"ratio": torch.where(is_compared_T, ratio_T, torch.nan)})


def gauged_over_ranks(found: Sequence[Gauged], distributed: Distributed) -> StepOutcome:
    """What the packs of all ranks come to; collective. A rank may have none."""
    sums = [sum(float(one.sums[name]) for one in found) for name in _SUMS]
    largest = [max((float(one.largest[name]) for one in found), default=-math.inf) for name in _LARGEST]
    return StepOutcome(
        {},
        dict(zip(_SUMS, distributed.sum(*sums), strict=True)),
        {name: distributed.max(value) for name, value in zip(_LARGEST, largest, strict=True)},
        {"ratio": torch.cat([torch.zeros(0), *(one.samples["ratio"].cpu() for one in found)])},
    )


_SUMS = ("compared", "compared_holds", "difference", "hold_difference", "ratio", "cut")
_LARGEST = ("difference", "hold_difference", "ratio", "minus_ratio")


def quantiles(value_T: Tensor, shares: Sequence[float], distributed: Distributed) -> list[float]:
    """The least value of all ranks that so large a share of them does not exceed, for each share; collective.

    NaN are left out; all NaN where there are no others. Exact up to _MOST values a rank; of more, so many at even
    distances in their order stand for all.
    """
    own_T = value_T.double().cpu()
    own_T = own_T[~own_T.isnan()].sort().values
    num_kept = min(len(own_T), _MOST)
    place_K = (torch.arange(num_kept) * 2 + 1) * len(own_T) // (2 * max(num_kept, 1))
    weight_K = torch.full((num_kept,), len(own_T) / max(num_kept, 1), dtype=torch.float64)
    value_N, weight_N = torch.cat(distributed.gather([torch.stack([own_T[place_K], weight_K])]), dim=1)
    value_N, order_N = value_N.sort()
    reached_N = weight_N[order_N].cumsum(0)
    if len(value_N) == 0:
        return [math.nan] * len(shares)
    wanted_S = torch.tensor(shares, dtype=torch.float64) * reached_N[-1]
    place_S = torch.searchsorted(reached_N, wanted_S * (1 - 1e-12)).clamp(max=len(value_N) - 1)
    return value_N[place_S].tolist()


_MOST = 4096
