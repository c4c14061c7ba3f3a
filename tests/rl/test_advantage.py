"""Advantages against the sums they are."""

from __future__ import annotations

import statistics

import pytest
import torch

from dirl.data.problems import Problem
from dirl.rl.advantage import group_advantages
from dirl.rl.objective import ScaleRewards
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
