"""Rewards of a group -> advantages of its completions.

Shapes: P prompts (groups), G completions a group.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dirl.errors import UserError
from dirl.rl.objective import AdvantageName, ObjectiveConfig, ScaleRewards
from dirl.rl.rollout_group import RolloutGroup
from dirl.training.distributed import Distributed

_EPSILON = 1e-4  # keeps the division finite; groups without spread are dropped before they get here


def group_advantages(
    rewards_PG: Tensor, scale_rewards: ScaleRewards, batch_std: float = 1.0, *, baseline: AdvantageName = "group"
) -> Tensor:
    """Reward minus a baseline, over a standard deviation where asked for; (P, G) float32.

    Args:
        rewards_PG: float.
        scale_rewards: `none` (the paper, Dr. GRPO), `group` (GRPO: the group's own deviation), `batch` (REINFORCE++:
            `batch_std`).
        batch_std: standard deviation over the global batch; read for `batch` only.
        baseline: `leave_one_out`: the mean of the others, which no completion has a part in; `softmax`: weights
            softmax(A) - softmax(-A) of the group's advantages A, whatever the scale of rewards (wd1); else the mean.
    Source: DiRL (arXiv 2512.22234), Eq. 5; DeepSeekMath (arXiv 2402.03300), section 4.1.2; RLOO (arXiv 2402.14740);
        wd1 (arXiv 2507.08838).
    """
    rewards_PG = rewards_PG.float()
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if baseline == "leave_one_out":
        size = rewards_PG.shape[1]
        centred_PG = centred_PG * (size / (size - 1))
    if scale_rewards == "group":
        centred_PG = centred_PG / (rewards_PG.std(dim=1, keepdim=True) + _EPSILON)
    elif scale_rewards == "batch":
        centred_PG = centred_PG / (batch_std + _EPSILON)
    return centred_PG.softmax(dim=1) - (-centred_PG).softmax(dim=1) if baseline == "softmax" else centred_PG


def advantages_of(groups: Sequence[RolloutGroup], objective: ObjectiveConfig, distributed: Distributed) -> list[Tensor]:
    """Advantages of each group's completions, (G,) each; collective when rewards are scaled over the batch.

    With `given` those of their S denoising steps, as the reward functions gave them; (G, S), the rest zeros.
    """
    if objective.advantage == "given":
        return [_given(group) for group in groups]
    batch_std = 1.0
    if objective.scale_rewards == "batch":
        batch_std = statistics.stdev(distributed.gather([reward for group in groups for reward in group.rewards]))
    return [
        group_advantages(
            group.reward_G[None], objective.scale_rewards, batch_std, baseline=objective.advantage
        ).squeeze(0)
        for group in groups
    ]


def _given(group: RolloutGroup) -> Tensor:
    """Raises UserError where no reward function gave a number for each step."""
    if not group.step_rewards:
        raise UserError(
            "advantage=given: no function of reward.functions returned one number for each denoising step of a "
            "completion; let one do so, or use advantage=group"
        )
    for completion, rewards in zip(group.completions, group.step_rewards, strict=True):
        if len(rewards) != completion.num_denoising_steps:
            raise UserError(
                f"advantage=given: {len(rewards)} rewards for {completion.num_denoising_steps} denoising steps of a "
                "completion (the column num_denoising_steps says how many); return one for each"
            )
    return nn.utils.rnn.pad_sequence([torch.tensor(rewards) for rewards in group.step_rewards], batch_first=True)
