"""Step map -> the states the decoder saw and what it did in each of them.

A trajectory is a prompt, every token of every block its completion touched, and for each of them the denoising step
(1-based, within its block) at which it was revealed. That is enough to replay decoding exactly: before step s of a
block, the positions with a smaller step are visible and the others masked; in step s those equal to s are revealed and
the later ones held.

Under full attention the whole document is one block, and steps are counted over all of it. A decoder then works through
generation windows from left to right: only the masks of the current one are decided about, and those of windows that it
never came to are read all the same.

Shapes: P prompt tokens, R completion tokens, K blocks touched by the completion, B block length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """One decoded sequence, and the blocks its completion touched.

    Raises:
        ValueError: the completion does not end at a block border, or lengths disagree.
    """

    prompt_ids: Tensor  # (P,) int64
    completion_ids: Tensor  # (R,) int64
    step_map: Tensor  # (R,) int64, >= 1
    block_length: int  # 0: full attention, the document is one block
    logprobs: Tensor | None = None  # (R,) float32 nats, as the engine recorded them
    confidence_threshold: float = math.nan  # that it was decoded with, where it had one of its own; NaN: the rule's
    # tokens that were revealed before any right of them: counted from the end of the prompt under full attention, else
    # from the start of each block; 0: all that a decoder could see
    window: int = 0
    unwritten_ids: Tensor | None = None  # full attention: (U,) int64, masks after the completion that were read
    lead: int = 0  # tokens that the first block lacks before position 0; see `DiffusionScheme.block_origin`
    hold_logprobs: Tensor | None = None  # float32 nats, as the engine recorded them: the order of `replay_views`' holds

    def __post_init__(self) -> None:
        prompt_length, completion_length = len(self.prompt_ids), len(self.completion_ids)
        is_cut = bool(self.block_length) and (self.lead + prompt_length + completion_length) % self.block_length
        if completion_length == 0 or is_cut:
            raise ValueError(
                f"a completion must have every token of its last block: lead {self.lead} + prompt {prompt_length} + "
                f"completion {completion_length} is not a multiple of block_length {self.block_length}"
            )
        if len(self.step_map) != completion_length or int(self.step_map.min()) < 1:
            raise ValueError(f"step_map must have {completion_length} steps >= 1, got {self.step_map.tolist()}")

    @property
    def first_block(self) -> int:
        """Index of the first touched block in the document."""
        return (self.lead + len(self.prompt_ids)) // self.block_length if self.block_length else 0

    @property
    def start(self) -> int:
        """Position of the first token of the first touched block."""
        return self.first_block * self.block_length - self.lead if self.block_length else 0

    @cached_property
    def token_ids_KB(self) -> Tensor:
        """The clean tokens of the touched blocks; the first one may begin with the end of the prompt."""
        unwritten_ids = self.completion_ids[:0] if self.unwritten_ids is None else self.unwritten_ids
        ids = torch.cat([self.prompt_ids[self.start :], self.completion_ids, unwritten_ids])
        return ids.view(-1, self.block_length or len(ids))

    @cached_property
    def steps_KB(self) -> Tensor:
        """The step of each of these tokens; 0 for those of the prompt, and for masks that stayed."""
        return self.placed(self.step_map)

    @property
    def windows_KB(self) -> Tensor:
        """The generation window of each of these tokens."""
        if self.block_length:
            lane_B = torch.arange(self.block_length) // (self.window or self.block_length)
            return lane_B.expand(self.token_ids_KB.shape)
        number_R = torch.arange(len(self.completion_ids))
        return self.placed(number_R // self.window if self.window else torch.zeros_like(number_R))

    def placed(self, values_R: Tensor) -> Tensor:
        """A value of each completion token at its place in the touched blocks, 0 elsewhere."""
        placed_KB = values_R.new_zeros(self.token_ids_KB.shape)
        tail = len(self.prompt_ids) - self.start
        placed_KB.view(-1)[tail : tail + len(values_R)] = values_R
        return placed_KB
