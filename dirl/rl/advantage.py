"""Rewards of a group -> advantages of its completions.

Shapes: P prompts (groups), G completions a group.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch import Tensor

from dirl.rl.objective import ScaleRewards
from dirl.rl.rollout_group import RolloutGroup
from dirl.training.distributed import Distributed

_EPSILON = 1e-4  # keeps the division finite; groups without spread are dropped before they get here


def group_advantages(rewards_PG: Tensor, scale_rewards: ScaleRewards, batch_std: float = 1.0) -> Tensor:
    """Reward minus its group's mean, over a standard deviation where asked for; (P, G) float32.

    Args:
        rewards_PG: float.
        scale_rewards: `none` (the paper, Dr. GRPO), `group` (GRPO: the group's own deviation), `batch` (REINFORCE++:
            `batch_std`).
        batch_std: standard deviation over the global batch; read for `batch` only.
    Source: DiRL (arXiv 2512.22234), Eq. 5; DeepSeekMath (arXiv 2402.03300), section 4.1.2.
    """
    rewards_PG = rewards_PG.float()
    centred_PG = rewards_PG - rewards_PG.mean(dim=1, keepdim=True)
    if scale_rewards == "none":
        return centred_PG
    if scale_rewards == "group":
        return centred_PG / (rewards_PG.std(dim=1, keepdim=True) + _EPSILON)
    return centred_PG / (batch_std + _EPSILON)


def advantages_of(
    groups: Sequence[RolloutGroup], scale_rewards: ScaleRewards, distributed: Distributed
) -> list[Tensor]:
    """Advantages of each group's completions, (G,) each; collective when rewards are scaled over the batch."""
    batch_std = 1.0
    if scale_rewards == "batch":
        batch_std = statistics.stdev(distributed.gather([reward for group in groups for reward in group.rewards]))
    return [group_advantages(group.reward_G[None], scale_rewards, batch_std).squeeze(0) for group in groups]
