"""View builders, packing and the one attention rule, against loops over single tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import DiffusionScheme, PackedViews, ViewedDocument, Views, attention_rule, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import noisy_views, placeholder_pack, replay_views
from tests.documents import random_document, random_trajectory

MASK = 99


@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
@pytest.mark.parametrize("prompt_length", [0, 1, 3, 4, 11])
def test_replay_has_one_view_per_step_in_the_state_the_decoder_saw(prompt_length: int, block_length: int) -> None:
    trajectory = random_trajectory(prompt_length, 3, block_length)
    views = replay_views(trajectory, MASK)
    clean = trajectory.prompt_ids.tolist() + trajectory.completion_ids.tolist()
    steps = [0] * prompt_length + trajectory.step_map.tolist()
    expected = []
    for block in range(prompt_length // block_length, len(clean) // block_length):
        here = range(block * block_length, (block + 1) * block_length)
        for step in range(1, max(steps[p] for p in here) + 1):
            noisy = [clean[p] if steps[p] < step else MASK for p in here]
            expected.append((block, noisy, [steps[p] == step for p in here], [steps[p] > step for p in here]))
    found = [x.tolist() for x in (views.block_V, views.token_ids_VB, views.revealed_VB, views.held_VB)]
    assert list(zip(*found, strict=True)) == expected
    assert views.visited_VB.equal(views.revealed_VB | views.held_VB)
    assert int(views.revealed_VB.sum()) == len(trajectory.completion_ids)
    assert (views.target_ids_VB[views.revealed_VB]).sort().values.equal(trajectory.completion_ids.sort().values)


State = tuple[int, list[int], list[bool], list[bool], list[bool]]  # block; then noisy, revealed, held, visited by lane


def merged_states(trajectory: Trajectory, shrink: int) -> list[State]:
    """The states that are scored when `shrink` neighbouring steps are merged, token by token."""
    block_length, prompt_length = trajectory.block_length, len(trajectory.prompt_ids)
    clean = trajectory.prompt_ids.tolist() + trajectory.completion_ids.tolist()
    steps = [0] * prompt_length + trajectory.step_map.tolist()
    states: list[State] = []
    for block in range(prompt_length // block_length, len(clean) // block_length):
        here = range(block * block_length, (block + 1) * block_length)
        for first in range(1, max(steps[p] for p in here) + 1, shrink):
            noisy, revealed, held, visited = [], [], [], []
            for p in here:
                is_masked = steps[p] >= first  # as before the first of the merged steps
                noisy.append(MASK if is_masked else clean[p])
                revealed.append(is_masked and steps[p] < first + shrink)
                held.append(is_masked and not revealed[-1])
                # In this very state the decoder took the first step: its tokens were revealed, those of the other
                # merged steps held, which is not what is scored here; later ones were held, as they are here.
                visited.append(steps[p] == first or held[-1])
            states.append((block, noisy, revealed, held, visited))
    return states


@pytest.mark.parametrize("shrink", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
@pytest.mark.parametrize("prompt_length", [0, 1, 3, 4, 11])
def test_merged_steps_are_scored_in_the_state_before_the_first(
    prompt_length: int, block_length: int, shrink: int
) -> None:
    trajectory = random_trajectory(prompt_length, 5, block_length)
    views = replay_views(trajectory, MASK, shrink=shrink)
    columns = (views.block_V, views.token_ids_VB, views.revealed_VB, views.held_VB, views.visited_VB)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == merged_states(trajectory, shrink)
    assert views.target_ids_VB.equal(trajectory.token_ids_KB[views.block_V - trajectory.first_block])
    assert int(views.revealed_VB.sum()) == len(trajectory.completion_ids)  # each token once, whatever is merged
    assert (views.weight_VB == 1).all()


def test_merging_all_steps_leaves_one_fully_masked_view_a_block() -> None:
    trajectory = random_trajectory(5, 4, 4)
    views = replay_views(trajectory, MASK, shrink=4)
    assert views.block_V.tolist() == [1, 2, 3, 4]
    assert views.token_ids_VB.equal(torch.where(trajectory.steps_KB > 0, MASK, trajectory.token_ids_KB))
    assert views.visited_VB.equal(trajectory.steps_KB == 1) and not views.held_VB.any()


def sft_views(noise: NoiseConfig, levels_K: Tensor, *, unscored: int = 0) -> tuple[Views, Tensor, Tensor]:
    """Views of 6 prompt tokens and 26 of completion, the maskable positions and the clean tokens; (8, 4) each."""
    clean = torch.arange(32)
    trajectory = Trajectory(clean[:6], clean[6:], torch.ones(26, dtype=torch.int64), 4)
    scored_KB = torch.ones(7, 4, dtype=torch.bool)
    if unscored:
        scored_KB.view(-1)[-unscored:] = False
    generator = torch.Generator().manual_seed(0)
    views = noisy_views(trajectory, scored_KB, levels_K, MASK, noise=noise, generator=generator)
    return views, scored_KB & (trajectory.steps_KB > 0), trajectory.token_ids_KB


def test_sft_masks_only_scored_completion_tokens() -> None:
    views, maskable_KB, clean_KB = sft_views(NoiseConfig(), torch.ones(7), unscored=3)
    assert views.block_V.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert views.revealed_VB.equal(maskable_KB)  # level 1 masks all that may be masked
    assert views.token_ids_VB.equal(torch.where(maskable_KB, MASK, clean_KB))
    assert not views.held_VB.any() and not views.visited_VB.any()  # no decoder was in these states


def test_sft_weights_are_those_of_the_block_level() -> None:
    levels_K = torch.linspace(0.2, 0.8, 7)
    views, maskable_KB, clean_KB = sft_views(NoiseConfig(), levels_K)
    assert 0 < int(views.revealed_VB.sum()) < int(maskable_KB.sum())
    assert views.target_ids_VB.equal(clean_KB)
    assert (views.token_ids_VB == MASK).equal(views.revealed_VB)
    for level, weights in zip(levels_K.tolist(), views.weight_VB.tolist(), strict=True):
        assert weights == pytest.approx([1 / level] * 4)


def test_complementary_views_supervise_every_token_once_with_a_mean_weight_of_one() -> None:
    noise, levels_K = NoiseConfig(complementary=True, min_noise=0.01), torch.tensor([0.25, 0.5, 0.75, 0.3, 0.6, 0.9, 1])
    views, maskable_KB, _ = sft_views(noise, levels_K)
    pair_K2B = views.revealed_VB.unflatten(0, (-1, 2))
    assert views.block_V.tolist() == [block for block in range(1, 8) for _ in range(2)]
    assert (pair_K2B.sum(1) == maskable_KB).all()
    for index, level in enumerate(levels_K.tolist()):
        first, second = views.weight_VB.unflatten(0, (-1, 2))[index, :, 0].tolist()
        assert first == pytest.approx(0.5 / level)
        assert second == pytest.approx(0.5 / max(1 - level, 0.01))


def documents(block_length: int) -> list[ViewedDocument]:
    """Prompts of 5, 0, 2 and 8 tokens with 1, 1, 3 and 2 completions."""
    return [random_document(*shape, block_length, MASK) for shape in ((5, [2]), (0, [3]), (2, [1, 3, 2]), (8, [2, 1]))]


Row = tuple[int, int, int, int, int]  # token, position, document, branch (0: trunk), view (0: clean)
# Place, target, is reveal, is visited, weight, view, block, branch, completion index.
Action = tuple[int, int, bool, bool, float, int, int, int, int]


def layout(docs: list[ViewedDocument], block_length: int) -> tuple[list[Row], list[Action]]:
    """The pack written down token by token."""
    rows: list[Row] = []
    actions: list[Action] = []
    branch = view = 0
    for index, document in enumerate(docs):
        prompt = document.prompt_ids.tolist()
        trunk = len(prompt) // block_length * block_length
        rows += [(prompt[p], p, index, 0, 0) for p in range(trunk)]
        for views in document.branches:
            branch += 1
            clean = prompt + views.completion_ids.tolist()
            rows += [(clean[p], p, index, branch, 0) for p in range(trunk, len(clean))]
            for v, block in enumerate(views.block_V.tolist()):
                view += 1
                for lane in range(block_length):
                    position, is_reveal = block * block_length + lane, bool(views.revealed_VB[v, lane])
                    if is_reveal or bool(views.held_VB[v, lane]):
                        is_visited = bool(views.visited_VB[v, lane])
                        weight = float(views.weight_VB[v, lane]) if is_reveal else 0.0
                        where = (view, block, branch - 1, position - len(prompt))
                        actions.append((len(rows), clean[position], is_reveal, is_visited, weight, *where))
                    rows.append((int(views.token_ids_VB[v, lane]), position, index, branch, view))
    return rows, actions


def rows_of(packed: PackedViews) -> list[Row]:
    tokens = packed.tokens
    columns = (tokens.token_ids_L, tokens.position_L, tokens.document_L, tokens.branch_L, tokens.view_L)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def actions_of(packed: PackedViews) -> list[Action]:
    actions = packed.actions
    columns = (
        actions.index_T,
        actions.target_T,
        actions.is_reveal_T,
        actions.is_visited_T,
        actions.weight_T,
        actions.view_T,
        actions.block_T,
        actions.branch_T,
        actions.completion_index_T,
    )
    assert bool((actions.importance_T == 1).all())
    assert len(columns) + 3 == len(actions.columns())  # the threshold and the record have tests of their own
    return list(zip(*(c.tolist() for c in columns), strict=True))


def view_ends_of(actions: list[Action]) -> tuple[int, ...]:
    """After which actions another view begins, or the table ends."""
    views = [action[5] for action in actions]
    return tuple(i + 1 for i, view in enumerate(views) if i + 1 == len(views) or views[i + 1] != view)


@pytest.mark.parametrize("block_length", [2, 4])
def test_pack_against_a_layout_by_hand(block_length: int) -> None:
    docs = documents(block_length)
    packed = pack(docs, block_length)
    rows, actions = layout(docs, block_length)
    assert rows_of(packed) == rows
    assert actions_of(packed) == actions
    assert packed.tokens.block_L.tolist() == [position // block_length for _, position, *_ in rows]
    assert packed.actions.view_T.tolist() == [rows[place][-1] for place, *_ in actions]
    assert packed.actions.branch_T.unique().tolist() == list(range(7))
    assert packed.actions.has_holds and packed.actions.view_ends == view_ends_of(actions)
    assert len(packed) == len(packed.tokens) == sum(document.packed_length(block_length) for document in docs)


def test_reveals_only_drops_the_holds_and_nothing_else() -> None:
    packed = pack(documents(4), 4)
    reveals = packed.reveals_only()
    assert rows_of(reveals) == rows_of(packed)
    assert actions_of(reveals) == [action for action in actions_of(packed) if action[2]]
    assert len(actions_of(reveals)) < len(actions_of(packed))
    assert not reveals.actions.has_holds and reveals.actions.view_ends == view_ends_of(actions_of(reveals))


def test_actions_know_the_threshold_of_their_completion() -> None:
    own = [0.5, math.nan, 0.75]
    trajectories = [replace(random_trajectory(5, 3, 4), confidence_threshold=threshold) for threshold in own]
    prompt_ids = trajectories[0].prompt_ids
    branches = [replay_views(replace(t, prompt_ids=prompt_ids), MASK) for t in trajectories]
    packed = pack([ViewedDocument(prompt_ids, branches)], 4)
    for actions in (packed.actions, packed.reveals_only().actions, packed.actions.rows(slice(3, None))):
        expected = [own[branch] for branch in actions.branch_T.tolist()]
        assert actions.threshold_T.tolist() == pytest.approx(expected, nan_ok=True)


def test_packed_length_of_views_is_what_they_add() -> None:
    document = documents(4)[2]
    for views in document.branches:
        alone = ViewedDocument(document.prompt_ids, [views])
        assert views.packed_length(2, 4) == alone.packed_length(4) == len(pack([alone], 4))


def test_attention_rule_pair_by_pair() -> None:
    packed = pack(documents(2)[1:], 2)
    ids = packed.tokens.ids
    found = attention_rule(tuple(i[:, None] for i in ids), tuple(i[None, :] for i in ids)).tolist()
    rows = rows_of(packed)
    for q, (_, q_position, q_document, q_branch, q_view) in enumerate(rows):
        for k, (_, k_position, k_document, k_branch, k_view) in enumerate(rows):
            is_sequence = q_document == k_document and k_branch in (0, q_branch)
            is_context = k_view == 0 and k_position // 2 < q_position // 2
            is_own_block = k_view == q_view and k_position // 2 == q_position // 2
            assert found[q][k] == (is_sequence and (is_context or is_own_block)), (rows[q], rows[k])


def test_placeholder_is_one_fully_masked_block() -> None:
    packed = placeholder_pack(DiffusionScheme(block_length=4, mask_token_id=MASK))
    assert (len(packed), packed.actions.branch_T.tolist()) == (8, [0] * 4)
    assert packed.tokens.token_ids_L[packed.actions.index_T].tolist() == [MASK] * 4
    assert packed.actions.is_reveal_T.all()


def recorded_trajectory(**changes: Any) -> Trajectory:
    """Two blocks of 4, the first begins with the prompt: reveals 10 to 15, holds 20 to 23 in the order of decoding."""
    ids_R, steps_R = torch.arange(6), torch.tensor([2, 1, 1, 3, 2, 1])
    record = {"logprobs": -torch.arange(10.0, 16.0), "hold_logprobs": -torch.arange(20.0, 24.0)}
    return Trajectory(torch.arange(2), ids_R, steps_R, 4, **{**record, **changes})


def recorded_of(views: Views) -> list[tuple[bool, int, float | None]]:
    """Reveal or hold, its token, and what the engine recorded of it."""
    actions = pack([ViewedDocument(torch.arange(2), [views])], 4).actions
    columns = actions.is_reveal_T, actions.completion_index_T, -actions.engine_logprob_T
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(is_reveal, index, None if math.isnan(value) else value) for is_reveal, index, value in rows]


def test_what_the_engine_recorded_stands_at_its_actions() -> None:
    steps = [
        [(False, 0, 20), (True, 1, 11)],
        [(True, 0, 10)],
        [(True, 2, 12), (False, 3, 21), (False, 4, 22), (True, 5, 15)],
        [(False, 3, 23), (True, 4, 14)],
        [(True, 3, 13)],
    ]
    every, views = [action for step in steps for action in step], replay_views(recorded_trajectory(), 99)
    assert recorded_of(views) == every
    assert recorded_of(views.rows(torch.tensor([False, False, True, False, True]))) == steps[2] + steps[4]
    unrecorded = replay_views(recorded_trajectory(hold_logprobs=None), 99)
    assert recorded_of(unrecorded) == [(kind, i, value if kind else None) for kind, i, value in every]
    # In a state that the decoder did not visit, and of a hold that is scored as a token, it recorded nothing.
    merged = {i: value for kind, i, value in recorded_of(replay_views(recorded_trajectory(), 99, shrink=2)) if kind}
    assert merged == {0: None, 1: 11, 2: 12, 3: 13, 4: None, 5: 15}
    masked = recorded_of(replay_views(recorded_trajectory(), 99, score="masked"))
    assert masked == [(True, i, value if kind else None) for kind, i, value in every]


def test_a_record_of_other_holds_is_an_error() -> None:
    with pytest.raises(ValueError, match="one for each of 4 holds, got 3"):
        replay_views(recorded_trajectory(hold_logprobs=torch.zeros(3)), 99)
