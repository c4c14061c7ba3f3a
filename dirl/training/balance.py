"""Documents or groups of unequal size -> ranks that are about equally busy.

Source: the local search is that of multiway number partitioning: a move is made while it narrows the widest gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def packed_cost(prompt_length: int, completions: Iterable[tuple[int, int]], hidden_size: int) -> float:
    """Estimated work of training on completions of one prompt, in tokens that attend to nothing.

    A token costs about 24 D^2 FLOPs a layer in its matrices and 4 D a token it attends to, so that a context of 6 D
    tokens doubles it.

    Args:
        completions: tokens of each, and tokens of its noisy views.
    """
    cost = prompt_length * (1 + prompt_length / 2 / (6 * hidden_size))
    for completion_length, view_tokens in completions:
        mean_context = prompt_length + completion_length / 2
        cost += (completion_length + view_tokens) * (1 + mean_context / (6 * hidden_size))
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
