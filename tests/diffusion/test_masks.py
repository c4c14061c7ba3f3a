"""Random masks: over all draws, weighted scores are the bound they estimate. Draws are enumerated, not sampled.

A model is a table: what it gives lane i when the lanes M are masked, any number for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import combinations, permutations, product
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from dirl.diffusion.masks import MaskPlan, _quadrature, mask_views
from dirl.diffusion.packing import Views
from dirl.diffusion.trajectory import Trajectory

MASK, BLOCK = 99, 4
Model = Callable[[int, frozenset[int], int], float]  # block, masked lanes, lane


def trajectory_of(prompt_length: int, num_blocks: int = 1) -> Trajectory:
    completion_ids = torch.arange(num_blocks * BLOCK - prompt_length % BLOCK) + 50
    return Trajectory(torch.arange(prompt_length), completion_ids, torch.ones_like(completion_ids), BLOCK)


def random_model(seed: int = 0) -> Model:
    table: dict[tuple[int, frozenset[int], int], float] = {}
    generator = torch.Generator().manual_seed(seed)

    def model(block: int, masked: frozenset[int], lane: int) -> float:
        assert lane in masked
        return table.setdefault((block, masked, lane), float(torch.randn((), generator=generator)))

    return model


def masked_lanes(views: Views) -> list[tuple[int, frozenset[int], float]]:
    """(block, masked lanes, weight of each) of every view."""
    found = []
    for view in range(len(views)):
        lanes = frozenset((views.token_ids_VB[view] == MASK).nonzero().flatten().tolist())
        assert frozenset(views.revealed_VB[view].nonzero().flatten().tolist()) == lanes
        (weight,) = set(views.weight_VB[view].tolist())
        found.append((int(views.block_V[view]), lanes, weight))
    return found


def estimate(views: Views, model: Model) -> float:
    return sum(weight * model(block, lanes, lane) for block, lanes, weight in masked_lanes(views) for lane in lanes)


def mean_over_sets(model: Model, block: int, maskable: Iterable[int], size: int) -> float:
    """Of what the model gives `size` masked lanes together."""
    sets = [frozenset(lanes) for lanes in combinations(maskable, size)]
    return sum(model(block, lanes, lane) for lanes in sets for lane in lanes) / len(sets)


def elbo(model: Model, block: int, maskable: list[int]) -> float:
    return sum(mean_over_sets(model, block, maskable, k) / k for k in range(1, len(maskable) + 1))


def maskable_of(trajectory: Trajectory) -> dict[int, list[int]]:
    steps = trajectory.steps_KB.tolist()
    return {trajectory.first_block + k: [i for i, step in enumerate(row) if step] for k, row in enumerate(steps)}


def expected(plan: MaskPlan, trajectory: Trajectory, model: Model, monkeypatch: pytest.MonkeyPatch) -> float:
    """Mean of the estimate over all draws of levels and sets.

    A draw is an offset, a permutation of levels over blocks and draws, and an order of a block's lanes. The estimate is
    a sum over blocks and draws, so that one order may serve them all, and levels need only come to each place alike.
    """
    num_cells = len(trajectory.steps_KB) * plan.num_masks
    grid = {1: 60, 2: 30, 4: 15}.get(num_cells, 0)  # levels of 1 to 4 tokens change at multiples of 1 / grid only
    if plan.levels in ("gauss", "every"):
        grid = 1  # nothing about levels is random
    offsets = [(i + 0.5) / grid for i in range(grid)]
    orders = [torch.tensor(order) / BLOCK for order in even_permutations()]
    turns = [torch.arange(num_cells).roll(turn) for turn in range(num_cells)]
    values = []
    for offset, turn, order in product(offsets, turns, orders):
        monkeypatch.setattr(torch, "randperm", lambda *_, turn=turn, **__: turn)
        monkeypatch.setattr(torch, "rand", dealt(offset, order))
        values.append(estimate(mask_views(trajectory, MASK, plan, 0), model))
    monkeypatch.undo()
    return sum(values) / len(values)


def even_permutations() -> Iterator[tuple[int, ...]]:
    """Of a block's lanes: half of all orders, among which sets of every size are equally frequent as among all."""
    for order in permutations(range(BLOCK)):
        if sum(first > second for first, second in combinations(order, 2)) % 2 == 0:
            yield order


def dealt(offset: float, order_B: Tensor) -> Callable[..., Tensor]:
    """In place of torch.rand."""

    def rand(*shape: int, **_: object) -> Tensor:
        return torch.tensor([offset], dtype=torch.float64) if shape == (1,) else order_B.expand(shape)

    return rand


