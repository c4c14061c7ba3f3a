"""The strategies against Python loops over every row."""

from __future__ import annotations

import pytest
import torch

from dirl.diffusion.unmasking import UnmaskingRule, reveal_positions
from tests.oracle import reference_reveal

FIRST = torch.zeros(1, dtype=torch.int64)  # no step taken yet
RULES = [
    UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.0),
    UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.6),
    UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.95),
    *(
        UnmaskingRule(strategy, denoising_steps=steps)  # type: ignore[arg-type]
        for strategy in ("low_confidence_static", "sequential", "random")
        for steps in (0, 1, 2, 3, 100)
    ),
    UnmaskingRule("entropy_bounded", entropy_bound=0.0),
    UnmaskingRule("entropy_bounded", entropy_bound=0.5),  # off the grid of sums of the coarse numbers below
    UnmaskingRule("entropy_bounded", entropy_bound=100.0),
]


@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_strategy_against_loops(rule: UnmaskingRule, block_length: int) -> None:
    masked_NB = torch.rand(64, block_length) < 0.6
    masked_NB[0], masked_NB[1] = True, False
    # Coarse numbers, so that ties occur; unmasked positions carry numbers that must not matter.
    confidence_NB, entropy_NB, uniform_NB = (torch.randint(0, 6, (64, block_length)) / 5 for _ in range(3))
    step_N = torch.randint(0, min(rule.denoising_steps or block_length, block_length), (64,))
    found_NB = reveal_positions(rule, masked_NB, confidence_NB, entropy_NB, uniform_NB, step_N=step_N)
    rows = zip(*(x.tolist() for x in (masked_NB, confidence_NB, entropy_NB, uniform_NB, step_N)), strict=True)
    assert found_NB.tolist() == [reference_reveal(rule, *row) for row in rows]
    assert not (found_NB & ~masked_NB).any()
    assert torch.equal(found_NB.any(dim=1), masked_NB.any(dim=1))


def test_threshold_is_inclusive_and_ties_go_left() -> None:
    masked, nothing = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4)
    confidence = torch.tensor([[0.5, 0.25, 0.5, 0.25]])
    at_threshold = UnmaskingRule(confidence_threshold=0.5)
    above = UnmaskingRule(confidence_threshold=0.75)
    found = [
        reveal_positions(rule, masked, confidence, nothing, nothing, step_N=FIRST) for rule in (at_threshold, above)
    ]
    assert [x.tolist() for x in found] == [[[True, False, True, False]], [[True, False, False, False]]]


@pytest.mark.parametrize(
    ("block_length", "steps", "counts"),
    [
        (4, 0, [1, 1, 1, 1]),
        (4, 4, [1, 1, 1, 1]),
        (4, 3, [2, 1, 1]),
        (4, 2, [2, 2]),
        (4, 1, [4]),
        (4, 9, [1, 1, 1, 1]),
        (8, 3, [3, 3, 2]),
        (32, 5, [7, 7, 6, 6, 6]),
    ],
)
def test_a_block_is_spread_over_its_steps(block_length: int, steps: int, counts: list[int]) -> None:
    """Base and remainder, as SDAR's, LLaDA's and dllm's decoders split a block."""
    rule = UnmaskingRule("sequential", denoising_steps=steps)
    assert rule.reveals(torch.arange(len(counts)), block_length).tolist() == counts
    assert sum(counts) == block_length


def test_an_unknown_strategy_is_named() -> None:
    with pytest.raises(ValueError, match=r"unmasking_strategy must be one of .*got 'low_confidence'"):
        UnmaskingRule("low_confidence")  # type: ignore[arg-type]


def test_a_threshold_that_must_be_exceeded() -> None:
    confidence_NB, masked_NB = torch.tensor([[0.5, 0.6, 0.5, 0.9]]), torch.tensor([[True, True, True, False]])
    for holds, expected in ((False, [True, True, True, False]), (True, [False, True, False, False])):
        rule = UnmaskingRule(confidence_threshold=0.5, holds_at_threshold=holds)
        found_NB = reveal_positions(
            rule, masked_NB, confidence_NB, confidence_NB, confidence_NB, step_N=torch.zeros(1, dtype=torch.int64)
        )
        assert found_NB.tolist() == [expected]


def test_sequences_with_thresholds_of_their_own() -> None:
    """Each row as under a rule with its threshold: a number is compared in the same way whichever way it comes."""
    generator = torch.Generator().manual_seed(5)
    confidence_NB = torch.randint(0, 11, (200, 4), generator=generator) / 10
    masked_NB = torch.rand(200, 4, generator=generator) < 0.8
    threshold_N = torch.randint(1, 11, (200,), generator=generator) / 10
    nothing_NB, rule = torch.zeros(200, 4), UnmaskingRule(confidence_threshold=0.9)
    found_NB = reveal_positions(
        rule, masked_NB, confidence_NB, nothing_NB, nothing_NB, step_N=FIRST.expand(200), threshold_N=threshold_N
    )
    for row, threshold in enumerate(threshold_N.tolist()):
        alone = UnmaskingRule(confidence_threshold=round(threshold, 1))
        masked, confidence, nothing = (x[row : row + 1] for x in (masked_NB, confidence_NB, nothing_NB))
        expected = reveal_positions(alone, masked, confidence, nothing, nothing, step_N=FIRST)
        assert torch.equal(found_NB[row : row + 1], expected)
