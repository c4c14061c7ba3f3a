"""Packed tokens of each preset as its formula has them, P + R + B times its views; budgets that leave some out."""

from __future__ import annotations

import math
import random
from itertools import permutations

import pytest
import torch
from numpy.polynomial import Polynomial

from dirl.config import load_config
from dirl.data.problems import Problem
from dirl.diffusion.packing import DiffusionScheme
from dirl.rl.actions import with_coefficients
from dirl.rl.micro_batches import Layout, pack_groups
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollout_group import Prompt, RolloutGroup
from dirl.rollout.engine import Completion
from dirl.training.distributed import Distributed
from tests.rl.objective_runs import PRESETS

MASK, BLOCK = 99, 4
LAYOUT = Layout(DiffusionScheme(block_length=BLOCK, mask_token_id=MASK), 1 << 30)


def completion_of(prompt: list[int], num_blocks: int, draw: random.Random) -> Completion:
    """Random steps without gaps in each block, and what an engine might have recorded."""
    steps: list[int] = []
    for block in range(num_blocks):
        size = BLOCK - (len(prompt) % BLOCK if block == 0 else 0)
        num_steps = draw.randint(1, size)
        here = [*range(1, num_steps + 1), *(draw.randint(1, num_steps) for _ in range(size - num_steps))]
        draw.shuffle(here)
        steps += here
    return Completion(
        prompt_ids=prompt,
        token_ids=[draw.randrange(50) for _ in steps],
        step_map=steps,
        logprobs=[-draw.expovariate(1.0) for _ in steps],
        completion_length=len(steps),
        finish_reason="stop",
        num_denoising_steps=0,
        text="",
    )


def groups_of(sizes: list[list[int]], prompt_length: int, seed: int = 0) -> list[RolloutGroup]:
    """A group for each list of numbers of blocks."""
    draw, prompt = random.Random(seed), list(range(prompt_length))
    return [
        RolloutGroup(
            prompt=Prompt(Problem("?", "", {}), prompt),
            completions=[completion_of(prompt, size, draw) for size in blocks],
            rewards=[float(i) for i in range(len(blocks))],
            reward_parts={},
            seed=1000 * seed + number,
        )
        for number, blocks in enumerate(sizes)
    ]


def step_counts(completion: Completion) -> list[int]:
    """Denoising steps of each block."""
    steps = [0] * (len(completion.prompt_ids) % BLOCK) + completion.step_map
    return [max(steps[start : start + BLOCK]) for start in range(0, len(steps), BLOCK)]


def expected_replays(completion: Completion, objective: ObjectiveConfig) -> float:
    counts = step_counts(completion)
    total, num_steps = sum(math.ceil(count / objective.shrink) for count in counts), objective.steps_per_completion
    if num_steps == 0 or total <= num_steps:
        return total
    # Drawn by surprisal, one that is expected more than once takes the place of others.
    assert completion.logprobs is not None and objective.step_sampling == "surprisal"
    steps = [0] * (len(completion.prompt_ids) % BLOCK) + completion.step_map
    nats = [0.0] * (len(completion.prompt_ids) % BLOCK) + [-x for x in completion.logprobs]
    shares = [
        0.9 * sum(nats[i] for i in range(k * BLOCK, k * BLOCK + BLOCK) if steps[i] == step) / sum(nats) + 0.1 / total
        for k, count in enumerate(counts)
        for step in range(1, count + 1)
    ]
    return sum(min(1.0, share * num_steps) for share in shares)


