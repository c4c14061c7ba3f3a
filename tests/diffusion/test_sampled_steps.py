"""Drawn denoising steps: over all offsets, gone through piece by piece, each step counts one in expectation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

from dirl.diffusion.packing import Views
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import Scored, StepSampling, replay_views, sampled_steps
from dirl.errors import UserError

MASK, BLOCK = 99, 4
# Two blocks, the first with a token of the prompt: 3 and 3 steps.
STEPS = [1, 3, 2, 2, 1, 3, 1]
NATS = [0.1, 2.0, 0.3, 0.0, 1.5, 0.7, 0.2]
SHOWN = [[0], [2], [1], [4, 6], [3], [5]]  # completion tokens of each step, in order


def trajectory(nats: list[float] = NATS) -> Trajectory:
    completion_ids = torch.arange(len(STEPS)) + 50
    logprobs = -torch.tensor(nats)
    return Trajectory(torch.tensor([7]), completion_ids, torch.tensor(STEPS), BLOCK, logprobs)


def shares(sampling: StepSampling, nats: list[float] = NATS) -> list[float]:
    """Probability of each step at one draw."""
    if sampling == "uniform":
        return [1 / len(SHOWN)] * len(SHOWN)
    return [0.9 * sum(nats[i] for i in shown) / sum(nats) + 0.1 / len(SHOWN) for shown in SHOWN]


def offsets(expected: list[float]) -> Iterator[tuple[float, float]]:
    """(an offset, the probability of those that draw the same steps)."""
    borders = sorted({0.0, 1.0, *(end % 1 for end in accumulate(expected))})
    yield from (((low + high) / 2, high - low) for low, high in pairwise(borders) if high - low > 1e-9)


def importance(views: Views, drawn: Views) -> list[float]:
    """Of every view; 0 where it was not drawn."""
    kept = {
        (int(block), tuple(ids)): float(x)
        for block, ids, x in zip(drawn.block_V, drawn.token_ids_VB.tolist(), drawn.importance_V, strict=True)
    }
    assert len(kept) == len(drawn)
    keys = zip(views.block_V.tolist(), map(tuple, views.token_ids_VB.tolist()), strict=True)
    return [kept.get(key, 0.0) for key in keys]


@pytest.mark.parametrize("score", ["revealed", "masked"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5])
@pytest.mark.parametrize("sampling", ["uniform", "surprisal"])
def test_every_step_counts_one_in_expectation(
    sampling: StepSampling, num_steps: int, score: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    views = replay_views(trajectory(), MASK, score=score)
    expected = [share * num_steps for share in shares(sampling)]
    assert len(views) == len(expected)
    total, num_drawn = torch.zeros(len(views), dtype=torch.float64), 0.0
    for offset, chance in offsets(expected):
        monkeypatch.setattr(torch, "rand", lambda *_, x=offset, **__: torch.tensor([x], dtype=torch.float64))
        found = importance(views, sampled_steps(views, trajectory(), num_steps, sampling, 0))
        counts = [x * often for x, often in zip(found, expected, strict=True)]
        assert counts == pytest.approx([round(count) for count in counts], abs=1e-5)
        assert sum(counts) == pytest.approx(num_steps)
        for count, often in zip(counts, expected, strict=True):
            assert math.floor(often) - 1e-5 <= count <= math.ceil(often) + 1e-5, "at even distances"
        total += chance * torch.tensor(found, dtype=torch.float64)
        num_drawn += chance
    assert num_drawn == pytest.approx(1.0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-5, atol=1e-5)


def test_a_step_that_is_all_the_surprise_counts_as_often_as_it_is_drawn() -> None:
    nats = [0.0, 5.0, *[0.0] * 5]
    views = replay_views(trajectory(nats), MASK)
    expected = [share * 4 for share in shares("surprisal", nats)]
    assert max(expected) > 3
    for seed in range(30):
        found = importance(views, sampled_steps(views, trajectory(nats), 4, "surprisal", seed))
        counts = [x * often for x, often in zip(found, expected, strict=True)]
        assert sum(counts) == pytest.approx(4) and max(counts) == counts[2] >= 3 - 1e-5


def test_what_is_drawn_does_not_depend_on_what_is_scored() -> None:
    plain, masked = (replay_views(trajectory(), MASK, score=score) for score in ("revealed", "masked"))
    for seed in range(30):
        one, other = (sampled_steps(views, trajectory(), 2, "surprisal", seed) for views in (plain, masked))
        assert one.token_ids_VB.equal(other.token_ids_VB) and one.importance_V.equal(other.importance_V)


def test_a_seed_decides_what_is_drawn() -> None:
    views = replay_views(trajectory(), MASK)
    found = [importance(views, sampled_steps(views, trajectory(), 2, "uniform", seed)) for seed in (1, 1, 2, 3, 4)]
    assert found[0] == found[1] and any(other != found[0] for other in found[2:])


@pytest.mark.parametrize("num_steps", [6, 9])
def test_no_more_steps_are_drawn_than_there_are(num_steps: int) -> None:
    views = replay_views(trajectory(), MASK)
    assert sampled_steps(views, trajectory(), num_steps, "surprisal", 0) is views


@pytest.mark.parametrize("logprobs", [None, torch.tensor([math.nan] * 7)])
def test_surprisal_needs_what_the_engine_recorded(logprobs: torch.Tensor | None) -> None:
    views = replay_views(trajectory(), MASK)
    with pytest.raises(UserError, match=r"step_sampling=surprisal: the engine recorded no .*; use uniform"):
        sampled_steps(views, replace(trajectory(), logprobs=logprobs), 2, "surprisal", 0)


@pytest.mark.parametrize("score", ["revealed", "masked"])
def test_scored_weights_add_up_to_the_length(score: Scored) -> None:
    """With all that is masked scored, each step counts as much as any other."""
    views = replay_views(trajectory(), MASK, score=score)
    weight_V = (views.weight_VB * views.revealed_VB).sum(dim=1)
    assert float(weight_V.sum()) == pytest.approx(len(STEPS))
    if score == "masked":
        torch.testing.assert_close(weight_V, torch.full_like(weight_V, len(STEPS) / 6))
        assert views.revealed_VB.equal(views.token_ids_VB == MASK) and not views.held_VB.any()
