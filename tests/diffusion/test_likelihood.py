"""Action log-probabilities against sums written out token by token. The proof by enumeration is in tests/parity."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule, action_logprobs
from dirl.diffusion.packing import Actions
from dirl.diffusion.unmasking import UnmaskingRule
from tests.documents import action_table
from tests.oracle import sorted_and_cut

VOCABULARY = 7
SUPPRESSED_V = torch.arange(VOCABULARY) == 5
# Five steps: (is reveal, token) of each action. The fourth reveals everything, the fifth holds most.
STEPS = [
    [(True, 0), (False, 1), (False, 2)],
    [(True, 3), (True, 1)],
    [(False, 0), (True, 4), (True, 6), (False, 3)],
    [(True, 2)],
    [(False, 0), (False, 0), (False, 0), (True, 1)],
]


def actions() -> Actions:
    flat = [(view, *action) for view, step in zip((1, 2, 5, 6, 9), STEPS, strict=True) for action in step]
    view_T, is_reveal_T, target_T = torch.tensor(flat, dtype=torch.int64).unbind(1)
    return action_table(target_T, is_reveal_T.bool(), view_T)


def scored(logits_TV: Tensor, unmasking: UnmaskingRule, distribution: TokenDistribution | None = None) -> Tensor:
    rule = ScoringRule(distribution or TokenDistribution(), unmasking, SUPPRESSED_V)
    return action_logprobs(logits_TV, actions(), rule)[0]


def by_hand(logits_TV: Tensor, unmasking: UnmaskingRule, distribution: TokenDistribution) -> list[float]:
    """Each action's probability from the definitions, in plain Python."""
    confidence = (logits_TV / distribution.temperature).masked_fill(SUPPRESSED_V, -torch.inf).softmax(-1)
    sampled = [sorted_and_cut(row_V, distribution.top_k, distribution.top_p).tolist() for row_V in confidence]
    found, first = [], 0
    for step in STEPS:
        revealed = [float(confidence[first + i, token]) for i, (is_reveal, token) in enumerate(step) if is_reveal]
        if unmasking.strategy == "low_confidence_static":
            bar = min(revealed)
        elif unmasking.strategy == "low_confidence_dynamic":
            bar = min(min(revealed), unmasking.confidence_threshold)
        else:
            bar = math.inf
        for i, (is_reveal, token) in enumerate(step, start=first):
            below = [sampled[i][v] for v in range(VOCABULARY) if float(confidence[i, v]) < bar]
            found.append(math.log(sampled[i][token]) if is_reveal else math.log(sum(below) or math.exp(-30)))
        first += len(step)
    return found


def targets_can_be_drawn(logits_TV: Tensor, distribution: TokenDistribution) -> bool:
    probs_TV = (logits_TV / distribution.temperature).masked_fill(SUPPRESSED_V, -torch.inf).softmax(-1)
    sampled = [sorted_and_cut(row_V, distribution.top_k, distribution.top_p) for row_V in probs_TV]
    flat = [action for step in STEPS for action in step]
    return all(float(q[token]) > 0 for q, (is_reveal, token) in zip(sampled, flat, strict=True) if is_reveal)


RULES = [
    UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.2),
    UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.9),
    UnmaskingRule("low_confidence_static"),
    UnmaskingRule("sequential"),
    UnmaskingRule("entropy_bounded"),
    UnmaskingRule("random"),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("distribution", [TokenDistribution(), TokenDistribution(0.7, 6, 0.97)], ids=str)
