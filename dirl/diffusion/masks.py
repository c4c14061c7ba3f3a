"""A finished completion -> random masks of its blocks, whose weighted scores estimate a bound on its log-likelihood.

With k of a block's m tokens masked, the ELBO is the sum over k = 1..m of 1/k times the mean, over the sets of k tokens,
of what the model gives them. A draw of k from 1..m and of a set of that size, weighted m/k, is unbiased for it; so is
a pair of complementary sets with k from 0..m and weights (m+1)/k and (m+1)/(m-k), halved. Earlier blocks are clean.

Shapes: K blocks touched by a completion, N draws a block, V views, B block length.
Source: LLaDA (arXiv 2502.09992), Eq. 14; ESPO (arXiv 2512.03759) for pairs; GDPO (arXiv 2510.08554) for quadrature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from dirl.diffusion.packing import Views
from dirl.diffusion.trajectory import Trajectory

MaskLevels = Literal["uniform", "interval", "gauss", "every"]
MaskWeights = Literal["elbo", "none", "mean"]


@dataclass(frozen=True)
class MaskPlan:
    """How blocks are masked, and how what is masked counts."""

    num_masks: int = 1
    complementary: bool = False
    levels: MaskLevels = "uniform"
    interval: tuple[float, float] = (0.2, 0.8)
    weights: MaskWeights = "elbo"
    full_mask_share: float = 0.0


def mask_views(trajectory: Trajectory, mask_token_id: int, plan: MaskPlan, seed: int) -> Views:
    """Views of random masks, block after block; a view that would mask nothing is left out.

    Args:
        seed: decides all draws.
    """
    maskable_KB = trajectory.steps_KB > 0
    masked_KNB, weight_KN = _draws(maskable_KB, plan, torch.Generator().manual_seed(seed))
    if plan.full_mask_share > 0:
        share = plan.full_mask_share
        masked_KNB = torch.cat([masked_KNB, maskable_KB[:, None]], dim=1)
        weight_KN = torch.cat([weight_KN * (1 - share), torch.full_like(weight_KN[:, :1], share)], dim=1)
        if share == 1:
            masked_KNB, weight_KN = masked_KNB[:, -1:], weight_KN[:, -1:]
    kept_V = masked_KNB.any(dim=2).flatten()
    block_V = torch.arange(len(maskable_KB)).repeat_interleave(masked_KNB.shape[1])[kept_V]
    masked_VB, weight_V = masked_KNB.flatten(0, 1)[kept_V], weight_KN.flatten()[kept_V]
    token_ids_VB, nowhere_VB = trajectory.token_ids_KB[block_V], torch.zeros_like(masked_VB)
    return Views(
        completion_ids=trajectory.completion_ids,
        block_V=block_V + trajectory.first_block,
        token_ids_VB=token_ids_VB.masked_fill(masked_VB, mask_token_id),
        target_ids_VB=token_ids_VB,
        revealed_VB=masked_VB,
        held_VB=nowhere_VB,
        weight_VB=weight_V[:, None].expand(masked_VB.shape).contiguous(),
        visited_VB=nowhere_VB,
        importance_V=torch.ones(len(block_V)),
        lead=trajectory.lead,
        engine_logprob_VB=torch.full(masked_VB.shape, torch.nan),
    )


def _draws(maskable_KB: Tensor, plan: MaskPlan, generator: Generator) -> tuple[Tensor, Tensor]:
    """Masks of each block, (K, N, B) bool, and the weight of a token in each; a complement follows its mask."""
    num_maskable_K1 = maskable_KB.sum(dim=1, keepdim=True)
    if plan.levels == "interval":
        masked_KNB, level_KN = _masked_each(maskable_KB, plan, generator)
    else:
        count_KN = _counts(num_maskable_K1, plan, generator)
        masked_KNB = _masked_so_many(maskable_KB, count_KN, generator)
        level_KN = count_KN / num_maskable_K1
    weight_KN = _weights(masked_KNB, level_KN, num_maskable_K1, plan)
    if not plan.complementary:
        return masked_KNB, weight_KN
    other_KNB = maskable_KB[:, None] & ~masked_KNB
    other_KN = _weights(other_KNB, 1 - level_KN, num_maskable_K1, plan)
    halves = 1.0 if plan.weights == "none" else 0.5  # elbo and mean: both halves estimate, and a pair is their mean
    return (
        torch.stack([masked_KNB, other_KNB], dim=2).flatten(1, 2),
        torch.stack([weight_KN, other_KN], dim=2).flatten(1, 2) * halves,
    )


def _counts(num_maskable_K1: Tensor, plan: MaskPlan, generator: Generator) -> Tensor:
    """How many tokens each draw masks, (K, N) int64; some of `every` mask none in a block that has not so many."""
    if plan.levels == "every":
        count_1N = torch.arange(1, int(num_maskable_K1.max()) + 1)[None]
        return torch.where(count_1N <= num_maskable_K1, count_1N, 0)
    if plan.levels == "gauss":
        nodes_N, _ = _quadrature(plan.num_masks)
        return (nodes_N * num_maskable_K1).long().clamp(min=1)
    # Spread evenly over all blocks and draws, which is unbiased for each and varies less.
    num_cells = len(num_maskable_K1) * plan.num_masks
    offset = torch.rand(1, generator=generator, dtype=torch.float64)
    uniform = (torch.arange(num_cells) + offset) / num_cells
    uniform_KN = uniform[torch.randperm(num_cells, generator=generator)].view(-1, plan.num_masks)
    if plan.complementary:
        return (uniform_KN * (num_maskable_K1 + 1)).long().clamp(max=num_maskable_K1)
    return (uniform_KN * num_maskable_K1).long().clamp(max=num_maskable_K1 - 1) + 1


def _masked_so_many(maskable_KB: Tensor, count_KN: Tensor, generator: Generator) -> Tensor:
    """Sets of so many maskable tokens, each equally likely; (K, N, B) bool."""
    order_KNB = torch.rand(*count_KN.shape, maskable_KB.shape[1], generator=generator)
    place_KNB = order_KNB.masked_fill(~maskable_KB[:, None], 2.0).argsort(dim=2).argsort(dim=2)
    return place_KNB < count_KN[:, :, None]


def _masked_each(maskable_KB: Tensor, plan: MaskPlan, generator: Generator) -> tuple[Tensor, Tensor]:
    """Each token with the probability of its draw, (K, N, B) bool, and these probabilities, (K, N)."""
    low, high = plan.interval
    level_KN = low + (high - low) * torch.rand(len(maskable_KB), plan.num_masks, generator=generator)
    uniform_KNB = torch.rand(*level_KN.shape, maskable_KB.shape[1], generator=generator)
    return (uniform_KNB < level_KN[:, :, None]) & maskable_KB[:, None], level_KN


def _weights(masked_KNB: Tensor, level_KN: Tensor, num_maskable_K1: Tensor, plan: MaskPlan) -> Tensor:
    """What a masked token of each draw counts, so that the draws of a block together are one estimate; (K, N)."""
    num_masked_KN = masked_KNB.sum(dim=2)
    share_K1 = 1.0 / (num_maskable_K1 if plan.levels == "every" else torch.full_like(num_maskable_K1, plan.num_masks))
    if plan.weights == "none":
        return share_K1.repeat(1, num_masked_KN.shape[1])
    per_token_KN = 1.0 / num_masked_KN.clamp(min=1)
    if plan.weights == "mean":
        return per_token_KN * share_K1
    if plan.levels == "interval":
        return share_K1 / level_KN
    if plan.levels == "gauss":
        _, weights_N = _quadrature(plan.num_masks)
        return weights_N * num_maskable_K1 * per_token_KN
    return (num_maskable_K1 + plan.complementary) * per_token_KN * share_K1


def _quadrature(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of Gauss and Legendre on [0, 1], of a polynomial of so many roots; (N,) float32 each."""
    beta_N = torch.arange(1, num_nodes, dtype=torch.float64)
    beta_N = beta_N / (4 * beta_N.square() - 1).sqrt()
    values_N, vectors_NN = torch.linalg.eigh(torch.diag(beta_N, 1) + torch.diag(beta_N, -1))  # Golub and Welsch
    return ((values_N + 1) / 2).float(), vectors_NN[0].square().float()
