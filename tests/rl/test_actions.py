"""Groups -> packs: every action gets its own completion's advantage, coefficient and recorded logprob."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from dirl.data.problems import Problem
from dirl.diffusion.likelihood import Likelihood
from dirl.diffusion.packing import DiffusionScheme
from dirl.rl.actions import PolicyBatch, with_advantages, with_coefficients
from dirl.rl.micro_batches import Layout, pack_groups
from dirl.rl.objective import LossType, ObjectiveConfig
from dirl.rl.rollout_group import Prompt, RolloutGroup
from dirl.rollout.engine import Completion
from dirl.training.distributed import Distributed

MASK, BLOCK = 99, 4


def make_completion(number: int, prompt: list[int], num_blocks: int) -> Completion:
    """Token ids and logprobs tell the completion and the place; two tokens a step."""
    length = num_blocks * BLOCK - len(prompt) % BLOCK
    first = len(prompt) % BLOCK
    return Completion(
        prompt_ids=prompt,
        token_ids=[number * 100 + i for i in range(length)],
        step_map=[
            1 + (lane - (first if i < BLOCK - first else 0)) // 2
            for i in range(length)
            for lane in [(first + i) % BLOCK]
        ],
        logprobs=[-(number + i / 100) for i in range(length)],
        completion_length=length,
        finish_reason="length",
        num_denoising_steps=2 * num_blocks,
        text="",
    )


def make_groups() -> list[RolloutGroup]:
    groups = []
    for index, (prompt_length, sizes) in enumerate([(3, (1, 4)), (4, (2, 2)), (6, (3, 1))]):
        prompt = list(range(1000, 1000 + prompt_length))
        completions = [make_completion(2 * index + i + 1, prompt, size) for i, size in enumerate(sizes)]
        groups.append(
            RolloutGroup(
                prompt=Prompt(Problem("?", "", {}), prompt),
                completions=completions,
                rewards=[0.0, 1.0],
                reward_parts={},
                number=index,
                sampled_at=10 + index,
            )
        )
    return groups


def batches(objective: ObjectiveConfig, budget: int) -> list[PolicyBatch]:
    groups = make_groups()
    advantages = [torch.tensor([2.0 * i + 1, 2.0 * i + 2]) for i in range(len(groups))]
    packs = pack_groups(groups, objective, Layout(DiffusionScheme(block_length=BLOCK, mask_token_id=MASK), budget))
    packs = with_coefficients(packs, groups, Distributed(), objective=objective, max_completion_length=16)
    return with_advantages(packs, advantages)


@pytest.mark.parametrize("budget", [60, 4096])
@pytest.mark.parametrize("likelihood", get_args(Likelihood))
@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_actions_belong_to_their_completions(loss_type: LossType, likelihood: Likelihood, budget: int) -> None:
    completions = [completion for group in make_groups() for completion in group.completions]
    lengths = [len(completion.token_ids) for completion in completions]
    expected = {
        "dapo": [1 / sum(lengths)] * 6,
        "bnpo": [1 / sum(lengths)] * 6,
        "dr_grpo": [1 / (16 * 6)] * 6,
        "grpo": [1 / (6 * length) for length in lengths],
        "luspo": [1 / 6] * 6,
    }[loss_type]
    packs = batches(ObjectiveConfig(loss_type=loss_type, likelihood=likelihood), budget)
    assert len(packs) > 1 if budget == 60 else len(packs) == 1
    seen: list[int] = []
    for batch in packs:
        assert len(batch.packed) <= budget
        rows = zip(
            batch.packed.actions.target_T.tolist(),
            batch.packed.actions.is_reveal_T.tolist(),
            batch.advantage_T.tolist(),
            batch.coefficient_T.tolist(),
            batch.engine_logprob_T.tolist(),
            batch.completion_T.tolist(),
            batch.sampled_at_T.tolist(),
            strict=True,
        )
        assert batch.behavior_logprob_T.isnan().all() and batch.ref_logprob_T.isnan().all()
        for target, is_reveal, advantage, coefficient, recorded, completion, sampled_at in rows:
            number, place = divmod(target, 100)
            assert (advantage, completion, sampled_at) == (number, number - 1, 10 + (number - 1) // 2)
            assert coefficient == pytest.approx(expected[number - 1])
            if is_reveal:
                assert recorded == pytest.approx(-(number + place / 100))
                seen.append(target)
            else:
                assert likelihood == "trajectory"
                assert recorded != recorded
    assert sorted(seen) == sorted(token for completion in completions for token in completion.token_ids)


def test_merged_steps_know_the_engine_at_their_first_step_only() -> None:
    """The others of its tokens were drawn in states that are not scored."""
    (batch,) = batches(ObjectiveConfig(shrink=2), 4096)
    actions = batch.packed.actions
    steps = {
        c.token_ids[i]: c.step_map[i] for g in make_groups() for c in g.completions for i in range(len(c.token_ids))
    }
    for target, recorded in zip(actions.target_T.tolist(), batch.engine_logprob_T.tolist(), strict=True):
        assert (recorded == recorded) == (steps[target] % 2 == 1)
    assert actions.is_visited_T.sum() < len(actions)
    assert len(batch.packed) < len(batches(ObjectiveConfig(), 4096)[0].packed)


@pytest.mark.parametrize("likelihood", get_args(Likelihood))
def test_a_completion_over_the_budget_lies_in_several_micro_batches(likelihood: Likelihood) -> None:
    """Every action once, in its own state: the same table as unsplit, and blocks stay whole."""
    objective = ObjectiveConfig(likelihood=likelihood)
    (whole,), parts = batches(objective, 4096), batches(objective, 30)
    assert any(batch.is_split for batch in parts)

    def rows_of(batch: PolicyBatch) -> dict[tuple[int, int], tuple[object, ...]]:
        actions = batch.packed.actions
        columns = (
            *(batch.step_T, batch.length_T, batch.num_covered_T, batch.advantage_T, batch.coefficient_T),
            *(actions.target_T, actions.is_reveal_T, actions.block_T, actions.completion_index_T),
        )
        keys = zip(batch.completion_T.tolist(), batch.row_T.tolist(), strict=True)
        return dict(zip(keys, zip(*(column.tolist() for column in columns), strict=True), strict=True))

    found: dict[tuple[int, int], tuple[object, ...]] = {}
    for batch in parts:
        assert len(batch.packed) <= 30
        assert not found.keys() & rows_of(batch).keys()
        found |= rows_of(batch)
    assert found == rows_of(whole)


def test_a_block_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch is 10"):
        batches(ObjectiveConfig(), 10)
