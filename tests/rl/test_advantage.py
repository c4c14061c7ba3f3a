"""Advantages against the sums they are."""

from __future__ import annotations

import statistics

import pytest
import torch

from dirl.rl.advantage import ScaleRewards, group_advantages, has_spread

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


def test_spread_is_judged_exactly() -> None:
    equal = torch.full((8,), 0.3)
    assert not has_spread(equal)
    equal[3] += 1e-6
    assert has_spread(equal)
