"""The two distributions of a step, the inverse-CDF draw and the random stream, against sorting and big integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dirl.diffusion.distribution import TokenDistribution, counter_uniform, entropy, sample, suppressed_tokens
from tests.oracle import sorted_and_cut

NOTHING_SUPPRESSED = torch.zeros(12, dtype=torch.bool)


def processed(logits_TV: Tensor, distribution: TokenDistribution, suppressed_V: Tensor) -> Tensor:
    return distribution.sampling_logprobs(distribution.tempered_logprobs(logits_TV, suppressed_V))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tempered_is_softmax_after_temperature_and_suppression(temperature: float) -> None:
    logits_TV = torch.randn(5, 12) * 3
    suppressed_V = torch.arange(12) % 5 == 0
    found_TV = TokenDistribution(temperature, top_k=2, top_p=0.5).tempered_logprobs(logits_TV, suppressed_V).exp()
    expected_TV = (logits_TV.double() / temperature).exp() * ~suppressed_V
    torch.testing.assert_close(found_TV.double(), expected_TV / expected_TV.sum(-1, keepdim=True), atol=1e-6, rtol=1e-5)
    assert (found_TV[:, suppressed_V] == 0).all()


def test_greedy_has_the_probabilities_of_temperature_one() -> None:
    logits_TV = torch.randn(5, 12)
    greedy, plain = (
        TokenDistribution(temperature).tempered_logprobs(logits_TV, NOTHING_SUPPRESSED) for temperature in (0.0, 1.0)
    )
    assert torch.equal(greedy, plain)


def test_everything_is_float32_whatever_the_model_computes_in() -> None:
    logits_TV = torch.randn(5, 12).bfloat16()
    found_TV = processed(logits_TV, TokenDistribution(0.7, 5, 0.9), NOTHING_SUPPRESSED)
    assert found_TV.dtype == torch.float32
    assert torch.equal(found_TV, processed(logits_TV.float(), TokenDistribution(0.7, 5, 0.9), NOTHING_SUPPRESSED))


@pytest.mark.parametrize("top_k", [0, 1, 3, 11, 12, 50])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999, 1.0])
def test_top_k_then_top_p_against_sorting(top_k: int, top_p: float) -> None:
    logits_TV = torch.randn(40, 12) * 2
    found_TV = processed(logits_TV, TokenDistribution(1.3, top_k, top_p), torch.arange(12) == 4).exp()
    plain_TV = (logits_TV / 1.3).masked_fill(torch.arange(12) == 4, -torch.inf).softmax(-1)
    expected_TV = torch.stack([sorted_and_cut(row_V, top_k, top_p) for row_V in plain_TV])
    assert torch.equal(found_TV > 0, expected_TV > 0)
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-6, rtol=1e-5)


def test_top_k_keeps_all_that_tie_with_the_kth() -> None:
    logits_1V = torch.tensor([[3.0, 1.0, 2.0, 2.0, 2.0, 0.0]])
    found_1V = processed(logits_1V, TokenDistribution(top_k=2), torch.zeros(6, dtype=torch.bool))
    # Which of three equals is "second" depends on the sort; all of them stay, so that decoder and trainer agree.
    assert found_1V.isfinite().tolist() == [[True, False, True, True, True, False]]
    torch.testing.assert_close(found_1V.exp().sum(), torch.tensor(1.0))


def test_gradient_treats_the_kept_set_as_a_constant() -> None:
    logits_TV = (torch.randn(6, 12) * 2).requires_grad_()
    found_TV = processed(logits_TV, TokenDistribution(0.8, 6, 0.9), NOTHING_SUPPRESSED)
    kept_TV = found_TV.detach().isfinite()
    (found,) = torch.autograd.grad(found_TV[kept_TV].sum(), logits_TV)
    exps_TV = (logits_TV / 0.8).exp()
    by_hand_TV = exps_TV.log() - (exps_TV * kept_TV).sum(-1, keepdim=True).log()
    (expected,) = torch.autograd.grad(by_hand_TV[kept_TV].sum(), logits_TV)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_suppressed_are_the_mask_and_what_the_tokenizer_lacks() -> None:
    found = suppressed_tokens(10, 7, 3, torch.device("cpu"))
    assert found.tolist() == [i == 3 or i >= 7 for i in range(10)]


def test_entropy_of_a_cut_distribution_is_finite_and_right() -> None:
    logprobs_TV = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    torch.testing.assert_close(entropy(logprobs_TV), torch.tensor([1.5 * torch.tensor(2.0).log(), 0.0]))


def test_sample_walks_the_cumulated_mass() -> None:
    probs_V = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.7501, 4), (1 - 2**-53, 4)):
        assert sample(probs_V.log()[None], torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_sample_of_the_stream_has_the_right_frequencies() -> None:
    probs_V = torch.tensor([0.02, 0.0, 0.28, 0.1, 0.35, 0.25])
    number_T = torch.arange(40_000)
    uniform_T = counter_uniform(number_T // 100, number_T % 100, torch.full_like(number_T, 2))
    counts_V = sample(probs_V.log().expand(len(number_T), -1), uniform_T).bincount(minlength=6)
    assert counts_V[1] == 0
    expected_V = probs_V * len(number_T)
    chi_square = float(((counts_V - expected_V).square() / expected_V)[probs_V > 0].sum())
    assert chi_square < 18.5  # 0.1 % of draws with 4 degrees of freedom lie above


def splitmix(state: int) -> int:
    """The finaliser of splitmix64 on Python's own integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return state ^ (state >> 31)


def test_stream_is_splitmix64() -> None:
    inputs = [(0, 0, 0), (1, 2, 3), (2**40 + 7, 4095, 8), (2**63 - 1, 1, 1), (-1, 5, 2)]
    found = counter_uniform(*torch.tensor(inputs).unbind(1)).tolist()
    for (seed, position, counter), uniform in zip(inputs, found, strict=True):
        assert uniform == (splitmix(splitmix(splitmix(seed % 2**64) ^ position) ^ counter) >> 11) / 2**53


@pytest.mark.parametrize("varying", ["seed", "position", "counter"])
def test_stream_is_uniform_and_uncorrelated_along_each_input(varying: str) -> None:
    count, bins = 32_768, 64
    inputs = {name: torch.full((count,), 3) for name in ("seed", "position", "counter")}
    inputs[varying] = torch.arange(count)
    uniform_T = counter_uniform(inputs["seed"], inputs["position"], inputs["counter"])
    assert uniform_T.dtype == torch.float64
    assert float(uniform_T.min()) >= 0 and float(uniform_T.max()) < 1
    counts = (uniform_T * bins).long().bincount(minlength=bins)
    chi_square = float((counts - count / bins).square().sum() / (count / bins))
    assert 30 < chi_square < 105  # 63 degrees of freedom; outside lie about 0.1 %
    for lag in (1, 2, 4, 64):
        correlation = torch.corrcoef(torch.stack([uniform_T[lag:], uniform_T[:-lag]]))[0, 1]
        assert abs(float(correlation)) < 4 / count**0.5


def test_stream_does_not_depend_on_what_shares_the_batch() -> None:
    inputs_3T = torch.randint(0, 1000, (3, 64))
    whole_T = counter_uniform(*inputs_3T)
    order_T = torch.randperm(64)[:17]
    assert torch.equal(counter_uniform(*inputs_3T[:, order_T]), whole_T[order_T])
    assert torch.equal(torch.cat([counter_uniform(*column[:, None]) for column in inputs_3T.T]), whole_T)
