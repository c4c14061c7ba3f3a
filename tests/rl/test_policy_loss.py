"""The clipped surrogate against loops over its formula, at every level, and its KL estimators against the KL."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import groupby
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from dirl.rl.actions import completion_coefficients
from dirl.rl.gauge import importance_weights, quantiles
from dirl.rl.objective import ImportanceSampling, KLEstimator, Level, LossType, ObjectiveConfig
from dirl.training.distributed import Distributed
from tests.rl.tables import loss_of, table

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
    if loss_type == "luspo":
        return sum(map(sum, terms)) / len(terms)
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
    batch = table(
        10,
        behavior_logprob_T=torch.cat(behaviors),
        advantage_T=torch.tensor(advantages)[owner_T],
        coefficient_T=coefficient_N[owner_T],
    )
    objective = ObjectiveConfig(epsilon=0.2, epsilon_high=0.28, loss_type=loss_type)
    result = loss_of(torch.cat(logprobs), batch, objective)
    assert float(result.value) == pytest.approx(-expected_objective(ratios, advantages, loss_type), rel=1e-5)
    flat = [(r, a) for row, a in zip(ratios, advantages, strict=True) for r in row]
    assert int(result.sums["clipped_low"]) == sum(r < 0.8 and a < 0 for r, a in flat)
    assert int(result.sums["clipped_high"]) == sum(r > 1.28 and a > 0 for r, a in flat)


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
    batch = table(1, behavior_logprob_T=torch.zeros(1), advantage_T=torch.tensor([advantage]))
    loss_of(logprob_T, batch, ObjectiveConfig(epsilon=0.2, epsilon_high=0.28)).value.backward()
    assert logprob_T.grad is not None
    assert float(logprob_T.grad) == pytest.approx(-ratio * advantage if has_gradient else 0.0, rel=1e-5)


# Two completions: (completion, token, view, block) of each action; views of one block share its number.
ACTIONS = [
    *((0, 0, 1, 0), (0, 1, 1, 0), (0, 1, 2, 0), (0, 2, 3, 1), (0, 3, 3, 1)),
    *((1, 0, 4, 0), (1, 1, 5, 1), (1, 1, 6, 1)),
]
SHARED = {
    "action": lambda i: i,
    "token": lambda i: ACTIONS[i][:2],
    "step": lambda i: ACTIONS[i][2],
    "block": lambda i: (ACTIONS[i][0], ACTIONS[i][3]),
    "sequence": lambda i: ACTIONS[i][0],
}


def leveled(behavior_T: Tensor, advantage_T: Tensor, coefficient_T: Tensor):  # type: ignore[no-untyped-def]
    completion, token, view, block = (list(column) for column in zip(*ACTIONS, strict=True))
    return table(
        len(ACTIONS),
        completion=completion,
        token=token,
        view=view,
        block=block,
        behavior_logprob_T=behavior_T,
        advantage_T=advantage_T,
        coefficient_T=coefficient_T,
    )


@pytest.mark.parametrize("level", get_args(Level))
def test_a_ratio_is_taken_over_its_level(level: Level) -> None:
    """Loss and gradient against one clipped term for each set of actions that share a ratio."""
    logprob_T = (torch.randn(len(ACTIONS)) * 0.2).requires_grad_()
    behavior_T = torch.randn(len(ACTIONS)) * 0.2
    completion_T = torch.tensor([action[0] for action in ACTIONS])
    advantage_T, coefficient_T = torch.tensor([1.3, -0.6])[completion_T], torch.tensor([0.2, 0.7])[completion_T]
    expected = torch.zeros(())
    for _, members in groupby(sorted(range(len(ACTIONS)), key=SHARED[level]), key=SHARED[level]):
        rows = list(members)
        ratio = sum((logprob_T[i] - behavior_T[i] for i in rows), torch.zeros(())).exp()
        advantage = float(advantage_T[rows[0]])
        term = torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage)
        expected = expected - float(coefficient_T[rows[0]]) * term
    objective = ObjectiveConfig(epsilon=0.1, epsilon_high=0.1, importance_sampling_level=level)
    found = loss_of(logprob_T, leveled(behavior_T, advantage_T, coefficient_T), objective)
    torch.testing.assert_close(found.value, expected)
    (gradient,) = torch.autograd.grad(found.value, logprob_T, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logprob_T)[0])
    assert float(found.sums["clipped_low"] + found.sums["clipped_high"]) > 0


@pytest.mark.parametrize("level", get_args(Level))
def test_on_policy_every_level_has_the_gradient_of_reinforce(level: Level) -> None:
    """NaN as behaviour is the policy's own."""
    logprob_T = torch.randn(len(ACTIONS), requires_grad=True)
    completion_T = torch.tensor([action[0] for action in ACTIONS])
    advantage_T, coefficient_T = torch.randn(2)[completion_T], torch.rand(2)[completion_T]
    batch = leveled(torch.full((len(ACTIONS),), torch.nan), advantage_T, coefficient_T)
    result = loss_of(logprob_T, batch, ObjectiveConfig(importance_sampling_level=level))
    result.value.backward()
    torch.testing.assert_close(logprob_T.grad, -coefficient_T * advantage_T)
    assert int(result.sums["clipped_low"] + result.sums["clipped_high"]) == 0


