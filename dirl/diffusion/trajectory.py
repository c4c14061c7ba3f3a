"""Step map -> the states the decoder saw and what it did in each of them.

A trajectory is a prompt, every token of every block its completion touched, and for each of them the denoising step
(1-based, within its block) at which it was revealed. That is enough to replay decoding exactly: before step s of a
block, the positions with a smaller step are visible and the others masked; in step s those equal to s are revealed and
the later ones held.

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
    """One decoded sequence, and the blocks its completion touched; blocks are aligned to position 0.

    Raises:
        ValueError: the completion does not end at a block border, or lengths disagree.
    """

    prompt_ids: Tensor  # (P,) int64
    completion_ids: Tensor  # (R,) int64
    step_map: Tensor  # (R,) int64, >= 1
    block_length: int
    logprobs: Tensor | None = None  # (R,) float32 nats, as the engine recorded them
    confidence_threshold: float = math.nan  # that it was decoded with, where it had one of its own; NaN: the rule's

    def __post_init__(self) -> None:
        prompt_length, completion_length = len(self.prompt_ids), len(self.completion_ids)
        if completion_length == 0 or (prompt_length + completion_length) % self.block_length:
            raise ValueError(
                f"a completion must have every token of its last block: prompt {prompt_length} + completion "
                f"{completion_length} is not a multiple of block_length {self.block_length}"
            )
        if len(self.step_map) != completion_length or int(self.step_map.min()) < 1:
            raise ValueError(f"step_map must have {completion_length} steps >= 1, got {self.step_map.tolist()}")

    @property
    def first_block(self) -> int:
        """Absolute index of the first touched block."""
        return len(self.prompt_ids) // self.block_length

    @cached_property
    def token_ids_KB(self) -> Tensor:
        """The clean tokens of the touched blocks; the first one may begin with the end of the prompt."""
        return torch.cat([self._tail_ids, self.completion_ids]).view(-1, self.block_length)

    @cached_property
    def steps_KB(self) -> Tensor:
        """The step of each of these tokens; 0 for those of the prompt."""
        return torch.cat([torch.zeros_like(self._tail_ids), self.step_map]).view(-1, self.block_length)

    @property
    def _tail_ids(self) -> Tensor:
        return self.prompt_ids[self.first_block * self.block_length :]
