"""Step maps -> blocks: alignment to position 0, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dirl.diffusion.trajectory import Trajectory


def trajectory(prompt_length: int, step_map: list[int], block_length: int) -> Trajectory:
    completion_ids = torch.arange(len(step_map)) + 100
    step_map_R = torch.tensor(step_map, dtype=torch.int64)
    return Trajectory(torch.arange(prompt_length), completion_ids, step_map_R, block_length)


def test_the_prompt_tail_shares_the_first_block_at_step_zero() -> None:
    blocks = trajectory(6, [2, 1, 1, 1, 3, 2], 4)
    assert blocks.first_block == 1
    assert blocks.token_ids_KB.tolist() == [[4, 5, 100, 101], [102, 103, 104, 105]]
    assert blocks.steps_KB.tolist() == [[0, 0, 2, 1], [1, 1, 3, 2]]


def test_a_prompt_of_full_blocks_leaves_its_blocks_out() -> None:
    blocks = trajectory(4, [1, 2], 2)
    assert (blocks.first_block, blocks.token_ids_KB.tolist()) == (2, [[100, 101]])


def test_an_empty_prompt_starts_at_block_zero() -> None:
    assert trajectory(0, [1, 2], 2).first_block == 0


@pytest.mark.parametrize(("prompt_length", "step_map"), [(3, [1, 1]), (4, [1, 1, 1]), (4, [])])
def test_a_completion_must_end_at_a_block_border(prompt_length: int, step_map: list[int]) -> None:
    with pytest.raises(ValueError, match="not a multiple of block_length 4"):
        trajectory(prompt_length, step_map, 4)


@pytest.mark.parametrize("step_map", [[1, 0, 1, 2], [1, 2]])
def test_every_completion_token_needs_a_step(step_map: list[int]) -> None:
    with pytest.raises(ValueError, match="step_map must have 4 steps >= 1"):
        Trajectory(torch.arange(4), torch.arange(4), torch.tensor(step_map), 4)
