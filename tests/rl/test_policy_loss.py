"""The clipped surrogate against loops over its formula, and its KL estimators against the KL."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from dirl.rl.policy_loss import (
    ImportanceSampling,
    KLEstimator,
    LossType,
    PolicyLossConfig,
    completion_coefficients,
    importance_weights,
    policy_loss,
)

LENGTHS = [3, 1, 6]
MAX_LENGTH = 8


def expected_objective(ratios: list[list[float]], advantages: list[float], loss_type: LossType) -> float:
    """Sums over completions and tokens, as the papers write them; epsilon 0.2, epsilon_high 0.28."""
    terms = [
        [min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage) for ratio in row]
        for row, advantage in zip(ratios, advantages, strict=True)
    ]
    num_tokens = sum(len(row) for row in terms)
    if loss_type == "grpo":
        return sum(sum(row) / len(row) for row in terms) / len(terms)
    return sum(map(sum, terms)) / (len(terms) * MAX_LENGTH if loss_type == "dr_grpo" else num_tokens)


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_loss_types_are_their_sums(loss_type: LossType) -> None:
    logprobs = [torch.randn(length) * 0.5 - 1 for length in LENGTHS]
    behaviors = [torch.randn(length) * 0.5 - 1 for length in LENGTHS]
    advantages = [1.5, -0.7, -0.3]
    ratios = [[math.exp(a - b) for a, b in zip(x, y, strict=True)] for x, y in zip(logprobs, behaviors, strict=True)]
    coefficient_N = completion_coefficients(
        torch.tensor(LENGTHS),
        loss_type,
        all_tokens=float(sum(LENGTHS)),
        all_completions=float(len(LENGTHS)),
        max_completion_length=MAX_LENGTH,
    )
    owner_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    config = PolicyLossConfig(epsilon=0.2, epsilon_high=0.28, loss_type=loss_type)
    result = policy_loss(
        torch.cat(logprobs), torch.cat(behaviors), torch.tensor(advantages)[owner_T], coefficient_N[owner_T], config
    )
    assert float(result.loss) == pytest.approx(-expected_objective(ratios, advantages, loss_type), rel=1e-5)
    flat = [(r, a) for row, a in zip(ratios, advantages, strict=True) for r in row]
    assert int(result.clipped_low) == sum(r < 0.8 and a < 0 for r, a in flat)
    assert int(result.clipped_high) == sum(r > 1.28 and a > 0 for r, a in flat)


@pytest.mark.parametrize(
    ("ratio", "advantage", "has_gradient"),
    [
        (1.27, 1.0, True),
        (1.29, 1.0, False),
        (1.29, -1.0, True),
        (0.81, -1.0, True),
        (0.79, -1.0, False),
        (0.79, 1.0, True),
    ],
)
def test_gradient_stops_where_the_clip_holds(ratio: float, advantage: float, has_gradient: bool) -> None:
    logprob_T = torch.tensor([math.log(ratio)], requires_grad=True)
    one_T = torch.ones(1)
    config = PolicyLossConfig(epsilon=0.2, epsilon_high=0.28)
    policy_loss(logprob_T, torch.zeros(1), one_T * advantage, one_T, config).loss.backward()
    assert logprob_T.grad is not None
    assert float(logprob_T.grad) == pytest.approx(-ratio * advantage if has_gradient else 0.0, rel=1e-5)


def test_on_policy_gradient_is_reinforce() -> None:
    logprob_T = torch.randn(5, requires_grad=True)
    advantage_T, coefficient_T = torch.randn(5), torch.rand(5)
    result = policy_loss(logprob_T, logprob_T.detach(), advantage_T, coefficient_T, PolicyLossConfig())
    result.loss.backward()
    torch.testing.assert_close(logprob_T.grad, -coefficient_T * advantage_T)
    assert int(result.clipped_low + result.clipped_high) == 0


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
def test_kl_estimators(estimator: KLEstimator) -> None:
    """Exact expectations over a small vocabulary: k1 and k3 give the KL, k2 its gradient."""
    logits_V, ref_logits_V = torch.randn(7, requires_grad=True), torch.randn(7)
    policy_V, reference_V = logits_V.log_softmax(0), ref_logits_V.log_softmax(0)
    probability_V = policy_V.detach().exp()
    true_kl = (policy_V.exp() * (policy_V - reference_V)).sum()
    (true_gradient,) = torch.autograd.grad(true_kl, logits_V, retain_graph=True)
    config = PolicyLossConfig(beta=0.5, kl_estimator=estimator)
    # One action of each token, weighted by its probability: the sum is the expectation. Zero advantage: only the KL.
    result = policy_loss(policy_V, policy_V.detach(), torch.zeros(7), probability_V, config, reference_V)
    expected_kl = float(result.loss.detach()) / 0.5
    if estimator == "k2":
        assert expected_kl == pytest.approx(
            float((probability_V * (policy_V - reference_V).detach().square()).sum()) / 2, rel=1e-5
        )
        result.loss.backward()
        torch.testing.assert_close(logits_V.grad, 0.5 * true_gradient, rtol=1e-4, atol=1e-6)
    else:
        assert expected_kl == pytest.approx(float(true_kl.detach()), rel=1e-4)


def test_k3_is_never_negative_and_kl_to_itself_is_zero() -> None:
    logprob_T, one_T = torch.randn(1000), torch.ones(1000)
    for estimator in get_args(KLEstimator):
        config = PolicyLossConfig(beta=1.0, kl_estimator=estimator)
        assert float(policy_loss(logprob_T, logprob_T, one_T, one_T, config, logprob_T).kl) == 0
    each = [
        float(policy_loss(one_T[:1], one_T[:1], one_T[:1], one_T[:1], PolicyLossConfig(beta=1.0), ref[None]).kl)
        for ref in torch.randn(50)
    ]
    assert min(each) >= 0 < max(each)


@pytest.mark.parametrize(("epsilon", "beta"), [(-0.1, 0.0), (1.0, 0.0), (0.2, -1.0)])
def test_impossible_settings_are_errors(epsilon: float, beta: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        PolicyLossConfig(epsilon=epsilon, beta=beta)


TRAINER = [[-1.0, -2.0, -0.5], [-1.0], [-3.0, -0.1]]
ENGINE = [[-1.5, -1.0, math.nan], [-2.2], [-0.5, -4.1]]


def expected_weights(correction: ImportanceSampling, clip_max: float) -> list[float]:
    """One completion after another, by the words of TRL's modes; an action without an engine's logprob counts as 1."""
    weights: list[float] = []
    for trainer, engine in zip(TRAINER, ENGINE, strict=True):
        differences = [0.0 if math.isnan(e) else t - e for t, e in zip(trainer, engine, strict=True)]
        if correction.startswith("sequence"):
            differences = [sum(differences)] * len(differences)
        for ratio in map(math.exp, differences):
            if correction.endswith("truncate"):
                weights.append(min(ratio, clip_max))
            else:
                weights.append(0.0 if correction.endswith("mask") and ratio > clip_max else ratio)
    return weights


@pytest.mark.parametrize("clip_max", [0.7, 3.0])
@pytest.mark.parametrize("correction", get_args(ImportanceSampling))
def test_importance_weights_are_cut_ratios(correction: ImportanceSampling, clip_max: float) -> None:
    trainer_T, engine_T = (torch.tensor([x for row in rows for x in row]) for rows in (TRAINER, ENGINE))
    trainer_T.requires_grad_()
    found = importance_weights(trainer_T, engine_T, torch.tensor([0, 0, 0, 1, 2, 2]), correction, clip_max)
    assert found.tolist() == pytest.approx(expected_weights(correction, clip_max), rel=1e-5)
    assert not found.requires_grad


def test_importance_multiplies_the_surrogate_and_not_the_kl() -> None:
    logprob_T, ref_T, advantage_T, weight_T, one_T = (*torch.randn(4, 6), torch.ones(6))
    config = PolicyLossConfig(beta=0.3, kl_estimator="k1")
    loss = policy_loss(logprob_T, logprob_T, advantage_T, one_T, config, ref_T, weight_T).loss
    expected = -(weight_T * advantage_T).sum() + 0.3 * (logprob_T - ref_T).sum()
    torch.testing.assert_close(loss, expected)


def test_a_clip_at_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="importance_sampling_clip_max must be above 0, got 0"):
        PolicyLossConfig(importance_sampling_clip_max=0.0)