@pytest.mark.parametrize("prompt_length", [0, 1, 2, 7])
@pytest.mark.parametrize(
    "plan", [MaskPlan(), MaskPlan(complementary=True), MaskPlan(levels="every"), MaskPlan(num_masks=2)], ids=str
)
def test_the_mean_over_all_draws_is_the_elbo(
    plan: MaskPlan, prompt_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory, model = trajectory_of(prompt_length), random_model()
    ((block, maskable),) = maskable_of(trajectory).items()
    assert len(maskable) == BLOCK - prompt_length % BLOCK
    found = expected(plan, trajectory, model, monkeypatch)
    assert found == pytest.approx(elbo(model, block, maskable), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("complementary", [False, True])
def test_levels_spread_over_blocks_are_unbiased_in_each(complementary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 2 and 4 tokens, each with two draws."""
    trajectory, model = trajectory_of(2, 2), random_model()
    plan = MaskPlan(num_masks=2, complementary=complementary)
    bound = sum(elbo(model, block, lanes) for block, lanes in maskable_of(trajectory).items())
    assert expected(plan, trajectory, model, monkeypatch) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("prompt_length", [0, 1, 3])
@pytest.mark.parametrize("num_masks", [1, 2, 3, 5])
def test_quadrature_draws_sets_of_its_own_levels(
    num_masks: int, prompt_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory, model = trajectory_of(prompt_length), random_model()
    ((block, maskable),) = maskable_of(trajectory).items()
    m, bound = len(maskable), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(num_masks), strict=True):
        k = max(1, int((node + 1) / 2 * m))
        bound += weight / 2 * m / k * mean_over_sets(model, block, maskable, k)
    plan = MaskPlan(num_masks=num_masks, levels="gauss")
    assert expected(plan, trajectory, model, monkeypatch) == pytest.approx(bound, rel=1e-5)


@pytest.mark.parametrize("num_nodes", range(1, 9))
def test_nodes_and_weights_are_those_of_gauss_and_legendre(num_nodes: int) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    found_nodes_N, found_weights_N = _quadrature(num_nodes)
    np.testing.assert_allclose(found_nodes_N.numpy(), (nodes + 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(found_weights_N.numpy(), weights / 2, rtol=1e-6)


def interval_mean(
    plan: MaskPlan, trajectory: Trajectory, model: Model, level: float, monkeypatch: pytest.MonkeyPatch
) -> float:
    """Mean of the estimate over all masks of one block at one level."""
    low, high = plan.interval
    ((_, maskable),) = maskable_of(trajectory).items()
    total = 0.0
    for is_masked in product([True, False], repeat=len(maskable)):
        uniform_B = torch.full((BLOCK,), 0.0)
        uniform_B[maskable] = torch.tensor([0.0 if here else 0.9999999 for here in is_masked])
        cards = iter([torch.full((1, 1), (level - low) / (high - low)), uniform_B[None, None]])
        monkeypatch.setattr(torch, "rand", lambda *_, cards=cards, **__: next(cards))
        chance = prod(level if here else 1 - level for here in is_masked)
        total += chance * estimate(mask_views(trajectory, MASK, plan, 0), model)
    monkeypatch.undo()
    return total


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize("interval", [(0.2, 0.8), (0.0, 1.0), (0.5, 0.9)])
@pytest.mark.parametrize("prompt_length", [0, 1])
def test_intervals_of_levels(
    prompt_length: int, interval: tuple[float, float], complementary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a set of k the mean of t^(k-1) (1-t)^(m-k) over the interval, and for a complement that of 1 - t."""
    trajectory, model = trajectory_of(prompt_length), random_model()
    plan = MaskPlan(levels="interval", interval=interval, complementary=complementary)
    ((block, maskable),) = maskable_of(trajectory).items()
    low, high = interval
    nodes, weights = np.polynomial.legendre.leggauss(BLOCK)  # exact for polynomials of this degree
    levels = low + (high - low) * (nodes + 1) / 2
    found = sum(
        w / 2 * interval_mean(plan, trajectory, model, t, monkeypatch) for t, w in zip(levels, weights, strict=True)
    )
    t, m, bound = Polynomial([0, 1]), len(maskable), 0.0
    for k in range(1, m + 1):
        chance = t ** (k - 1) * (1 - t) ** (m - k)
        if complementary:
            chance = (chance + (1 - t) ** (k - 1) * t ** (m - k)) / 2
        integral = chance.integ()
        total = mean_over_sets(model, block, maskable, k) * len(list(combinations(maskable, k)))
        bound += float(integral(high) - integral(low)) / (high - low) * total
    assert found == pytest.approx(bound, rel=1e-5)
    if interval == (0.0, 1.0):
        assert found == pytest.approx(elbo(model, block, maskable), rel=1e-5)


PLANS = [
    MaskPlan(),
    MaskPlan(num_masks=2, complementary=True),
    MaskPlan(levels="every"),
    MaskPlan(levels="every", full_mask_share=0.25),
    MaskPlan(levels="gauss", num_masks=3),
    MaskPlan(complementary=True, weights="none"),
    MaskPlan(complementary=True, full_mask_share=0.5),
    MaskPlan(full_mask_share=1.0),
]


def counts(block: int, _: frozenset[int], lane: int) -> Any:
    """A model that tells how much each of the first 8 tokens counts."""
    return np.eye(8)[block * BLOCK + lane]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_token_counts_one_in_expectation(plan: MaskPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = expected(plan, trajectory_of(2, 2), counts, monkeypatch)
    np.testing.assert_allclose(found, [0, 0, 1, 1, 1, 1, 1, 1], rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_token_of_a_coupled_pair_counts_one_in_expectation(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = MaskPlan(complementary=True, levels="interval", full_mask_share=share)
    found: Any = interval_mean(plan, trajectory_of(1), counts, 0.3, monkeypatch)
    np.testing.assert_allclose(found, [0, 1, 1, 1, 0, 0, 0, 0], rtol=1e-5)


@pytest.mark.parametrize(("levels", "num_masks", "num_draws"), [("uniform", 2, 2), ("every", 1, BLOCK)])
def test_draws_of_a_block_are_averaged(levels: str, num_masks: int, num_draws: int) -> None:
    """Without weights a token counts 1, by mean 1/k, over the number of draws."""
    for weights, of_token in (("none", lambda k: 1.0), ("mean", lambda k: 1 / k)):
        plan = MaskPlan(num_masks=num_masks, levels=levels, weights=weights)  # type: ignore[arg-type]
        for seed in range(20):
            for _, lanes, weight in masked_lanes(mask_views(trajectory_of(0, 2), MASK, plan, seed)):
                assert weight == pytest.approx(of_token(len(lanes)) / num_draws)


@pytest.mark.parametrize("levels", ["uniform", "interval"])
def test_a_pair_parts_the_tokens_of_a_block(levels: str) -> None:
    """The prompt's are never masked; where one half would mask nothing there is only the other."""
    trajectory, num_alone = trajectory_of(3, 3), 0
    plan = MaskPlan(num_masks=1, complementary=True, levels=levels)  # type: ignore[arg-type]
    for seed in range(50):
        found = masked_lanes(mask_views(trajectory, MASK, plan, seed))
        for block, maskable in maskable_of(trajectory).items():
            parts = [lanes for b, lanes, _ in found if b == block]
            assert sorted(lane for part in parts for lane in part) == maskable
            assert len(parts) <= 2 and all(parts)
            num_alone += len(parts) == 1
    assert num_alone > 0


def test_every_level_comes_once() -> None:
    for seed in range(10):
        found = masked_lanes(mask_views(trajectory_of(2, 2), MASK, MaskPlan(levels="every"), seed))
        assert sorted((block, len(lanes)) for block, lanes, _ in found) == [
            (0, 1),
            (0, 2),
            *((1, k) for k in (1, 2, 3, 4)),
        ]
        assert all(weight == pytest.approx(1 / len(lanes)) for _, lanes, weight in found)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_full_mask_takes_its_share(share: float) -> None:
    trajectory, plan = trajectory_of(2, 3), MaskPlan(num_masks=2, full_mask_share=share)
    without = masked_lanes(mask_views(trajectory, MASK, replace(plan, full_mask_share=0.0), 7))
    full = [(block, frozenset(lanes), share) for block, lanes in maskable_of(trajectory).items()]
    mixed = [(block, lanes, pytest.approx(weight * (1 - share))) for block, lanes, weight in without]
    wanted = {0.0: mixed, 0.5: sorted([*mixed, *full], key=lambda view: view[0]), 1.0: full}[share]
    assert masked_lanes(mask_views(trajectory, MASK, plan, 7)) == wanted


@pytest.mark.parametrize("levels", ["uniform", "interval", "gauss", "every"])
def test_a_seed_decides_all_draws(levels: str) -> None:
    trajectory, plan = trajectory_of(2, 5), MaskPlan(num_masks=2, levels=levels)  # type: ignore[arg-type]
    first, again, other = (masked_lanes(mask_views(trajectory, MASK, plan, seed)) for seed in (1, 1, 2))
    assert first == again and first != other
    views = mask_views(trajectory, MASK, plan, 1)
    assert not views.visited_VB.any() and not views.held_VB.any() and views.importance_V.eq(1).all()
    clean = trajectory.token_ids_KB[views.block_V - trajectory.first_block]
    assert views.target_ids_VB.equal(clean)
    assert torch.where(views.revealed_VB, MASK, clean).equal(views.token_ids_VB)
