"""Logits -> the two distributions of a denoising step: the one confidence is read from and the one tokens come from.

Tokens are drawn after temperature, top-k and top-p; tokens that may never appear are ruled out before all of them.
Families differ in the confidence that they compare with a threshold: it is read from the distribution drawn from
(`processed`), from the one after temperature alone (`tempered`: LMDeploy's convention, and SDAR's), or from the model's
own (`untempered`). A trainer must score a token under the first and judge thresholds under the other, so both sides
call these functions and nothing else.

Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Confidence = Literal["processed", "tempered", "untempered"]


@dataclass(frozen=True)
class TokenDistribution:
    """How logits become probabilities."""

    temperature: float = 1.0  # 0: greedy; probabilities are then those of temperature 1
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    confidence: Confidence = "tempered"

    def tempered_logprobs(self, logits_TV: Tensor, suppressed_V: Tensor) -> Tensor:
        """Float32 log-probabilities after temperature and suppression, before top-k and top-p; (T, V)."""
        logits_TV = logits_TV.float().masked_fill(suppressed_V, -torch.inf)
        if self.temperature not in (0.0, 1.0):
            logits_TV = logits_TV / self.temperature
        return torch.log_softmax(logits_TV, dim=-1)

    def sampling_logprobs(self, tempered_TV: Tensor, drawn: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Renormalised float32 log-probabilities after top-k, then top-p; ruled-out tokens are -inf; (T, V).

        Which tokens stay is a constant for autograd; their renormalisation is not.

        Args:
            drawn: a token of each row, (T,) int64, and whether it was drawn there, (T,) bool, and therefore stays: at
                the edge of the kept set rounding, a newer policy, or a reference may rank it lower, and -inf would end
                a training run.
        """
        if self.top_k and self.top_k < tempered_TV.shape[-1]:
            kth = tempered_TV.detach().topk(self.top_k, dim=-1).values[..., -1:]
            tempered_TV = _keep(tempered_TV, tempered_TV.detach() >= kth, drawn)
        if self.top_p < 1.0:
            tempered_TV = _keep(tempered_TV, _nucleus(tempered_TV.detach(), self.top_p), drawn)
        return tempered_TV

    def confidence_logprobs(
        self, logits_TV: Tensor, suppressed_V: Tensor, tempered_TV: Tensor, sampling_TV: Tensor
    ) -> Tensor:
        """Float32 log-probabilities that are confidences, without a gradient; (T, V).

        Args:
            tempered_TV, sampling_TV: what the other two methods made of the same logits.
        """
        if self.confidence == "processed":
            return sampling_TV.detach()
        if self.confidence == "tempered" or self.temperature in (0.0, 1.0):
            return tempered_TV.detach()
        return replace(self, temperature=1.0).tempered_logprobs(logits_TV.detach(), suppressed_V)


def _keep(logprobs_TV: Tensor, kept_TV: Tensor, drawn: tuple[Tensor, Tensor] | None) -> Tensor:
    """The distribution conditioned on the kept tokens and those that were drawn."""
    if drawn is not None:
        token_T1, is_drawn_T1 = (x[:, None] for x in drawn)
        kept_TV = kept_TV.scatter(1, token_T1, kept_TV.gather(1, token_T1) | is_drawn_T1)
    return torch.log_softmax(logprobs_TV.masked_fill(~kept_TV, -torch.inf), dim=-1)


def _nucleus(logprobs_TV: Tensor, top_p: float) -> Tensor:
    """The smallest set of most probable tokens whose mass reaches top_p (True = kept)."""
    sorted_TV, order_TV = logprobs_TV.sort(dim=-1, descending=True)
    probs_TV = sorted_TV.exp()
    mass_before_TV = probs_TV.cumsum(dim=-1) - probs_TV
    return torch.zeros_like(logprobs_TV, dtype=torch.bool).scatter(-1, order_TV, mass_before_TV < top_p)


def suppressed_tokens(vocab_size: int, tokenizer_length: int, mask_token_id: int, device: torch.device) -> Tensor:
    """True for ids that may never be sampled: the mask token and the rows the tokenizer has no token for; (V,).

    Without this a model can emit ids that decode to nothing (SDAR's vocabulary has 266 of them).
    """
    ids_V = torch.arange(vocab_size, device=device)
    return (ids_V >= tokenizer_length) | (ids_V == mask_token_id)


def entropy(logprobs_TV: Tensor) -> Tensor:
    """Entropy in nats of each row; (T,). What is ruled out adds nothing, to the gradient neither."""
    if not (logprobs_TV.requires_grad and torch.is_grad_enabled()):
        return torch.special.entr(logprobs_TV.exp()).sum(dim=-1)
    return -(logprobs_TV.exp() * logprobs_TV.masked_fill(logprobs_TV == -torch.inf, 0.0)).sum(dim=-1)


def sample(logprobs_TV: Tensor, uniform_T: Tensor) -> Tensor:
    """Inverse-CDF draw: one uniform number in [0, 1) gives one token; (T,) int64.

    The cumulated mass is float64: with 150k tokens a float32 sum loses the tail.
    """
    cumulated_TV = logprobs_TV.exp().cumsum(dim=-1, dtype=torch.float64)
    point_T1 = (uniform_T.double() * cumulated_TV[:, -1])[:, None]
    return torch.searchsorted(cumulated_TV, point_T1, right=True).squeeze(-1).clamp_(max=logprobs_TV.shape[-1] - 1)


def counter_uniform(seed_T: Tensor, position_T: Tensor, counter_T: Tensor) -> Tensor:
    """Uniform float64 numbers in [0, 1) that depend on (seed, position, counter) and on nothing else; (T,).

    A counter-based stream: a sample is the same whatever shares its batch, on CPU and on GPU. Each input goes through
    the finaliser of splitmix64 (int64 arithmetic wraps around, which is what the hash wants).
    """
    state_T = _mix(seed_T)
    state_T = _mix(state_T ^ position_T)
    state_T = _mix(state_T ^ counter_T)
    return _shift(state_T, 11).double() * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    state = state + _GOLDEN
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's own is arithmetic for int64."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN, _MIX_1, _MIX_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