def test_actions_against_the_definitions(rule: UnmaskingRule, distribution: TokenDistribution) -> None:
    checked = 0
    for seed in range(40):
        logits_TV = torch.randn(14, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        if not targets_can_be_drawn(logits_TV, distribution):  # such a trajectory cannot happen
            continue
        found = scored(logits_TV, rule, distribution)
        assert found.tolist() == pytest.approx(by_hand(logits_TV, rule, distribution), abs=2e-6)
        checked += 1
    assert checked >= 5


@pytest.mark.parametrize("distribution", [TokenDistribution(top_k=2), TokenDistribution(top_p=0.5)], ids=str)
def test_a_token_drawn_at_the_edge_of_the_kept_set_stays_finite(distribution: TokenDistribution) -> None:
    # The engine kept tokens 0 and 2; here rounding, or a newer policy, ranks token 1 above 2.
    logits_TV = torch.tensor([[2.0, 1.0, 1.0 - 1e-6, 0.0]], requires_grad=True)
    rule = ScoringRule(distribution, UnmaskingRule(), torch.zeros(4, dtype=torch.bool))
    drawn = action_table(torch.tensor([2]), torch.tensor([True]), torch.tensor([1]))
    logprob_T, _ = action_logprobs(logits_TV, drawn, rule)
    kept = [0, 1, 2] if distribution.top_k else [0, 2]
    expected = 1.0 - math.log(sum(math.exp(logits_TV[0, v].item()) for v in kept))
    assert logprob_T.tolist() == pytest.approx([expected], abs=1e-5)
    (gradient_TV,) = torch.autograd.grad(logprob_T.sum(), logits_TV)
    assert gradient_TV[0, 2] > 0 and gradient_TV.isfinite().all()


def test_holds_are_certain_where_the_strategy_does_not_look_at_tokens() -> None:
    logits_TV = torch.randn(14, VOCABULARY, requires_grad=True)
    found = scored(logits_TV, UnmaskingRule("sequential"))
    held_T = ~actions().is_reveal_T
    assert float(found[held_T].detach().abs().max()) < 1e-6
    (gradient_TV,) = torch.autograd.grad(found[held_T].sum(), logits_TV)
    assert float(gradient_TV.abs().max()) < 1e-6


def test_an_impossible_hold_takes_the_floor_without_a_gradient() -> None:
    # Everything a held position could draw is above the bar: all of its mass sits on one token.
    logits_TV = torch.zeros(14, VOCABULARY)
    logits_TV[1, 1] = 200.0
    logits_TV.requires_grad_()
    found = scored(logits_TV, UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.5))
    assert found[1].item() == -30.0
    (gradient_TV,) = torch.autograd.grad(found.sum(), logits_TV)
    assert gradient_TV.isfinite().all()
    assert (gradient_TV[1] == 0).all()


def test_a_row_with_nothing_below_the_bar_has_a_finite_gradient() -> None:
    # Threshold 0.01 with seven even tokens: no token is below it.
    logits_TV = torch.zeros(14, VOCABULARY, requires_grad=True)
    found = scored(logits_TV, UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.01))
    assert found[1].item() == -30.0
    (gradient_TV,) = torch.autograd.grad(found.sum(), logits_TV)
    assert gradient_TV.isfinite().all()


def test_a_token_at_the_threshold_is_revealed_and_so_cannot_be_held() -> None:
    # Two tokens of probability one half each, and a threshold of one half.
    suppressed_V = torch.arange(VOCABULARY) > 1
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(confidence_threshold=0.5), suppressed_V)
    held = action_table(torch.tensor([0, 0]), torch.tensor([True, False]), torch.tensor([1, 1]))
    logprob_T, _ = action_logprobs(torch.zeros(2, VOCABULARY), held, rule)
    assert logprob_T.tolist() == pytest.approx([math.log(0.5), -30.0])


def test_gradient_of_a_hold_is_that_of_its_log_mass() -> None:
    logits_TV = torch.randn(14, VOCABULARY, requires_grad=True)
    (found_TV,) = torch.autograd.grad(scored(logits_TV, UnmaskingRule("low_confidence_static"))[1], logits_TV)
    probs_TV = logits_TV.masked_fill(SUPPRESSED_V, -torch.inf).softmax(-1)
    below_V = probs_TV[1].detach() < probs_TV[0, 0].detach()
    assert 0 < int(below_V.sum()) < VOCABULARY
    (expected_TV,) = torch.autograd.grad(probs_TV[1][below_V].sum().log(), logits_TV)
    torch.testing.assert_close(found_TV, expected_TV, atol=1e-6, rtol=1e-5)


