"""Formulas against enumeration: every subset, every outcome, every resample."""

from __future__ import annotations

import random
from itertools import combinations, product

import numpy as np
import pytest

from dirl.eval import estimates

RNG = random.Random(0)
SAMPLES = [[RNG.random() < p for _ in range(6)] for p in (0.0, 0.1, 0.4, 0.5, 0.9, 1.0)]


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k: int) -> None:
    shares = [np.mean([any(subset) for subset in combinations(samples, k)]) for samples in SAMPLES]
    assert estimates.pass_at(SAMPLES, k) == pytest.approx(np.mean(shares))


def test_average_weighs_problems_alike() -> None:
    assert estimates.average([[True], [True, False, False, False]]) == pytest.approx((1 + 0.25) / 2)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], "2"),
        (["1", "2", "2", "1"], "1"),  # a tie goes to the one seen first
        (["2", "1", "2", "1"], "2"),
        ([None, None, None, "3"], "3"),  # silence is no vote
        ([None, None], None),
    ],
)
def test_majority(answers: list[str | None], winner: str | None) -> None:
    for right in ("1", "2", "3"):
        correct = [answer == right for answer in answers]
        assert estimates.majority([correct, [True]], [answers, ["7"]]) == ((winner == right) + 1) / 2


def test_standard_error_over_problems() -> None:
    means = np.mean(SAMPLES, axis=1)
    expected = np.std(means, ddof=1) / np.sqrt(len(means))
    assert estimates.standard_error_over_problems(SAMPLES) == pytest.approx(expected)
    assert estimates.standard_error_over_problems([[True, False]]) == 0.0


def test_standard_error_over_sampling_is_unbiased() -> None:
    """Over all outcomes of two problems with known p, its expected square is the variance of avg@k."""
    k, chances = 3, (0.3, 0.8)
    expected_square = np.float64(0.0)
    for outcome in product(product((True, False), repeat=k), repeat=2):
        weight = np.prod([p if x else 1 - p for p, samples in zip(chances, outcome, strict=True) for x in samples])
        expected_square += weight * estimates.standard_error_over_sampling(outcome) ** 2
    variance = sum(p * (1 - p) / k for p in chances) / 2**2
    assert expected_square == pytest.approx(variance)
    assert estimates.standard_error_over_sampling([[True], [False]]) == 0.0


@pytest.mark.parametrize("share", [0.01, 0.5, 0.51, 0.95, 1.0])
@pytest.mark.parametrize("num", [1, 2, 7, 20])
def test_percentile_is_the_nearest_rank(share: float, num: int) -> None:
    values = [RNG.randrange(100) for _ in range(num)]
    expected = next(v for v in sorted(values) if sum(x <= v for x in values) >= share * num)
    assert estimates.percentile(values, share) == expected


def test_bootstrap_against_every_resample() -> None:
    a, b = [0.0, 0.5, 0.25, 1.0], [0.5, 0.25, 1.0, 1.0]
    differences = np.subtract(b, a)
    means = np.array([differences[list(index)].mean() for index in product(range(4), repeat=4)])
    found = estimates.paired_bootstrap(a, b)
    assert found.mean == pytest.approx(0.25)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.07)
    assert found.p_value == pytest.approx(2 * np.mean(means <= 0), abs=0.02)
    assert not found.is_significant
    assert found == estimates.paired_bootstrap(a, b)


def test_bootstrap_turns_with_its_arguments() -> None:
    a, b = ([RNG.random() for _ in range(30)] for _ in range(2))
    forward, backward = estimates.paired_bootstrap(a, b), estimates.paired_bootstrap(b, a)
    assert forward.mean == pytest.approx(-backward.mean)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low), abs=0.01)


def test_pairing_finds_a_small_gain_among_problems_of_all_difficulties() -> None:
    a = [RNG.random() * 0.9 for _ in range(200)]
    b = [x + 0.02 + 0.01 * RNG.random() for x in a]
    found = estimates.paired_bootstrap(a, b)
    unpaired_error = np.sqrt(np.var(a) / 200 + np.var(b) / 200)
    assert found.mean < unpaired_error  # invisible without pairing
    assert found.is_significant
    assert 0.02 < found.low < found.high < 0.03
    assert found.p_value < 0.001


def test_equal_runs_do_not_differ() -> None:
    found = estimates.paired_bootstrap([0.5, 1.0], [0.5, 1.0])
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert not found.is_significant


@pytest.mark.parametrize(("a", "b"), [([], []), ([0.5], [0.5, 1.0])])
def test_bootstrap_needs_pairs(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=f"the same problems on both sides, got {len(a)} and {len(b)}"):
        estimates.paired_bootstrap(a, b)