@pytest.mark.parametrize("estimator", get_args(KLEstimator))
def test_kl_estimators(estimator: KLEstimator) -> None:
    """Exact expectations over a small vocabulary: k1 and k3 give the KL, k2 its gradient."""
    logits_V, ref_logits_V = torch.randn(7, requires_grad=True), torch.randn(7)
    policy_V, reference_V = logits_V.log_softmax(0), ref_logits_V.log_softmax(0)
    probability_V = policy_V.detach().exp()
    true_kl = (policy_V.exp() * (policy_V - reference_V)).sum()
    (true_gradient,) = torch.autograd.grad(true_kl, logits_V, retain_graph=True)
    # One action of each token, weighted by its probability: the sum is the expectation. Zero advantage: only the KL.
    batch = table(7, advantage_T=torch.zeros(7), coefficient_T=probability_V, ref_logprob_T=reference_V)
    result = loss_of(policy_V, batch, ObjectiveConfig(beta=0.5, kl_estimator=estimator))
    expected_kl = float(result.value.detach()) / 0.5
    if estimator == "k2":
        assert expected_kl == pytest.approx(
            float((probability_V * (policy_V - reference_V).detach().square()).sum()) / 2, rel=1e-5
        )
        result.value.backward()
        torch.testing.assert_close(logits_V.grad, 0.5 * true_gradient, rtol=1e-4, atol=1e-6)
    else:
        assert expected_kl == pytest.approx(float(true_kl.detach()), rel=1e-4)


def kl_of(logprob_T: Tensor, ref_logprob_T: Tensor, objective: ObjectiveConfig) -> float:
    return float(loss_of(logprob_T, table(len(logprob_T), ref_logprob_T=ref_logprob_T), objective).sums["kl"])


