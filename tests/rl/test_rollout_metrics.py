"""The histogram of pass rates, and the line a terminal shows of a group."""

from __future__ import annotations

import pytest

from dirl.rl.rollout_metrics import GroupSummary, pass_rate_histogram, rollout_metrics


def group(rewards: list[float], accuracy: list[float | None] | None = None) -> GroupSummary:
    parts: dict[str, list[float | None]] = {} if accuracy is None else {"accuracy": accuracy}
    count = len(rewards)
    return GroupSummary(True, rewards, parts, [3 + i for i in range(count)], [2] * count, 0)


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
    ("summary", "rate"),
    [
        (group([0.5, -1.0, 2.0, 0.0]), 0.5),  # without accuracy the reward's sign judges
        (group([9.0, 9.0, 9.0, 9.0], [1.0, 0.0, 0.0, None]), 0.25),
    ],
)
def test_a_completion_passes_when_it_is_right(summary: GroupSummary, rate: float) -> None:
    assert summary.pass_rate == rate


def test_lengths() -> None:
    metrics = rollout_metrics([group([1.0, 0.0]), group([0.0, 0.0, 1.0])])
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (3, 5)
    assert metrics["completions/mean_length"] == pytest.approx((3 + 4 + 3 + 4 + 5) / 5)
