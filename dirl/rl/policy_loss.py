"""Log-probabilities of actions -> DiPO's clipped surrogate with a KL penalty.

    J = sum over actions of c_i [ min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) - beta KL ],  loss = -J

with rho = exp(logprob - behavior logprob). The coefficient c_i of a completion carries the normaliser of `loss_type`,
which only the caller, who sees the global batch, can know.

An engine never computes exactly what the trainer computes (other kernels, other precision), so its samples come from a
slightly different policy. `importance_weights` corrects for that: min(rho A, ...) is then also multiplied with the
probability ratio of the trainer's policy, before the update, and the engine's, cut at `importance_sampling_clip_max`.

Shapes: T actions, N completions. Source: DiRL (arXiv 2512.22234), Eq. 6-8; DAPO (arXiv 2503.14476); correction: TRL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["dapo", "grpo", "dr_grpo", "bnpo"]
KLEstimator = Literal["k1", "k2", "k3"]
ImportanceSampling = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """The objective, under TRL's names."""

    epsilon: float = 0.2  # a ratio below 1 - epsilon is clipped
    epsilon_high: float = 0.2  # a ratio above 1 + epsilon_high is clipped (DAPO's clip-higher: 0.28)
    beta: float = 0.0  # weight of the KL to the reference; 0: the reference is never loaded
    kl_estimator: KLEstimator = "k3"
    loss_type: LossType = "dapo"
    importance_sampling_correction: ImportanceSampling = "none"  # for the mismatch of engine and trainer
    importance_sampling_clip_max: float = 3.0  # truncate: larger ratios become this; mask: they become 0

    def __post_init__(self) -> None:
        if self.importance_sampling_clip_max <= 0:
            raise ValueError(f"importance_sampling_clip_max must be above 0, got {self.importance_sampling_clip_max}")
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon must be in [0, 1), got {self.epsilon}")
        if self.epsilon_high < 0 or self.beta < 0:
            raise ValueError(f"epsilon_high and beta must be >= 0, got {self.epsilon_high} and {self.beta}")


@dataclass(frozen=True)
class PolicyLoss:
    """The loss with the sums its metrics are made of; every sum is over actions."""

    loss: Tensor  # scalar, with gradient
    clipped_low: Tensor  # actions with negative advantage held back at the lower clip
    clipped_high: Tensor  # actions with positive advantage held back at the upper clip
    kl: Tensor  # nats; 0 without a reference


def policy_loss(
    logprob_T: Tensor,
    behavior_logprob_T: Tensor,
    advantage_T: Tensor,
    coefficient_T: Tensor,
    config: PolicyLossConfig,
    ref_logprob_T: Tensor | None = None,
    importance_T: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate. On-policy, hand in `behavior_logprob_T = logprob_T.detach()`: ratios are then 1.

    Args:
        importance_T: of `importance_weights`; multiplies the surrogate, not the KL penalty. None: 1.
    """
    ratio_T = (logprob_T - behavior_logprob_T).exp()
    clipped_T = ratio_T.clamp(1 - config.epsilon, 1 + config.epsilon_high)
    objective_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
    if importance_T is not None:
        objective_T = objective_T * importance_T
    kl_T = torch.zeros_like(logprob_T)
    if ref_logprob_T is not None:
        kl_T = _KL_ESTIMATORS[config.kl_estimator](logprob_T, ref_logprob_T)
        objective_T = objective_T - config.beta * kl_T
    return PolicyLoss(
        loss=-(coefficient_T * objective_T).sum(),
        clipped_low=((ratio_T < 1 - config.epsilon) & (advantage_T < 0)).sum(),
        clipped_high=((ratio_T > 1 + config.epsilon_high) & (advantage_T > 0)).sum(),
        kl=kl_T.detach().sum(),
    )


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
        trainer_logprob_T: under the weights the engine sampled with, that is before the first update.
        engine_logprob_T: as the engine recorded them; NaN where it recorded none.
        completion_T: int64, the completion of each action, all of whose actions are here; from 0.
        correction: `none` is not cut.
    Source: TRL's GRPO trainer (vllm_importance_sampling_mode).
    """
    difference_T = (trainer_logprob_T.detach() - engine_logprob_T).nan_to_num(nan=0.0)
    if correction.startswith("sequence"):
        num_completions = int(completion_T.max()) + 1 if len(completion_T) else 0
        difference_T = difference_T.new_zeros(num_completions).index_add(0, completion_T, difference_T)[completion_T]
    ratio_T = difference_T.exp()
    if correction.endswith("truncate"):
        return ratio_T.clamp(max=clip_max)
    if correction.endswith("mask"):
        return ratio_T.masked_fill(ratio_T > clip_max, 0.0)
    return ratio_T


def completion_coefficients(
    num_tokens_N: Tensor, loss_type: LossType, *, all_tokens: float, all_completions: float, max_completion_length: int
) -> Tensor:
    """What each action of a completion is multiplied with; (N,) float32.

    Args:
        num_tokens_N: tokens of each completion that are scored.
        all_tokens, all_completions: of the global batch; for `bnpo`, all_tokens of this rank times the ranks.
    Source: dapo: DiRL Eq. 7-8; grpo: Eq. 6; dr_grpo: arXiv 2503.20783; bnpo: TRL.
    """
    if loss_type == "grpo":
        return 1.0 / (num_tokens_N.float() * all_completions)
    denominator = all_completions * max_completion_length if loss_type == "dr_grpo" else all_tokens
    return torch.full(num_tokens_N.shape, 1.0 / denominator)


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
