"""Advantages against the sums they are."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch

from dirl.data.problems import Problem
from dirl.rl.advantage import group_advantages
from dirl.rl.objective import AdvantageName, ScaleRewards
from dirl.rl.rollout_group import Prompt, RolloutGroup

GROUPS = [[1.0, 0.0, 0.0, 1.0], [0.5, 2.0, -1.0, 0.0]]


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_advantages_are_distances_from_the_group_mean(scale_rewards: ScaleRewards) -> None:
    batch_std = statistics.stdev([reward for group in GROUPS for reward in group])
    expected = []
    for group in GROUPS:
        scale = {"none": 1.0, "group": statistics.stdev(group) + 1e-4, "batch": batch_std + 1e-4}[scale_rewards]
        expected.append([(reward - statistics.fmean(group)) / scale for reward in group])
    advantages_PG = group_advantages(torch.tensor(GROUPS), scale_rewards, batch_std)
    torch.testing.assert_close(advantages_PG, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_half_precision_rewards_are_scaled_in_float32() -> None:
    assert group_advantages(torch.tensor(GROUPS, dtype=torch.bfloat16), "group").dtype == torch.float32


def test_spread_is_judged_on_the_rewards_exactly() -> None:
    def is_informative(rewards: list[float]) -> bool:
        prompt = Prompt(Problem("?", "", {}), [1])
        return RolloutGroup(prompt=prompt, completions=[], rewards=rewards, reward_parts={}).is_informative

    assert not is_informative([0.3] * 8)
    assert is_informative([0.3] * 7 + [0.3 + 1e-6])


@pytest.mark.parametrize(("baseline", "factor"), [("group", 2 / 3), ("leave_one_out", 1.0)])
def test_expected_gradient_of_a_baseline(baseline: AdvantageName, factor: float) -> None:
    """Every group of three draws from a small policy: without the others' mean, a part of the gradient is lost."""
    logits_V = torch.tensor([0.3, -0.5, 1.0], requires_grad=True)
    reward_V = torch.tensor([1.0, 0.2, -0.4])
    logprob_V = logits_V.log_softmax(0)
    (truth,) = torch.autograd.grad((logprob_V.exp() * reward_V).sum(), logits_V, retain_graph=True)
    total = torch.zeros(())
    for drawn in itertools.product(range(3), repeat=3):
        members = torch.tensor(drawn)
        advantage_G = group_advantages(reward_V[members][None], "none", baseline=baseline).squeeze(0)
        chance = logprob_V[members].sum().exp().detach()
        total = total + chance * (advantage_G * logprob_V[members]).mean()
    torch.testing.assert_close(torch.autograd.grad(total, logits_V)[0], factor * truth)


def test_softmax_weights_sum_to_zero_and_order_as_the_rewards() -> None:
    advantages_PG = group_advantages(torch.tensor(GROUPS), "none", baseline="softmax")
    torch.testing.assert_close(advantages_PG.sum(dim=1), torch.zeros(2))
    assert advantages_PG.argsort(dim=1, stable=True).equal(torch.tensor(GROUPS).argsort(dim=1, stable=True))
