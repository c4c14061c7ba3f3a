"""Seeds that are the same everywhere and differ wherever what they are for does."""

from __future__ import annotations

from dirl.training.seeds import stable_seed


def test_a_seed_is_the_same_in_every_process_and_release() -> None:
    assert (stable_seed(0), stable_seed(3, -1, 7)) == (4246866556266386882, 5659770530022835340)


def test_other_numbers_are_other_seeds() -> None:
    numbers = [(), *((a,) for a in range(-2, 200)), *((a, b) for a in range(-2, 40) for b in range(-2, 40)), (1, 2, 3)]
    seeds = {stable_seed(*one) for one in numbers}
    assert len(seeds) == len(numbers)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
