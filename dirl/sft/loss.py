"""Log-probabilities of masked tokens -> the NELBO, and the same by noise level.

Shapes: T masked tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nelbo_loss(logprob_T: Tensor, weight_T: Tensor, denominator: float) -> Tensor:
    """Weighted negative log-likelihood over a denominator that whoever sees the global batch provides.

    Args:
        weight_T: w(t) of each token's noise level.
        denominator: completion tokens of the global batch, masked or not.
    Source: MDLM (arXiv 2406.07524), Eq. 10; BD3-LMs (arXiv 2503.09573), Eq. 8.
    """
    return -(weight_T * logprob_T).sum() / denominator


def decile_sums(logprob_T: Tensor, level_T: Tensor) -> Tensor:
    """Summed cross-entropy (nats) and count of masked tokens in each tenth of the noise levels; (10, 2) float64."""
    decile_T = (level_T * 10).long().clamp(max=9)
    sums = torch.zeros(10, 2, dtype=torch.float64, device=logprob_T.device)
    values = torch.stack([-logprob_T.double(), torch.ones_like(logprob_T, dtype=torch.float64)], dim=1)
    return sums.index_add(0, decile_T, values)
