"""Items of unequal size -> ranks that are about equally busy, bins and bunches that fit a budget.

Source: the local search is that of multiway number partitioning: a move is made while it narrows the widest gap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from dirl.errors import UserError

Item = TypeVar("Item")


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


def whole_cost(length: int, num_views: int, hidden_size: int) -> float:
    """The same of views that are whole documents and read themselves in full."""
    return num_views * length * (1 + length / (6 * hidden_size))


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


def consecutive(items: Iterable[Item], size_of: Callable[[Item], int], budget: int) -> Iterator[list[Item]]:
    """The items in order, in bunches of at most `budget` together; a larger one goes alone. Looks one item ahead."""
    bunch: list[Item] = []
    used = 0
    for item in items:
        size = size_of(item)
        if bunch and used + size > budget:
            yield bunch
            bunch, used = [], 0
        bunch.append(item)
        used += size
    if bunch:
        yield bunch


def split_by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of items in as few bins of at most `budget` tokens as first-fit decreasing finds.

    Raises:
        UserError: an item is longer than the budget.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > budget:
            raise UserError(
                f"a document takes {length} packed tokens, max_tokens_per_micro_batch is {budget}; raise it, or "
                "shorten documents (data.max_length, rollout.max_completion_length)"
            )
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = -1
        bins[place].append(index)
        room[place] -= length
    return _evened(lengths, budget, bins)


def _evened(lengths: Sequence[int], budget: int, bins: list[list[int]]) -> list[list[int]]:
    """As many bins, about equally full, where that fits: the fullest sets the memory and the time of all."""
    evened: list[list[int]] = [[] for _ in bins]
    filled = [0] * len(bins)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = filled.index(min(filled))
        evened[place].append(index)
        filled[place] += lengths[index]
    return evened if max(filled, default=0) <= budget else bins
