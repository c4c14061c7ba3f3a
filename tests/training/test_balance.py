"""Items on ranks, evened out by what they cost."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from dirl.data.conversations import Document
from dirl.errors import UserError
from dirl.model.tiny import tiny
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.balance import balanced_owners, consecutive, packed_cost, split_by_budget


def loads(costs: list[float], owners: list[int], num_ranks: int) -> list[float]:
    return [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(num_ranks)]


def test_balancing_is_nearly_optimal_and_leaves_balanced_items_alone() -> None:
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.uniform(1, 10) for _ in range(8)]
        start = [rng.randrange(2) for _ in costs]
        owners = balanced_owners(costs, start, 2)
        best = min(max(loads(costs, list(way), 2)) for way in itertools.product((0, 1), repeat=8))
        assert max(loads(costs, owners, 2)) <= 1.2 * best
        assert max(loads(costs, owners, 2)) <= max(loads(costs, start, 2))
    assert balanced_owners([3.0, 3.0, 3.0, 3.0], [0, 1, 1, 0], 2) == [0, 1, 1, 0]
    assert sorted(balanced_owners([1.0] * 6, [2] * 6, 3)) == [0, 0, 1, 1, 2, 2]
    assert balanced_owners([], [], 3) == []


def test_cost_is_linear_in_tokens_and_grows_with_what_they_attend_to() -> None:
    assert packed_cost(4, [(8, 16)], 10**9) == pytest.approx(28)  # a model so wide that attention costs nothing
    assert packed_cost(0, [(60, 0)], 5) == 60 * (1 + 30 / 30)  # a context of 6 D doubles a token's work
    alone, together = packed_cost(100, [(50, 50)], 16), packed_cost(100, [(50, 50)] * 4, 16)
    assert alone < together < 4 * alone  # the prompt is packed once


def test_ranks_of_sft_are_about_equally_busy() -> None:
    """Long documents at the front of a batch: contiguous halves would leave one rank with nearly all of the work."""
    model, tokenizer = tiny()
    documents = [Document([5] * 8, [7] * (400 if i < 4 else 20)) for i in range(16)]
    config = SFTConfig(output_dir="unused", data=SFTDataConfig(num_heldout=0))
    trainer = SFTTrainer(config, model=model, tokenizer=tokenizer, documents=documents)
    batch = sorted(trainer.examples(documents), key=lambda example: -len(example.trajectory.completion_ids))
    found: list[tuple[int, int]] = []  # documents and tokens of each rank
    for rank in range(2):
        trainer.distributed = cast(Any, SimpleNamespace(rank=rank, world_size=2, device=model.device))
        packs = trainer._packs(batch, seed=0)
        found.append((sum(int(p.tokens.document_L[-1]) + 1 for p in packs), sum(map(len, packs))))
    assert sum(documents for documents, _ in found) == 16
    assert max(tokens for _, tokens in found) < 1.1 * min(tokens for _, tokens in found)


def test_bins_hold_every_item_once_within_the_budget() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(1, 50) for _ in range(60)]
    bins = split_by_budget(lengths, 64)
    assert sorted(index for members in bins for index in members) == list(range(60))
    assert all(sum(lengths[index] for index in members) <= 64 for members in bins)
    # First fit leaves at most one bin half empty.
    assert sum(sum(lengths[index] for index in members) <= 32 for members in bins) <= 1
    assert split_by_budget([], 64) == []


def test_an_item_over_the_budget_is_an_error() -> None:
    with pytest.raises(UserError, match="65 packed tokens, max_tokens_per_micro_batch is 64"):
        split_by_budget([3, 65], 64)


@pytest.mark.parametrize("budget", [1, 9, 30, 1000])
def test_consecutive_items_fill_a_bunch_as_far_as_it_goes(budget: int) -> None:
    words = ["abc" * n for n in (1, 9, 2, 2, 3, 12, 1)]
    bunches = list(consecutive(iter(words), len, budget))
    assert [word for bunch in bunches for word in bunch] == words
    sizes = [sum(map(len, bunch)) for bunch in bunches]
    assert all(size <= budget or len(bunch) == 1 for size, bunch in zip(sizes, bunches, strict=True))
    assert all(sizes[i] + len(bunch[0]) > budget for i, bunch in enumerate(bunches[1:])), "a bunch had room"
    assert list(consecutive([], len, budget)) == []


def test_no_bunch_waits_for_more_than_the_next_item() -> None:
    asked: list[int] = []
    bunches = consecutive((asked.append(n) or n for n in range(1, 9)), lambda n: n, 6)  # type: ignore[func-returns-value]
    assert next(bunches) == [1, 2, 3] and asked == [1, 2, 3, 4]
