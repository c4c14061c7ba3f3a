"""The histogram of pass rates, and the line a terminal shows of a group."""

from __future__ import annotations

import pytest

from dirl.data.problems import Problem
from dirl.rl.rollout_group import Prompt, RolloutGroup
from dirl.rl.rollout_metrics import GroupSummary, pass_rate_histogram, rollout_metrics


def summary(rewards: list[float], num_right: int, *, is_kept: bool = True) -> GroupSummary:
    count, dropped_for = len(rewards), None if is_kept else "equal_rewards"
    return GroupSummary(dropped_for, rewards, {}, [3 + i for i in range(count)], [2] * count, 0, num_right)


def group(rewards: list[float], accuracy: list[float | None] | None = None) -> RolloutGroup:
    parts: dict[str, list[float | None]] = {} if accuracy is None else {"accuracy": accuracy}
    prompt = Prompt(Problem("?", "1", {}), [1])
    return RolloutGroup(prompt=prompt, completions=[], rewards=rewards, reward_parts=parts)


def test_pass_rates_fall_into_their_bins() -> None:
    rates = [0.0, 0.125, 0.25, 0.5, 0.51, 0.75, 0.875, 31 / 32, 1.0, 1.0]
    histogram = pass_rate_histogram(rates)
    assert histogram == {
        "groups/pass_rate/0": 1,
        "groups/pass_rate/up_to_25": 2,
        "groups/pass_rate/up_to_50": 1,
        "groups/pass_rate/up_to_75": 2,
        "groups/pass_rate/below_100": 2,
        "groups/pass_rate/100": 2,
    }


@pytest.mark.parametrize(
    ("rollouts", "num_right"),
    [
        (group([0.5, -1.0, 2.0, 0.0]), 2),  # without accuracy the reward's sign judges
        (group([9.0, 9.0, 9.0, 9.0], [1.0, 0.0, 0.0, None]), 1),
    ],
)
def test_a_completion_passes_when_it_is_right(rollouts: RolloutGroup, num_right: int) -> None:
    assert rollouts.num_right == num_right


def test_dropped_groups_are_judged_by_their_answers_not_by_what_shaping_adds() -> None:
    """Four wrong answers in boxes earn the same reward for the box: they are all wrong."""
    groups = [
        summary([0.5] * 4, 0, is_kept=False),
        summary([-0.1] * 4, 4, is_kept=False),
        summary([1.0] * 4, 3, is_kept=False),
        summary([1.0, 0.0, 0.0, 0.0], 1),
    ]
    metrics = rollout_metrics(groups)
    names = ("kept", "dropped_all_wrong", "dropped_all_correct", "dropped_mixed")
    assert [metrics[f"groups/{name}"] for name in names] == [1, 1, 1, 1]


def test_lengths() -> None:
    metrics = rollout_metrics([summary([1.0, 0.0], 1), summary([0.0, 0.0, 1.0], 1)])
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (3, 5)
    assert metrics["completions/mean_length"] == pytest.approx((3 + 4 + 3 + 4 + 5) / 5)
