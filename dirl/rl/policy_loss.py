"""Log-probabilities and the table of actions -> the clipped surrogate with a KL penalty, and what its metrics need.

    J = sum over g of c_g min(rho_g A_g, clip(rho_g, 1 - epsilon, 1 + epsilon_high) A_g) - beta sum of c KL,  loss = -J

with rho_g = exp of the summed (logprob - behavior logprob) of the actions of g; `importance_sampling_level` says what a
g is. c is the normaliser of `loss_type`, which only the caller, who sees the global batch, can know.

An engine never computes exactly what the trainer computes (other kernels, other precision), so its samples come from a
slightly different policy. `importance_weights` corrects for that: min(rho A, ...) is then also multiplied with the
probability ratio of the trainer's policy, as it sampled, and the engine's, cut at `importance_sampling_clip_max`.

Nothing here makes the host wait for the device.

Shapes: T actions. Source: DiRL (arXiv 2512.22234), Eq. 6-8; DAPO (arXiv 2503.14476); GSPO (arXiv 2507.18071) for the
level `sequence`; the correction: TRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dirl.diffusion.packing import Actions
from dirl.model.logprobs import ActionScores
from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ImportanceSampling, KLEstimator, Level, ObjectiveConfig
from dirl.training.optimizer import Loss


def policy_loss(
    scores: ActionScores, batch: PolicyBatch, objective: ObjectiveConfig, *, fresh_since: int | None = None
) -> Loss:
    """The surrogate of one micro-batch. Where the behaviour is NaN it is the policy's own, and the ratio 1.

    Args:
        fresh_since: before the first optimizer step of a batch of rollouts, the number of steps that the weights have
            taken: what the policy gives actions of these weights is then compared with what the engine gave them.
            None: later, when it tells nothing.
    """
    logprob_T, actions = scores.logprob_T, batch.packed.actions
    own_T = logprob_T.detach()
    behavior_T = torch.where(batch.behavior_logprob_T.isnan(), own_T, batch.behavior_logprob_T)
    ratio_T, share_T = level_ratios(actions, logprob_T - behavior_T, objective.importance_sampling_level)
    advantage_T = batch.advantage_T
    clipped_T = ratio_T.clamp(1 - objective.epsilon, 1 + objective.epsilon_high)
    objective_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    if share_T is not None:
        objective_T = objective_T * share_T
    if objective.importance_sampling_correction != "none":
        objective_T = objective_T * importance_weights(
            behavior_T,
            batch.engine_logprob_T,
            actions.branch_T,
            objective.importance_sampling_correction,
            objective.importance_sampling_clip_max,
        )
    kl_T = torch.zeros_like(logprob_T)
    if objective.beta > 0:
        ref_T = torch.where(batch.ref_logprob_T.isnan(), own_T, batch.ref_logprob_T)
        kl_T = _KL_ESTIMATORS[objective.kl_estimator](logprob_T, ref_T)
        objective_T = objective_T - objective.beta * kl_T
    sums = {
        "actions": torch.ones_like(own_T).sum(),
        "reveals": actions.is_reveal_T.sum(),
        "entropy": (scores.entropy_T * actions.is_reveal_T).sum(),
        "clipped_low": ((ratio_T < 1 - objective.epsilon) & (advantage_T < 0)).sum(),
        "clipped_high": ((ratio_T > 1 + objective.epsilon_high) & (advantage_T > 0)).sum(),
        "kl": kl_T.sum(),
        "tokens": torch.full_like(own_T.sum(), len(batch.packed), dtype=torch.float64),
    }
    gauge_sums, gauge_largest = _gauge(batch, own_T, objective, fresh_since)
    return Loss(-(batch.coefficient_T * objective_T).sum(), len(batch.packed), sums | gauge_sums, gauge_largest)


def level_ratios(actions: Actions, difference_T: Tensor, level: Level) -> tuple[Tensor, Tensor | None]:
    """The ratio that each action is part of, and its share of that ratio's term; no share (None) is a whole one.

    Actions of one ratio share one term c s(rho, A), so each carries 1 / (how many they are) of it.

    Args:
        difference_T: logprob - behavior logprob of each action.
    """
    weighted_T = difference_T * torch.where(actions.is_reveal_T, actions.weight_T, 1.0)
    if level == "action":
        return weighted_T.exp(), None
    row_T = _rows_of_equal(*_LEVELS[level](actions))
    zeros_T = torch.zeros_like(weighted_T)
    sum_T = zeros_T.index_add(0, row_T, weighted_T)[row_T]
    count_T = zeros_T.index_add(0, row_T, torch.ones_like(zeros_T))[row_T]
    # So a term counts once, and on-policy every level has the gradient of the level `action`.
    return sum_T.exp(), 1.0 / count_T


# What actions of one ratio have in common; a completion's actions all lie in one micro-batch.
_LEVELS: dict[Level, Callable[[Actions], tuple[Tensor, ...]]] = {
    "token": lambda actions: (actions.branch_T, actions.completion_index_T),
    "step": lambda actions: (actions.branch_T, actions.view_T),
    "block": lambda actions: (actions.branch_T, actions.block_T),
    "sequence": lambda actions: (actions.branch_T,),
}


def _rows_of_equal(*columns: Tensor) -> Tensor:
    """The same number, below T, for rows that are equal in all columns; (T,) int64."""
    row_T = torch.zeros_like(columns[0])
    for column_T in columns:
        # Sorted by what was equal so far and then by this column; a number is where its first row stands.
        order_T = column_T.argsort(stable=True)
        order_T = order_T[row_T[order_T].argsort(stable=True)]
        same_T = (row_T[order_T][1:] == row_T[order_T][:-1]) & (column_T[order_T][1:] == column_T[order_T][:-1])
        number_T = torch.cat([torch.zeros_like(order_T[:1]), (~same_T).long().cumsum(0)])
        row_T = torch.zeros_like(row_T).scatter(0, order_T, number_T)
    return row_T


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
    Source: TRL's GRPO trainer (vllm_importance_sampling_mode).
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


def _gauge(
    batch: PolicyBatch, own_T: Tensor, objective: ObjectiveConfig, fresh_since: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far trainer and engine differ on the same actions under the same weights: sums, and largest values.

    The trainer's side of fresh actions is what the policy gives now; of those that had to wait, what was remembered.
    """
    if fresh_since is None:
        is_compared_T, then_T = torch.zeros_like(own_T, dtype=torch.bool), own_T
    else:
        is_fresh_T = batch.sampled_at_T >= fresh_since
        then_T = torch.where(is_fresh_T, own_T, batch.behavior_logprob_T)
        is_compared_T = ~batch.engine_logprob_T.isnan() & (is_fresh_T | ~batch.behavior_logprob_T.isnan())
    correction = objective.importance_sampling_correction
    difference_T = (then_T - batch.engine_logprob_T).abs()
    ratio_T = _raw_ratios(then_T, batch.engine_logprob_T, batch.packed.actions.branch_T, correction)
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


def _k1(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """Unbiased, high variance, can be negative."""
    return logprob_T - ref_logprob_T


def _k2(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """Biased, low variance; its gradient is that of the KL on-policy."""
    return (logprob_T - ref_logprob_T).square() / 2


def _k3(logprob_T: Tensor, ref_logprob_T: Tensor) -> Tensor:
    """Unbiased, never negative."""
    difference_T = ref_logprob_T - logprob_T
    return difference_T.exp() - difference_T - 1


# Source: Schulman, "Approximating KL divergence" (2020).
_KL_ESTIMATORS: dict[KLEstimator, Callable[[Tensor, Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