def expected_masks(completion: Completion, objective: ObjectiveConfig) -> float:
    first = BLOCK - len(completion.prompt_ids) % BLOCK
    maskable = [first, *[BLOCK] * ((len(completion.token_ids) - first) // BLOCK)]
    if objective.full_mask_share == 1:
        return len(maskable)
    return sum(draws_of(m, objective) + (objective.full_mask_share > 0) for m in maskable)


def draws_of(m: int, objective: ObjectiveConfig) -> float:
    """Views of a block of m tokens; draws that mask nothing are none."""
    if objective.mask_levels == "every":
        return m
    if objective.mask_levels == "interval":
        low, high = objective.mask_level_min, objective.mask_level_max
        t = Polynomial([0, 1])
        some = (1 - (1 - t) ** m + ((1 - t**m) if objective.complementary else 0)).integ()
        return objective.num_masks * float(some(high) - some(low)) / (high - low)
    return objective.num_masks * (2 * m / (m + 1) if objective.complementary else 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_tokens_are_as_many_as_the_formula_says(preset: str) -> None:
    objective = load_config(RLConfig, None, [f"objective={preset}"]).objective
    is_random = objective.complementary or objective.mask_levels == "interval" or objective.steps_per_completion > 0
    sizes = [[2, 5, 6, 3]] * (24 if is_random else 2)
    groups = [*groups_of(sizes, 8, seed=1), *groups_of(sizes, 6, seed=2)]
    found = sum(len(batch.packed) for batch in pack_groups(groups, objective, LAYOUT))
    of_one = expected_replays if objective.views == "replay" else expected_masks
    expected = 0.0
    for group in groups:
        tail = len(group.prompt.token_ids) % BLOCK
        expected += len(group.prompt.token_ids) - tail  # shared by the group
        for completion in group.completions:
            expected += tail + len(completion.token_ids) + BLOCK * of_one(completion, objective)
    assert found == (pytest.approx(expected, rel=0.015) if is_random else expected)


@pytest.mark.parametrize(
    ("preset", "times"),  # tokens of a completion of whole blocks, over its length
    [("wd1", 2), ("diffu_grpo", 2), ("random_mask", 2), ("spg", 3), ("gdpo", 4), ("ebpo", 17), ("espo", 1 + 4 * 4 / 5)],
)
def test_masks_cost_a_multiple_of_the_completion(preset: str, times: float) -> None:
    """P + (1 + n) R; a pair of which one half is empty is one view."""
    objective = load_config(RLConfig, None, [f"objective={preset}"]).objective
    groups = groups_of([[100]] * (8 if objective.complementary else 1), 8)
    found = sum(len(batch.packed) - 8 * len(groups) for batch in pack_groups(groups, objective, LAYOUT))
    assert found / sum(len(group.completions[0].token_ids) for group in groups) == pytest.approx(times, rel=0.01)


def test_a_budget_keeps_each_completion_as_often_and_makes_up_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all orders in which completions may be drawn: whatever their lengths, and for every action."""
    groups, objective = groups_of([[1, 6], [3, 2]], 6), ObjectiveConfig(loss_type="grpo", nll_coef=0.1)

    def coefficients(budget: int) -> dict[int, tuple[float, float]]:
        batches = pack_groups(groups, objective, LAYOUT, tokens_per_update=budget)
        (batch,) = with_coefficients(batches, groups, Distributed(), objective=objective, max_completion_length=24)
        found = {}
        for number in set(batch.completion_T.tolist()):
            mine_T = batch.completion_T == number
            assert mine_T.sum() == len([c for group in groups for c in group.completions][number].token_ids)
            (pair,) = set(zip(batch.coefficient_T[mine_T].tolist(), batch.nll_share_T[mine_T].tolist(), strict=True))
            found[number] = pair
        return found

    whole = coefficients(0)
    (everything,) = pack_groups(groups, objective, LAYOUT)
    assert coefficients(len(everything.packed)) == whole, "they fit"
    budget = len(everything.packed) // 2 + 1
    kept, total = dict.fromkeys(whole, 0), {number: torch.zeros(2) for number in whole}
    orders = list(permutations(range(4)))
    for order in orders:
        monkeypatch.setattr(torch, "randperm", lambda *_, order=order, **__: torch.tensor(order))
        found = coefficients(budget)
        assert len(found) == 2
        for number, pair in found.items():
            kept[number] += 1
            total[number] += torch.tensor(pair)
    assert set(kept.values()) == {len(orders) // 2}
    for number, pair in whole.items():
        torch.testing.assert_close(total[number] / len(orders), torch.tensor(pair))


def test_over_seeds_a_budget_keeps_each_completion_as_often() -> None:
    kept, num_seeds = [0] * 6, 150
    for seed in range(num_seeds):
        (batch,) = pack_groups(
            groups_of([[1, 4, 2], [2, 1, 3]], 4, seed), ObjectiveConfig(), LAYOUT, tokens_per_update=70
        )
        numbers = set(batch.completion_T.tolist())
        assert float(batch.packed.actions.importance_T[0]) == pytest.approx(6 / len(numbers))
        for number in numbers:
            kept[number] += 1
    share = sum(kept) / 6 / num_seeds
    assert 0.2 < share < 0.8
    assert all(abs(count / num_seeds - share) < 4 * math.sqrt(share * (1 - share) / num_seeds) for count in kept)


@pytest.mark.parametrize("budget", [60, 100, 140])
def test_what_a_budget_keeps_fits_it_on_average(budget: int) -> None:
    found = []
    for seed in range(40):
        groups = groups_of([[1, 4, 2], [2, 1, 3]], 4, seed)
        found += [sum(len(b.packed) for b in pack_groups(groups, ObjectiveConfig(), LAYOUT, tokens_per_update=budget))]
    assert budget * 0.6 < sum(found) / len(found) <= budget * 1.05
