"""Random documents with the views of their replay, as a decoder would have left them; and tables of actions by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dirl.diffusion.packing import Actions, ViewedDocument
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import replay_views


def action_table(target_T: Tensor, is_reveal_T: Tensor, view_T: Tensor, **columns: Tensor) -> Actions:
    """A table of these actions, all of one block of one completion unless other columns say otherwise."""
    zeros_T, place_T = torch.zeros_like(target_T), torch.arange(len(target_T))
    neutral = {
        "index_T": place_T,
        "is_visited_T": torch.ones_like(is_reveal_T),
        "weight_T": is_reveal_T.float(),
        "block_T": zeros_T,
        "branch_T": zeros_T,
        "completion_index_T": place_T,
    }
    return Actions.of(**{**neutral, "target_T": target_T, "is_reveal_T": is_reveal_T, "view_T": view_T, **columns})


def random_trajectory(prompt_length: int, num_blocks: int, block_length: int) -> Trajectory:
    """Contiguous steps in each block, as a decoder makes them."""
    completion_length = num_blocks * block_length - prompt_length % block_length
    prompt_ids, completion_ids = torch.randint(0, 50, (prompt_length,)), torch.randint(50, 90, (completion_length,))
    first_lane = prompt_length % block_length
    steps: list[int] = []
    while len(steps) < completion_length:
        size = block_length - first_lane
        num_steps = int(torch.randint(1, size + 1, ()))
        drawn = torch.cat([torch.arange(num_steps), torch.randint(0, num_steps, (size - num_steps,))])
        steps += (drawn[torch.randperm(size)] + 1).tolist()
        first_lane = 0
    return Trajectory(prompt_ids, completion_ids, torch.tensor(steps, dtype=torch.int64), block_length)


def random_document(
    prompt_length: int, blocks_of_branches: Sequence[int], block_length: int, mask_token_id: int
) -> ViewedDocument:
    """A prompt with one completion for each number of touched blocks."""
    prompt_ids, branches = torch.randint(0, 50, (prompt_length,)), []
    for num_blocks in blocks_of_branches:
        drawn = random_trajectory(prompt_length, num_blocks, block_length)
        trajectory = replace(drawn, prompt_ids=prompt_ids)
        branches.append(replay_views(trajectory, mask_token_id))
    return ViewedDocument(prompt_ids, branches)