def test_entropy_is_that_of_the_sampling_distribution_everywhere() -> None:
    distribution = TokenDistribution(0.7, 3, 1.0)
    drawn = (torch.randn(14, VOCABULARY) for _ in range(1000))
    logits_TV = next(logits for logits in drawn if targets_can_be_drawn(logits, distribution)).requires_grad_()
    rule = ScoringRule(distribution, RULES[0], SUPPRESSED_V, wants_entropy=True)
    _, entropy_T = action_logprobs(logits_TV, actions(), rule)
    probs_TV = (logits_TV.detach() / 0.7).masked_fill(SUPPRESSED_V, -torch.inf).softmax(-1)
    expected = [-sum(p * math.log(p) for p in sorted_and_cut(row, 3, 1.0).tolist() if p) for row in probs_TV]
    assert entropy_T.tolist() == pytest.approx(expected, abs=1e-5)
    assert not entropy_T.requires_grad
    assert not action_logprobs(logits_TV, actions(), replace(rule, wants_entropy=False))[1].any()


def test_slices_keep_whole_steps() -> None:
    logits_TV = torch.randn(14, VOCABULARY)
    rule = ScoringRule(TokenDistribution(), RULES[1], SUPPRESSED_V)
    whole, cut = actions(), [slice(0, 5), slice(5, 9), slice(9, 14)]
    parts = [action_logprobs(logits_TV[rows], whole.rows(rows), rule)[0] for rows in cut]
    torch.testing.assert_close(torch.cat(parts), action_logprobs(logits_TV, whole, rule)[0], atol=0, rtol=0)
    assert [len(whole.rows(rows)) for rows in cut] == [5, 4, 5]


@pytest.mark.parametrize(
    "rule",
    [UnmaskingRule("low_confidence_static"), UnmaskingRule(confidence_threshold=1.5)],  # above 1: fallback steps only
    ids=str,
)
def test_equally_certain_positions_are_held_right_of_the_revealed_one(rule: UnmaskingRule) -> None:
    """Ties go left: what stands right of the revealed position was certain to be held; what stands left, not to be."""
    logits_TV = torch.zeros(4, VOCABULARY)
    logits_TV[:, 2] = 30.0  # probability 1 to the last bit
    logits_TV.requires_grad_()
    scoring = ScoringRule(TokenDistribution(), rule, SUPPRESSED_V)
    place = 1
    step = action_table(torch.full((4,), 2), torch.arange(4) == place, torch.ones(4, dtype=torch.int64))
    logprob_T, _ = action_logprobs(logits_TV, step, scoring)
    assert logprob_T[place:].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    assert logprob_T[0] < -20
    (gradient_TV,) = torch.autograd.grad(logprob_T[place:].sum(), logits_TV)
    assert float(gradient_TV.abs().max()) < 1e-6


def test_completions_are_scored_with_the_threshold_they_were_decoded_with() -> None:
    """Steps of two completions with thresholds of their own, and of one without, among each other."""
    logits_TV = torch.randn(14, VOCABULARY, generator=torch.Generator().manual_seed(4))
    logits_TV[4] = logits_TV[3]  # a tie at the bar
    own = {1: 0.1, 2: 0.4, 5: None, 6: 0.1, 9: 0.4}  # by view
    plain = actions()
    threshold_T = torch.tensor([math.nan if (t := own[view]) is None else t for view in plain.view_T.tolist()])
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(confidence_threshold=0.25), SUPPRESSED_V)
    found_T, _ = action_logprobs(logits_TV, replace(plain, threshold_T=threshold_T), rule)
    differs = False
    for view, threshold in own.items():
        unmasking = UnmaskingRule(confidence_threshold=0.25 if threshold is None else threshold)
        mine_T = plain.view_T == view
        expected_T = scored(logits_TV, unmasking)
        assert torch.equal(found_T[mine_T], expected_T[mine_T])
        differs |= not torch.equal(expected_T, scored(logits_TV, rule.unmasking))
    assert differs
