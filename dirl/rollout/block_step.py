"""Hidden states (or logits) of many blocks -> what one denoising step does to each: the same for every engine.

Rows go through lm_head, the distributions and the float64 sums of the draw a chunk at a time, so that memory does not
grow with their number. A host that schedules ahead must not wait for the device: without `index_T` nothing here does.

Random numbers depend on (seed, position, denoising step) only: the same logits and seed give the same completion in any
engine, batch or order.

Where it is asked for, a step also tells what the positions that stay masked had as log-probability to do so. That takes
their rows through lm_head once more: which confidence bars them is known when all tokens are drawn.

Shapes: N sequences, B block length, T rows, V vocabulary, X hidden or V.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dirl.diffusion.distribution import TokenDistribution, counter_uniform, entropy, sample
from dirl.diffusion.likelihood import Decisions, hold_bars, hold_logprobs
from dirl.diffusion.unmasking import UnmaskingRule, reveal_positions
from dirl.model.logprobs import LOGITS_PER_CHUNK


@dataclass(frozen=True)
class Blocks:
    """The current blocks of sequences."""

    masked_NB: Tensor  # bool
    position_NB: Tensor  # int64, absolute
    step_N: Tensor  # int64, denoising steps the block has taken
    seed_N: Tensor  # int64
    threshold_N: Tensor | None = None  # float32, each one's confidence threshold; None: that of the sampling


@dataclass(frozen=True)
class DenoisingStep:
    """What one denoising step does to some blocks; one with no masks stays as it is."""

    revealed_NB: Tensor  # bool
    token_ids_NB: Tensor  # int64, drawn; read where revealed
    logprobs_NB: Tensor  # float32, nats; read where revealed
    holds_NB: Tensor | None  # float32, nats, of staying masked; NaN where nothing is held; None: not asked for


@dataclass(frozen=True)
class Draws:
    """One token for each row."""

    token_ids_T: Tensor  # int64
    logprobs_T: Tensor  # float32, nats, under the distribution drawn from
    confidences_T: Tensor  # float32, a probability
    entropies_T: Tensor  # float32, nats; zeros where the strategy does not read them


@dataclass(frozen=True)
class Sampler:
    """How rows become tokens, and which of them are revealed."""

    logits_of: Callable[[Tensor], Tensor]  # (T, X) -> (T, V): lm_head, or nothing for an engine that has logits
    distribution: TokenDistribution
    unmasking: UnmaskingRule
    suppressed_V: Tensor  # bool, ids that are never drawn
    records_holds: bool = False

    def denoise(self, rows_TX: Tensor, blocks: Blocks, index_T: Tensor | None = None) -> DenoisingStep:
        """One denoising step.

        Args:
            index_T: which positions of the flattened blocks the rows are of, in order, at least all masked ones. None:
                all.
        """
        shape = blocks.masked_NB.shape
        seed_NB, step_NB = (x[:, None].expand(shape) for x in (blocks.seed_N, blocks.step_N))
        # Two random numbers a position and denoising step: for the token, and for the order in which `random` reveals.
        uniform_NB = counter_uniform(seed_NB, blocks.position_NB, 2 * step_NB)
        uniform_T = uniform_NB.flatten() if index_T is None else uniform_NB.flatten()[index_T]

        def placed(value_T: Tensor) -> Tensor:
            if index_T is not None:
                value_T = value_T.new_zeros(blocks.masked_NB.numel()).index_copy_(0, index_T, value_T)
            return value_T.view(shape)

        drawn = self.draw(rows_TX, uniform_T)
        confidence_NB, entropy_NB = placed(drawn.confidences_T), placed(drawn.entropies_T)
        order_NB = counter_uniform(seed_NB, blocks.position_NB, 2 * step_NB + 1)
        revealed_NB = reveal_positions(
            self.unmasking,
            blocks.masked_NB,
            confidence_NB,
            entropy_NB,
            order_NB,
            step_N=blocks.step_N,
            threshold_N=blocks.threshold_N,
        )
        holds_NB = None
        if self.records_holds:
            holds_NB = self._holds(rows_TX, drawn.confidences_T, blocks, revealed_NB, index_T)
        return DenoisingStep(revealed_NB, placed(drawn.token_ids_T), placed(drawn.logprobs_T), holds_NB)

    def draw(self, rows_TX: Tensor, uniform_T: Tensor) -> Draws:
        """One token a row, in chunks of rows; `uniform_T` in [0, 1) decides which."""
        columns = zip(*(self._draw_chunk(*chunk) for chunk in self._chunks(rows_TX, uniform_T)), strict=True)
        return Draws(*(chunks[0] if len(chunks) == 1 else torch.cat(chunks) for chunks in columns))

    def _chunks(self, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """So many rows at a time that their logits stay within bounds."""
        num_rows = max(1, LOGITS_PER_CHUNK // len(self.suppressed_V))
        return zip(*(column.split(num_rows) for column in columns), strict=True)

    def _holds(
        self, rows_TX: Tensor, confidence_T: Tensor, blocks: Blocks, revealed_NB: Tensor, index_T: Tensor | None
    ) -> Tensor:
        """Log-probability of each position that stays masked to do so, NaN elsewhere; (N, B)."""
        held_NB = self.unmasking.undecided(blocks.masked_NB) & ~revealed_NB
        nothing_NB = torch.full(held_NB.shape, torch.nan, device=held_NB.device)
        if not self.unmasking.reads_confidence:
            return nothing_NB.masked_fill(held_NB, 0.0)
        place_T = torch.arange(held_NB.numel(), device=held_NB.device) if index_T is None else index_T
        threshold_NB = nothing_NB if blocks.threshold_N is None else blocks.threshold_N[:, None].expand(held_NB.shape)
        revealed_T, threshold_T = (x.flatten()[place_T] for x in (revealed_NB, threshold_NB))
        decided = Decisions(confidence_T, revealed_T, place_T // held_NB.shape[1], threshold_T)
        bar_T, may_tie_T = hold_bars(decided, self.unmasking)
        if index_T is not None:  # the host may wait
            is_held_T = held_NB.flatten()[place_T]
            place_T, rows_TX, bar_T, may_tie_T = (x[is_held_T] for x in (place_T, rows_TX, bar_T, may_tie_T))
        hold_T = torch.cat([self._hold_chunk(*chunk) for chunk in self._chunks(rows_TX, bar_T, may_tie_T)])
        return nothing_NB.flatten().index_copy(0, place_T, hold_T).view(held_NB.shape).masked_fill(~held_NB, torch.nan)

    def _hold_chunk(self, rows_TX: Tensor, bar_T: Tensor, may_tie_T: Tensor) -> Tensor:
        sampling_TV, confidence_TV = self._distributions(rows_TX)
        return hold_logprobs(sampling_TV, confidence_TV.exp(), bar_T, may_tie_T)

    def _distributions(self, rows_TX: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities that tokens are drawn with, and those that confidence is read from; (T, V) each."""
        logits_TV, rule = self.logits_of(rows_TX), self.distribution
        tempered_TV = rule.tempered_logprobs(logits_TV, self.suppressed_V)
        sampling_TV = rule.sampling_logprobs(tempered_TV)
        return sampling_TV, rule.confidence_logprobs(logits_TV, self.suppressed_V, tempered_TV, sampling_TV)

    def _draw_chunk(self, rows_TX: Tensor, uniform_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of `Draws`."""
        (sampling_TV, confidence_TV), rule = self._distributions(rows_TX), self.distribution
        token_T = sampling_TV.argmax(dim=-1) if rule.temperature == 0 else sample(sampling_TV, uniform_T)
        logprob_T, confidence_T = (x.gather(1, token_T[:, None]).squeeze(1) for x in (sampling_TV, confidence_TV))
        needs_entropy = self.unmasking.strategy == "entropy_bounded"
        entropy_T = entropy(sampling_TV) if needs_entropy else torch.zeros_like(logprob_T)
        return token_T, logprob_T, confidence_T.exp(), entropy_T
