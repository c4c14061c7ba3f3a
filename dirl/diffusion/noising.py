"""The forward process of masked diffusion: blocks of clean tokens -> which positions are masked, and with what weight.

Each block (or each sequence) draws a noise level t, every completion token is masked with probability t, and the NELBO
weighs the cross-entropy at masked positions by 1/t. Levels are drawn with low discrepancy over the batch (one uniform
offset, evenly spread points), which is unbiased for each block and lowers the variance of the sum.

Shapes: K blocks, B block length. Source: MDLM (arXiv 2406.07524), BD3-LMs (arXiv 2503.09573), LLaDA (arXiv 2502.09992).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from dirl.config import Config, bounded

NoiseLevel = Literal["block", "sequence"]


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(Config):
    """How much of a completion is masked in SFT."""

    noise_level: NoiseLevel = "block"  # one level per block, or one per sequence (DiRL)
    min_noise: float = bounded(1e-3, above=0, below=1)  # levels are drawn from U(min_noise, max_noise); bounds 1/t
    max_noise: float = bounded(1.0, above=0, most=1)
    weight: Literal["nelbo", "even"] = "nelbo"  # of a masked token: 1/t, or the same at all levels
    low_discrepancy: bool = True  # spread the levels of a batch evenly; False: independent draws
    complementary: bool = False  # two views per block that mask complementary sets: every token supervised once a pair
    # shift 1: the row that a block's first token is learned from: the clean one, from which it is decoded, or that of
    # the noisy copy of the block before it (Fast-dLLM v2)
    block_start: Literal["clean", "noisy"] = "clean"

    def check(self) -> None:
        if self.max_noise <= self.min_noise:
            raise ValueError(f"max_noise={self.max_noise} must be above min_noise={self.min_noise}")


def draw_noise_levels(num_levels: int, config: NoiseConfig, generator: Generator) -> Tensor:
    """Noise levels t in (min_noise, max_noise], each uniform; (num_levels,) float32, in random order."""
    uniform = torch.rand(num_levels, generator=generator)
    if config.low_discrepancy:
        offsets = (torch.arange(num_levels) + uniform[:1]) / max(num_levels, 1)
        uniform = offsets[torch.randperm(num_levels, generator=generator)]
    return config.max_noise - (config.max_noise - config.min_noise) * uniform


def draw_mask(levels_K: Tensor, maskable_KB: Tensor, generator: Generator) -> Tensor:
    """Mask each maskable position with its block's probability; (K, B) bool, True = masked."""
    return (torch.rand(maskable_KB.shape, generator=generator) < levels_K[:, None]) & maskable_KB


def noise_weights(levels_K: Tensor, config: NoiseConfig) -> Tensor:
    """w(t) = 1/t: with it the expected weighted loss of a position does not depend on its noise level; (K,).

    Or one over the mean level: a masked token then counts the same at all levels, and a position 1 on average.
    """
    if config.weight == "even":
        return torch.full_like(levels_K, 2.0 / (config.min_noise + config.max_noise))
    return 1.0 / levels_K
