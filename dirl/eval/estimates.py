"""Right and wrong samples of each problem -> avg@k, pass@k, maj@k, standard errors, and whether two runs differ.

Shapes: one inner list a problem, one entry a sample.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Correct = Sequence[Sequence[bool]]


def average(correct: Correct) -> float:
    """avg@k: share of right samples, every problem weighing the same."""
    return math.fsum(sum(samples) / len(samples) for samples in correct) / len(correct)


def pass_at(correct: Correct, k: int) -> float:
    """Unbiased probability that at least one of k samples, drawn without replacement, is right.

    Source: Chen et al. (arXiv 2107.03374), Eq. 1.
    """

    def one(samples: Sequence[bool]) -> float:
        return 1.0 - math.comb(len(samples) - sum(samples), k) / math.comb(len(samples), k)

    return math.fsum(one(samples) for samples in correct) / len(correct)


def majority(correct: Correct, answers: Sequence[Sequence[str | None]]) -> float:
    """maj@k: share of problems whose most frequent answer is right; samples without one do not vote, ties go first."""
    right = 0
    for samples, given in zip(correct, answers, strict=True):
        votes = Counter(answer for answer in given if answer is not None)
        if votes:
            winner = votes.most_common(1)[0][0]
            right += samples[list(given).index(winner)]
    return right / len(correct)


def standard_error_over_problems(correct: Correct) -> float:
    """How much avg@k would vary with other problems of the same kind; 0 for a single problem."""
    means = [sum(samples) / len(samples) for samples in correct]
    if len(means) < 2:
        return 0.0
    centre = math.fsum(means) / len(means)
    variance = math.fsum((mean - centre) ** 2 for mean in means) / (len(means) - 1)
    return math.sqrt(variance / len(means))


def standard_error_over_sampling(correct: Correct) -> float:
    """How much avg@k would vary with other random numbers on these problems; 0 for single samples."""
    total = 0.0
    for samples in correct:
        k, p = len(samples), sum(samples) / len(samples)
        if k > 1:
            total += p * (1 - p) / (k - 1)
    return math.sqrt(total) / len(correct)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


@dataclass(frozen=True)
class Difference:
    """How far run b is above run a on the same problems."""

    mean: float
    low: float  # 2.5th and 97.5th percentile of the bootstrap
    high: float
    p_value: float  # two-sided, of no difference

    @property
    def is_significant(self) -> bool:
        """Whether the 95 % interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, num_resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Mean of b - a over problems, with a 95 % interval from drawing problems with replacement.

    Pairing takes the difficulty of the problems out of the comparison; it is the larger part of either standard error.

    Args:
        a, b: one number per problem (its share of right samples), the same problems in the same order.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; p-value by inverting the interval.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a paired comparison needs the same problems on both sides, got {len(a)} and {len(b)}")
    differences = torch.tensor(b, dtype=torch.float64) - torch.tensor(a, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(a), (len(a),), generator=generator) for _ in range(num_resamples))
    means = sorted(float(differences[index].mean()) for index in drawn)
    tail = min(sum(mean <= 0 for mean in means), sum(mean >= 0 for mean in means))
    # One more on both sides, so that no finite number of resamples claims certainty.
    p_value = min(1.0, 2 * (tail + 1) / (num_resamples + 1))
    return Difference(float(differences.mean()), percentile(means, 0.025), percentile(means, 0.975), p_value)
