"""One denoising step's samples -> which masked positions are revealed.

Every strategy is a function of the confidences (or entropies, or random numbers) of the sampled tokens and of the mask;
it returns True where a position is revealed, never outside the mask, and always at least one per row that has a mask.
A new strategy is one function and one line in `reveal_positions`.

Shapes: N sequences, B positions of the current block. Source: SDAR's and LMDeploy's decoding; entropy_bounded is the
EB-sampler (arXiv 2505.24857), with its error bound in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

UnmaskingStrategy = Literal[
    "low_confidence_dynamic", "low_confidence_static", "sequential", "entropy_bounded", "random"
]


@dataclass(frozen=True)
class UnmaskingRule:
    """A strategy with its numbers."""

    strategy: UnmaskingStrategy = "low_confidence_dynamic"
    confidence_threshold: float = 0.9
    denoising_steps: int = 0  # per block, for the strategies with a fixed count; 0: one position a step
    entropy_bound: float = 0.1  # nats
    sub_block_length: int = 0  # lanes of a block that are revealed before any right of them; 0: all of it
    holds_at_threshold: bool = False  # a confidence must exceed the threshold; else reaching it is enough

    def __post_init__(self) -> None:
        if self.strategy not in get_args(UnmaskingStrategy):
            raise ValueError(f"unmasking_strategy must be one of {get_args(UnmaskingStrategy)}, got {self.strategy!r}")

    @property
    def reads_confidence(self) -> bool:
        """Whether which positions are revealed depends on the tokens that were drawn."""
        return self.strategy in ("low_confidence_dynamic", "low_confidence_static")

    def undecided(self, masked_NB: Tensor) -> Tensor:
        """The masked positions that a step decides about: those of the leftmost sub-block with masks; (N, B)."""
        if not self.sub_block_length:
            return masked_NB
        lane_B = torch.arange(masked_NB.shape[-1], device=masked_NB.device) // self.sub_block_length
        first_N1 = masked_NB.int().argmax(dim=-1, keepdim=True) // self.sub_block_length
        return masked_NB & (lane_B == first_N1)

    def reveals(self, step_N: Tensor, block_length: int) -> Tensor:
        """Positions that the strategies with a fixed count reveal after so many steps of a block; (N,) int64.

        Spread evenly, the first steps revealing one more where steps do not divide the block.
        """
        num_steps = min(self.denoising_steps or block_length, block_length)
        return block_length // num_steps + (step_N < block_length % num_steps).long()


def reveal_positions(
    rule: UnmaskingRule,
    masked_NB: Tensor,
    confidence_NB: Tensor,
    entropy_NB: Tensor,
    uniform_NB: Tensor,
    *,
    step_N: Tensor,
    threshold_N: Tensor | None = None,
) -> Tensor:
    """True where a position is revealed in this step; (N, B).

    Args:
        masked_NB: True where a position is still masked.
        confidence_NB: probability of the sampled token; read at masked positions only.
        entropy_NB: entropy in nats of the distribution the token was sampled from.
        uniform_NB: random numbers in [0, 1), for `random`.
        step_N: int64, denoising steps that each block has taken.
        threshold_N: float32, each sequence's own in the place of the rule's, for `low_confidence_dynamic`.
    """
    masked_NB = rule.undecided(masked_NB)
    count_N1 = rule.reveals(step_N, masked_NB.shape[-1])[:, None]
    if rule.strategy == "low_confidence_dynamic":
        threshold = rule.confidence_threshold if threshold_N is None else threshold_N[:, None]
        reaches_NB = confidence_NB > threshold if rule.holds_at_threshold else confidence_NB >= threshold
        return _or_the_best(masked_NB & reaches_NB, masked_NB, confidence_NB)
    if rule.strategy == "low_confidence_static":
        return _highest(confidence_NB, masked_NB, count_N1)
    if rule.strategy == "sequential":
        leftness_B = -torch.arange(masked_NB.shape[-1], device=masked_NB.device, dtype=torch.float32)
        return _highest(leftness_B.expand(masked_NB.shape), masked_NB, count_N1)
    if rule.strategy == "random":
        return _highest(uniform_NB, masked_NB, count_N1)
    return _within_entropy_bound(masked_NB, entropy_NB, rule.entropy_bound)


def _or_the_best(revealed_NB: Tensor, masked_NB: Tensor, confidence_NB: Tensor) -> Tensor:
    """Where a row reveals nothing, its most confident masked position."""
    fallback_NB = _highest(confidence_NB, masked_NB, 1)
    return torch.where(revealed_NB.any(dim=-1, keepdim=True), revealed_NB, fallback_NB)


def _highest(score_NB: Tensor, masked_NB: Tensor, count_N1: Tensor | int) -> Tensor:
    """So many masked positions with the highest score, fewer where fewer are masked; ties go left."""
    order_NB = score_NB.masked_fill(~masked_NB, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    is_among_NB = (torch.arange(masked_NB.shape[-1], device=masked_NB.device) < count_N1).expand(masked_NB.shape)
    return torch.zeros_like(masked_NB).scatter(-1, order_NB, is_among_NB) & masked_NB


def _within_entropy_bound(masked_NB: Tensor, entropy_NB: Tensor, bound: float) -> Tensor:
    """The most positions, in order of entropy, whose joint-dependence error (sum minus maximum) stays within bound."""
    sorted_NB, order_NB = entropy_NB.masked_fill(~masked_NB, torch.inf).sort(dim=-1, stable=True)
    # In ascending order the maximum of the first k is the k-th itself; the first one's error is therefore zero.
    error_NB = sorted_NB.nan_to_num(posinf=0.0).cumsum(dim=-1) - sorted_NB
    within_NB = (error_NB <= bound) & sorted_NB.isfinite()
    return torch.zeros_like(masked_NB).scatter(-1, order_NB, within_NB)
