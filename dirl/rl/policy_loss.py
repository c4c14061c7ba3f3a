"""Log-probabilities and the table of actions -> the loss, and what its metrics need.

    D_g = Z_g sum over i in g of w_i (l_i - behaviour's l_i),   rho_g = exp D_g
    J   = sum over g of c_g s(rho_g, A_g)  -  beta sum c KL  +  entropy_coef sum c H  +  nll_coef mean l,   loss = -J

`importance_sampling_level` says what a g is, `surrogate` what s is. c is the normaliser of `loss_type`, which only the
caller, who sees the global batch, can know; Z is 1, or 1 / length and then undone in c, so that on-policy every level
has one gradient, c A w grad l.

Nothing here makes the host wait for the device.

Shapes: T actions. Source: DiRL (arXiv 2512.22234), Eq. 6-8; DAPO (arXiv 2503.14476); GSPO (arXiv 2507.18071) for the
level `sequence`; CISPO (arXiv 2506.13585); SPG (arXiv 2510.09541) for the sandwich.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dirl.model.logprobs import ActionScores
from dirl.rl.actions import PolicyBatch
from dirl.rl.gauge import gauge, importance_weights
from dirl.rl.objective import KLEstimator, Level, ObjectiveConfig, Surrogate
from dirl.rl.ratios import Elsewhere, behavior_of, counted_once, estimate_weights, kl_to, summed
from dirl.training.optimizer import Loss


def policy_loss(
    scores: ActionScores,
    batch: PolicyBatch,
    objective: ObjectiveConfig,
    *,
    fresh_since: int | None = None,
    elsewhere: Elsewhere | None = None,
) -> Loss:
    """The loss of one micro-batch. Where the behaviour is NaN it is the policy's own, and the ratio 1.

    Args:
        fresh_since: before the first optimizer step of a batch of rollouts, the number of steps that the weights have
            taken: what the policy gives actions of these weights is then compared with what the engine gave them.
            None: later, when it tells nothing.
        elsewhere: of completions that lie in several micro-batches; None: there are none, or nothing is theirs.
    """
    actions, own_T = batch.packed.actions, scores.logprob_T.detach()
    terms = _terms(scores.logprob_T, batch, objective, elsewhere)
    objective_T = SURROGATES[objective.surrogate](terms, objective)
    if objective.importance_sampling_correction != "none":
        objective_T = objective_T * importance_weights(
            behavior_of(batch, own_T),
            batch.engine_logprob_T,
            batch.completion_T,
            objective.importance_sampling_correction,
            objective.importance_sampling_clip_max,
        )
    kl_T = torch.zeros_like(own_T)
    if objective.beta > 0:
        kl_T = _kl(scores.logprob_T, batch, objective, elsewhere)
        objective_T = objective_T - objective.beta * kl_T
    entropy_T = scores.entropy_T * actions.is_reveal_T
    if objective.entropy_coef:
        objective_T = objective_T + objective.entropy_coef * entropy_T * actions.weight_T
    loss = -(batch.coefficient_T * objective_T).sum()
    nll_T = -terms.weighted_T * batch.nll_share_T
    if objective.nll_coef > 0:
        loss = loss + objective.nll_coef * nll_T.sum()
    is_clipping = objective.surrogate in ("clip", "cispo")
    ratio_T = terms.ratio_T.detach()
    sums = {
        "actions": torch.ones_like(own_T).sum(),
        "reveals": actions.is_reveal_T.sum(),
        "entropy": entropy_T.sum(),
        "clipped_low": (is_clipping & (ratio_T < 1 - objective.epsilon) & (batch.advantage_T < 0)).sum(),
        "clipped_high": (is_clipping & (ratio_T > 1 + objective.epsilon_high) & (batch.advantage_T > 0)).sum(),
        "kl": kl_T.sum(),
        "nll": nll_T.sum(),
        "tokens": torch.full_like(own_T.sum(), len(batch.packed), dtype=torch.float64),
    }
    gauged = gauge(batch, own_T, objective, fresh_since)
    return Loss(loss, len(batch.packed), sums | gauged.sums, gauged.largest, gauged.samples)


@dataclass(frozen=True)
class Terms:
    """What a surrogate is made of; (T,) float32 each."""

    batch: PolicyBatch
    logprob_T: Tensor  # with gradient
    weighted_T: Tensor  # the same times its weight: what it adds to the log-likelihood of its completion
    ratio_T: Tensor  # of the action's level, with gradient
    once_T: Callable[[Tensor], Tensor]  # a term of the level -> this action's part of it

    @property
    def advantage_T(self) -> Tensor:
        return self.batch.advantage_T


def _terms(logprob_T: Tensor, batch: PolicyBatch, objective: ObjectiveConfig, elsewhere: Elsewhere | None) -> Terms:
    weight_T, level = estimate_weights(batch.packed.actions), objective.importance_sampling_level
    difference_T = logprob_T - behavior_of(batch, logprob_T.detach())
    sum_T, share_T = summed(batch, difference_T * weight_T, level)
    if elsewhere is not None and level == "sequence":
        sum_T = sum_T + elsewhere.behavior_T
    if objective.ratio_normalizer == "length":
        sum_T = sum_T / batch.length_T
        share_T = batch.length_T if share_T is None else share_T * batch.length_T

    def once(term_T: Tensor) -> Tensor:
        return counted_once(batch, term_T if share_T is None else term_T * share_T, level)

    return Terms(batch, logprob_T, logprob_T * weight_T, sum_T.exp(), once)


def _clip(terms: Terms, objective: ObjectiveConfig) -> Tensor:
    """min(rho A, clip(rho) A); with delta, rho is cut there as well, which bounds it where A is negative."""
    ratio_T, advantage_T = terms.ratio_T, terms.advantage_T
    clipped_T = ratio_T.clamp(1 - objective.epsilon, 1 + objective.epsilon_high)
    if objective.delta > 0:
        ratio_T = ratio_T.clamp(max=objective.delta)
    return terms.once_T(torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T))


def _cispo(terms: Terms, objective: ObjectiveConfig) -> Tensor:
    """The log-likelihood, weighted by a ratio that is cut above and has no gradient: no action is ever left out."""
    return terms.ratio_T.detach().clamp(max=1 + objective.epsilon_high) * terms.advantage_T * terms.weighted_T


def _reinforce(terms: Terms, objective: ObjectiveConfig) -> Tensor:
    """The log-likelihood, without a ratio."""
    return terms.advantage_T * terms.weighted_T


def _sandwich(terms: Terms, objective: ObjectiveConfig) -> Tensor:
    """A lower bound of the log-likelihood for good completions, mixed with an upper one for bad ones.

    The upper bound of a token with weights w_i in its draws is log(sum of w_i p_i^beta) / beta; their mean over the
    tokens that any draw masked stands for all tokens of the completion.
    """
    batch, beta = terms.batch, objective.sandwich_beta
    power_T = batch.packed.actions.weight_T * (beta * terms.logprob_T.double()).exp()  # float32 ends at 58 nats
    sum_T, share_T = summed(batch, power_T, "token")
    assert share_T is not None
    upper_T = (sum_T.clamp(min=torch.finfo(sum_T.dtype).tiny).log() / beta * share_T).float()
    upper_T = upper_T * batch.length_T / batch.num_covered_T
    mixed_T = objective.sandwich_weight * upper_T + (1 - objective.sandwich_weight) * terms.weighted_T
    return terms.advantage_T * torch.where(terms.advantage_T > 0, terms.weighted_T, mixed_T)


# A further surrogate is one function and one line here: each action's part of s(rho, A).
SURROGATES: dict[Surrogate, Callable[[Terms, ObjectiveConfig], Tensor]] = {
    "clip": _clip,
    "cispo": _cispo,
    "reinforce": _reinforce,
    "sandwich": _sandwich,
}


def _kl(logprob_T: Tensor, batch: PolicyBatch, objective: ObjectiveConfig, elsewhere: Elsewhere | None) -> Tensor:
    """Each action's part of the KL: of one action, of one token in all its masks, or of a completion."""
    estimate, weight_T = _KL_ESTIMATORS[objective.kl_estimator], estimate_weights(batch.packed.actions)
    difference_T = logprob_T - kl_to(batch, logprob_T.detach(), objective)
    level: Level = "sequence" if objective.kl_level == "sequence" else "token"
    if objective.views == "replay" and level == "token":
        return estimate(difference_T) * weight_T
    sum_T, share_T = summed(batch, difference_T * weight_T, level)
    assert share_T is not None
    if elsewhere is not None and level == "sequence":
        sum_T = sum_T + elsewhere.kl_T
    return counted_once(batch, estimate(sum_T) * share_T, level)


def _k1(difference: Tensor) -> Tensor:
    """Unbiased, high variance, can be negative."""
    return difference


def _k2(difference: Tensor) -> Tensor:
    """Biased, low variance; its gradient is that of the KL on-policy."""
    return difference.square() / 2


def _k3(difference: Tensor) -> Tensor:
    """Unbiased, never negative."""
    return (-difference).exp() + difference - 1


# Of logprob - reference's logprob. Source: Schulman, "Approximating KL divergence" (2020).
_KL_ESTIMATORS: dict[KLEstimator, Callable[[Tensor], Tensor]] = {"k1": _k1, "k2": _k2, "k3": _k3}
