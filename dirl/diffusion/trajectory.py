"""Step map -> the states the decoder saw and what it did in each of them.

A trajectory is a prompt, every token of every block its completion touched, and for each of them the denoising step
(1-based, within its block) at which it was revealed. That is enough to replay decoding exactly: before step s of a
block, the positions with a smaller step are visible and the others masked; in step s those equal to s are revealed and
the later ones held.

Shapes: P prompt tokens, R completion tokens, K blocks touched by the completion, B block length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """One decoded sequence; P + R is a multiple of the block length, since blocks are aligned to position 0."""

    prompt_ids: Tensor  # (P,) int64
    completion_ids: Tensor  # (R,) int64
    step_map: Tensor  # (R,) int64, >= 1

    def blocks(self, block_length: int) -> TrajectoryBlocks:
        """The blocks the completion touched; prompt tokens that share the first one have step 0.

        Raises:
            ValueError: the completion does not end at a block border, or lengths disagree.
        """
        prompt_length, completion_length = len(self.prompt_ids), len(self.completion_ids)
        if completion_length == 0 or (prompt_length + completion_length) % block_length:
            raise ValueError(
                f"a completion must hold every token of its last block: prompt {prompt_length} + completion "
                f"{completion_length} is not a multiple of block_length {block_length}"
            )
        if len(self.step_map) != completion_length or int(self.step_map.min()) < 1:
            raise ValueError(f"step_map must hold {completion_length} steps >= 1, got {self.step_map.tolist()}")
        tail = prompt_length % block_length
        tail_ids = self.prompt_ids[prompt_length - tail :]
        return TrajectoryBlocks(
            first_block=prompt_length // block_length,
            token_ids_KB=torch.cat([tail_ids, self.completion_ids]).view(-1, block_length),
            steps_KB=torch.cat([torch.zeros_like(tail_ids), self.step_map]).view(-1, block_length),
        )


@dataclass(frozen=True)
class TrajectoryBlocks:
    """The touched blocks of one trajectory."""

    first_block: int  # absolute index of the first touched block
    token_ids_KB: Tensor  # (K, B) int64, clean
    steps_KB: Tensor  # (K, B) int64, 0 for prompt tokens
