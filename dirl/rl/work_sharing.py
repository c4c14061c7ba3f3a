"""Groups of unequal size on the ranks that rolled them out -> the same groups with every rank about as busy.

Source: the local search is that of multiway number partitioning: a move is made while it narrows the widest gap.
"""

from __future__ import annotations

from collections.abc import Sequence

from dirl.rollout.engine import Completion


def replay_cost(completions: Sequence[Completion], block_length: int, hidden_size: int) -> float:
    """Estimated work of training on a group, in tokens that attend to nothing.

    A token costs about 24 D^2 FLOPs a layer in its matrices and 4 D a token it attends to, so that a context of 6 D
    tokens doubles it.
    """
    prompt_length = len(completions[0].prompt_ids)
    cost = prompt_length * (1 + prompt_length / 2 / (6 * hidden_size))
    for completion in completions:
        tokens = len(completion.token_ids) + completion.num_denoising_steps * block_length
        mean_context = prompt_length + len(completion.token_ids) / 2
        cost += tokens * (1 + mean_context / (6 * hidden_size))
    return cost


def balanced_owners(costs: Sequence[float], owners: Sequence[int], num_ranks: int) -> list[int]:
    """Who trains on each item, from who has it: items move from the busiest rank to the idlest while that helps."""
    owners = list(owners)
    loads = [0.0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    while True:
        busiest, idlest = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[busiest] - loads[idlest]
        movable = [i for i, owner in enumerate(owners) if owner == busiest and 0 < costs[i] < gap]
        if not movable:
            return owners
        # Half the gap would close it; each move makes the sum of squared loads smaller, so this ends.
        chosen = min(movable, key=lambda i: abs(costs[i] - gap / 2))
        owners[chosen] = idlest
        loads[busiest] -= costs[chosen]
        loads[idlest] += costs[chosen]
