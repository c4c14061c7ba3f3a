"""Some denoising steps in place of all, each weighted by how often it would be drawn: the same expected gradient.

Every path of an enumerable model, and every set of steps that may be drawn of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.packing import DiffusionScheme, PackedViews
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import StepSampling, placeholder_pack, replay_views, sampled_steps
from dirl.model.logprobs import ActionScores
from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.policy_loss import policy_loss
from tests.documents import action_table
from tests.parity.test_enumeration import MASK, RULES, Path, Table, after, probability

SCHEME = DiffusionScheme(block_length=1, mask_token_id=0)


def trajectory_of(table: Table, path: Path) -> Trajectory:
    steps, nats = torch.zeros(table.length, dtype=torch.int64), torch.zeros(table.length)
    done = [0] * table.num_blocks
    for outcome in path:
        block = outcome.tokens[0][0] // table.block_length
        done[block] += 1
        for lane, _ in outcome.tokens:
            steps[lane] = done[block]
            nats[lane] = -outcome.probability.detach().log() / len(outcome.tokens)
    return Trajectory(
        torch.tensor([], dtype=torch.int64), torch.tensor(after(path[-1])), steps, table.block_length, -nats
    )


def drawn(
    table: Table, path: Path, num_steps: int, sampling: StepSampling, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[float, Tensor]]:
    """(chance, importance of each step) of everything that may be drawn of a path."""
    trajectory = trajectory_of(table, path)
    views = replay_views(trajectory, 99)
    assert len(views) == len(path)
    keys = [(int(b), tuple(ids)) for b, ids in zip(views.block_V, views.token_ids_VB.tolist(), strict=True)]

    def at(offset: float) -> Tensor:
        monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([offset], dtype=torch.float64))
        found = sampled_steps(views, trajectory, num_steps, sampling, 0)
        importance = torch.zeros(len(views), dtype=torch.float64)
        for block, ids, x in zip(found.block_V, found.token_ids_VB.tolist(), found.importance_V, strict=True):
            importance[keys.index((int(block), tuple(ids)))] = float(x)
        return importance

    shares = torch.full((len(path),), 1 / len(path), dtype=torch.float64)
    if sampling == "surprisal":
        nats = torch.stack([-outcome.probability.detach().log() for outcome in path])
        shares = 0.9 * nats / nats.sum() + 0.1 * shares
    borders = sorted({0.0, 1.0, *(end % 1 for end in accumulate((shares * num_steps).tolist()))})
    for low, high in pairwise(borders):
        if high - low > 1e-6:
            yield high - low, at((low + high) / 2)


def gradient(table: Table, paths: list[Path], advantages: list[float], importances: list[Tensor]) -> Tensor:
    """Of the package's loss on policy, with every path as often as its probability says."""
    scores = {id(outcome): table.scores(outcome, "reveal") for path in paths for outcome in path}
    logprobs = [torch.cat([scores[id(outcome)] for outcome in path]) for path in paths]
    importance_T = torch.cat(
        [
            importance.repeat_interleave(torch.tensor([len(outcome.tokens) for outcome in path]))
            for path, importance in zip(paths, importances, strict=True)
        ]
    )
    path_T = torch.arange(len(paths)).repeat_interleave(torch.tensor([len(actions) for actions in logprobs]))
    with torch.no_grad():
        probability_T = torch.stack([probability(path) for path in paths])[path_T]
    logprob_T = torch.cat(logprobs)
    actions = action_table(torch.zeros_like(path_T), torch.ones_like(path_T, dtype=torch.bool), path_T)
    batch = replace(
        PolicyBatch.blank(PackedViews(placeholder_pack(SCHEME).tokens, actions)),
        advantage_T=torch.tensor(advantages, dtype=torch.float64)[path_T],
        coefficient_T=probability_T * importance_T,
    )
    loss = policy_loss(ActionScores(logprob_T, torch.zeros_like(probability_T)), batch, ObjectiveConfig())
    return torch.autograd.grad(loss.value, table.logits)[0]


@pytest.mark.parametrize("num_steps", [1, 2])
@pytest.mark.parametrize("sampling", ["uniform", "surprisal"])
@pytest.mark.parametrize("rule", ["dynamic", "random"])
def test_the_expected_gradient_is_that_of_all_steps(
    rule: str, sampling: StepSampling, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = Table(1, 3, 3, RULES[rule], TokenDistribution(), seed=2)
    paths = list(table.paths((MASK,) * table.length))
    advantages = torch.randn(len(paths), generator=torch.Generator().manual_seed(3)).tolist()
    every = [torch.ones(len(path), dtype=torch.float64) for path in paths]
    mean, num_sets = [torch.zeros_like(one) for one in every], 0
    for number, path in enumerate(paths):
        for chance, importance in drawn(table, path, num_steps, sampling, monkeypatch):
            mean[number] += chance * importance  # the loss is linear in it
            num_sets += 1
    assert num_sets > len(paths)
    expected, found = (gradient(table, paths, advantages, importances) for importances in (every, mean))
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())