def test_k3_is_never_negative_and_kl_to_itself_is_zero() -> None:
    logprob_T = torch.randn(1000)
    for estimator in get_args(KLEstimator):
        assert kl_of(logprob_T, logprob_T, ObjectiveConfig(beta=1.0, kl_estimator=estimator)) == 0
    each = [kl_of(torch.ones(1), ref[None], ObjectiveConfig(beta=1.0)) for ref in torch.randn(50)]
    assert min(each) >= 0 < max(each)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
        ({"epsilon": 1.0}, "epsilon must be .*below 1"),
        ({"beta": -1.0}, "beta must be at least 0"),
        ({"importance_sampling_clip_max": 0.0}, "importance_sampling_clip_max must be above 0, got 0"),
        ({"loss_type": "gspo"}, "loss_type must be one of dapo, grpo, dr_grpo, bnpo, luspo, got 'gspo'"),
        ({"delta": 1.1}, "delta=1.1 is not above 1 \\+ epsilon_high = 1.2"),
        ({"views": "visions"}, "views must be one of replay.*got 'visions'"),
        ({"shrink": 2, "likelihood": "trajectory"}, "shrink=2 with likelihood=trajectory: merged steps"),
        (
            {"importance_sampling_level": "step", "importance_sampling_correction": "token_mask"},
            "importance_sampling_level=step with importance_sampling_correction=token_mask: .*single ones",
        ),
    ],
)
def test_impossible_objectives_are_errors(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ObjectiveConfig(**settings)  # type: ignore[arg-type]


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
    logprob_T, engine_T, ref_T, advantage_T = torch.randn(4, 6)
    batch = table(6, engine_logprob_T=engine_T, ref_logprob_T=ref_T, advantage_T=advantage_T)
    objective = ObjectiveConfig(beta=0.3, kl_estimator="k1", importance_sampling_correction="token_truncate")
    weight_T = (logprob_T - engine_T).exp().clamp(max=3.0)
    expected = -(weight_T * advantage_T).sum() + 0.3 * (logprob_T - ref_T).sum()
    torch.testing.assert_close(loss_of(logprob_T, batch, objective).value, expected)


def test_the_gauge_sees_ratios_before_they_are_cut() -> None:
    """Fresh actions are compared with what the policy gives now, older ones with what was remembered of them.

    Nothing is remembered of the last: its behaviour is what the engine recorded, or the newest weights give.
    """
    engine_T = torch.tensor([-1.0, -1.0, -1.0, math.nan, -1.0])
    batch = table(
        5,
        engine_logprob_T=engine_T,
        sampled_at_T=torch.tensor([5, 5, 3, 5, 3]),
        behavior_logprob_T=torch.tensor([math.nan, math.nan, -1.5, math.nan, -9.0]),
        is_remembered_T=torch.tensor([False, False, True, False, False]),
    )
    logprob_T = torch.tensor([-1.0, 1.0, 7.0, 0.0, 7.0])
    objective = ObjectiveConfig(importance_sampling_correction="token_truncate", importance_sampling_clip_max=2.0)
    result = loss_of(logprob_T, batch, objective, fresh_since=5)
    assert int(result.sums["compared"]) == 3
    assert float(result.sums["difference"]) == pytest.approx(0.0 + 2.0 + 0.5)
    assert float(result.largest["difference"]) == pytest.approx(2.0)
    assert float(result.largest["ratio"]) == pytest.approx(math.exp(2.0))
    assert -float(result.largest["minus_ratio"]) == pytest.approx(math.exp(-0.5))
    assert int(result.sums["cut"]) == 1
    torch.testing.assert_close(result.samples["ratio"][:3], torch.tensor([0.0, 2.0, -0.5]).exp())
    assert bool(result.samples["ratio"][3].isnan())
    assert int(loss_of(logprob_T, batch, objective).sums["compared"]) == 0, "later it tells nothing"
    # Without a correction what waited was taken as the engine recorded it, which says nothing about the engine.
    assert int(loss_of(logprob_T, batch, ObjectiveConfig(), fresh_since=5).sums["compared"]) == 2


def test_the_gauge_tells_holds_from_tokens() -> None:
    """Holds differ little where tokens differ much: one mean of both would hide it."""
    batch = table(4, engine_logprob_T=torch.tensor([-1.0, -1.0, -0.1, -0.1]))
    actions = replace(batch.packed.actions, is_reveal_T=torch.tensor([True, True, False, False]))
    batch = replace(batch, packed=replace(batch.packed, actions=actions))
    result = loss_of(torch.tensor([-2.0, -1.0, -0.1, -0.4]), batch, ObjectiveConfig(), fresh_since=0)
    sums = {name: float(result.sums[name]) for name in ("compared", "compared_holds", "difference", "hold_difference")}
    assert sums == pytest.approx({"compared": 2, "compared_holds": 2, "difference": 1.0, "hold_difference": 0.3})
    assert float(result.largest["hold_difference"]) == pytest.approx(0.3)
    assert float(result.sums["ratio"]) == pytest.approx(math.exp(-1.0) + 1 + 1 + math.exp(-0.3))


class Ranks(Distributed):
    """This rank, and others that have gathered something else."""

    def __init__(self, *others: Tensor) -> None:
        self.others = others

    def gather(self, items: list[Any]) -> list[Any]:
        found: list[Any] = []
        for other in self.others:
            quantiles(other, (), alone := Ranks())
            found += alone.gathered
        self.gathered = items
        return [*items, *found]


@pytest.mark.parametrize("sizes", [(1,), (7,), (100, 1, 299), (0, 4)])
def test_quantiles_are_those_of_a_sorted_list_of_all_ranks(sizes: tuple[int, ...]) -> None:
    ranks = [torch.cat([torch.randn(size), torch.full((3,), math.nan)]) for size in sizes]
    every = sorted(value for rank in ranks for value in rank.tolist() if not math.isnan(value))
    shares = (0.01, 0.25, 0.5, 0.99, 1.0)
    expected = [every[math.ceil(round(share * len(every), 9)) - 1] for share in shares]
    assert quantiles(ranks[0], shares, Ranks(*ranks[1:])) == pytest.approx(expected)


def test_quantiles_of_many_values_are_close_and_of_none_no_numbers() -> None:
    many = [torch.randn(300_000), torch.randn(9)]
    expected = torch.cat(many).sort().values
    found = quantiles(many[0], (0.01, 0.5, 0.99), Ranks(many[1]))
    places = torch.searchsorted(expected, torch.tensor(found)) / len(expected)
    torch.testing.assert_close(places, torch.tensor([0.01, 0.5, 0.99]), rtol=0, atol=1 / 4096)
    assert all(map(math.isnan, quantiles(torch.tensor([math.nan]), (0.5,), Ranks())))
