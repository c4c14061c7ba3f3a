"""The NELBO and its deciles against loops."""

from __future__ import annotations

import pytest
import torch

from dirl.sft.loss import decile_sums, nelbo_loss


def test_nelbo_is_the_weighted_sum_over_the_given_denominator() -> None:
    logprobs, weights = [-0.5, -2.0, -0.1], [1.0, 4.0, 10.0]
    expected = sum(-logprob * weight for logprob, weight in zip(logprobs, weights, strict=True)) / 7
    assert float(nelbo_loss(torch.tensor(logprobs), torch.tensor(weights), 7.0)) == pytest.approx(expected)


def test_deciles_are_sums_by_noise_level() -> None:
    logprob_T, level_T = -torch.rand(500), torch.rand(500)
    level_T[0] = 1.0  # belongs to the last tenth
    expected = [[0.0, 0.0] for _ in range(10)]
    for logprob, level in zip(logprob_T.tolist(), level_T.tolist(), strict=True):
        row = expected[min(int(level * 10), 9)]
        row[0] -= logprob
        row[1] += 1
    torch.testing.assert_close(decile_sums(logprob_T, level_T), torch.tensor(expected, dtype=torch.float64))
