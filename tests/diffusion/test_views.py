"""View builders, packing and the one attention rule, against loops over single tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import PackedViews, ViewedDocument, Views, attention_rule, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import noisy_views, placeholder_pack, replay_views
from tests.documents import random_document, random_trajectory

MASK = 99


@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
@pytest.mark.parametrize("prompt_length", [0, 1, 3, 4, 11])
def test_replay_has_one_view_per_step_in_the_state_the_decoder_saw(prompt_length: int, block_length: int) -> None:
    trajectory = random_trajectory(prompt_length, 3, block_length)
    views = replay_views(trajectory, block_length, MASK)
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
    assert int(views.revealed_VB.sum()) == len(trajectory.completion_ids)
    assert (views.target_ids_VB[views.revealed_VB]).sort().values.equal(trajectory.completion_ids.sort().values)


def sft_views(noise: NoiseConfig, levels_K: Tensor, *, unscored: int = 0) -> tuple[Views, Tensor, Tensor]:
    """Views of 6 prompt tokens and 26 of completion, the maskable positions and the clean tokens; (8, 4) each."""
    clean = torch.arange(32)
    blocks = Trajectory(clean[:6], clean[6:], torch.ones(26, dtype=torch.int64)).blocks(4)
    scored_KB = torch.ones(7, 4, dtype=torch.bool)
    if unscored:
        scored_KB.view(-1)[-unscored:] = False
    views = noisy_views(blocks, scored_KB, levels_K, MASK, noise=noise, generator=torch.Generator().manual_seed(0))
    return views, scored_KB & (blocks.steps_KB > 0), blocks.token_ids_KB


def test_sft_masks_only_scored_completion_tokens() -> None:
    views, maskable_KB, clean_KB = sft_views(NoiseConfig(), torch.ones(7), unscored=3)
    assert views.block_V.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert views.revealed_VB.equal(maskable_KB)  # level 1 masks all that may be masked
    assert views.token_ids_VB.equal(torch.where(maskable_KB, MASK, clean_KB))
    assert not views.held_VB.any()


def test_sft_weights_are_those_of_the_block_level() -> None:
    levels_K = torch.linspace(0.2, 0.8, 7)
    views, maskable_KB, clean_KB = sft_views(NoiseConfig(), levels_K)
    assert 0 < int(views.revealed_VB.sum()) < int(maskable_KB.sum())
    assert views.target_ids_VB.equal(clean_KB)
    assert (views.token_ids_VB == MASK).equal(views.revealed_VB)
    for level, weights_B in zip(levels_K.tolist(), views.weight_VB.tolist(), strict=True):
        assert weights_B == pytest.approx([1 / level] * 4)


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
Action = tuple[int, int, bool, float, int, int]  # place, target, is reveal, weight, branch, completion index


def layout(docs: list[ViewedDocument], block_length: int) -> tuple[list[Row], list[Action]]:
    """The pack written down token by token."""
    rows: list[Row] = []
    actions: list[Action] = []
    branch = view = 0
    for index, document in enumerate(docs):
        prompt = document.prompt_ids.tolist()
        trunk = len(prompt) // block_length * block_length
        rows += [(prompt[p], p, index, 0, 0) for p in range(trunk)]
        for one in document.branches:
            branch += 1
            clean = prompt + one.completion_ids.tolist()
            rows += [(clean[p], p, index, branch, 0) for p in range(trunk, len(clean))]
            for v, block in enumerate(one.views.block_V.tolist()):
                view += 1
                for lane in range(block_length):
                    position, is_reveal = block * block_length + lane, bool(one.views.revealed_VB[v, lane])
                    if is_reveal or bool(one.views.held_VB[v, lane]):
                        weight = float(one.views.weight_VB[v, lane]) if is_reveal else 0.0
                        where = (branch - 1, position - len(prompt))
                        actions.append((len(rows), clean[position], is_reveal, weight, *where))
                    rows.append((int(one.views.token_ids_VB[v, lane]), position, index, branch, view))
    return rows, actions


def rows_of(packed: PackedViews) -> list[Row]:
    columns = (packed.token_ids_L, packed.position_L, packed.document_L, packed.branch_L, packed.view_L)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def actions_of(packed: PackedViews) -> list[Action]:
    columns = (
        packed.action_index_T,
        packed.target_T,
        packed.is_reveal_T,
        packed.weight_T,
        packed.branch_T,
        packed.completion_index_T,
    )
    return list(zip(*(c.tolist() for c in columns), strict=True))


@pytest.mark.parametrize("block_length", [2, 4])
def test_pack_against_a_layout_by_hand(block_length: int) -> None:
    docs = documents(block_length)
    packed = pack(docs, block_length)
    rows, actions = layout(docs, block_length)
    assert rows_of(packed) == rows
    assert actions_of(packed) == actions
    assert packed.block_L.tolist() == [position // block_length for _, position, *_ in rows]
    assert packed.view_T.tolist() == [rows[place][-1] for place, *_ in actions]
    assert packed.num_branches == 7
    assert len(packed) == sum(document.packed_length(block_length) for document in docs)


def test_reveals_only_drops_the_holds_and_nothing_else() -> None:
    packed = pack(documents(4), 4)
    reveals = packed.reveals_only()
    assert rows_of(reveals) == rows_of(packed)
    assert actions_of(reveals) == [action for action in actions_of(packed) if action[2]]
    assert len(actions_of(reveals)) < len(actions_of(packed))


def test_branch_length_is_what_a_branch_adds() -> None:
    document = documents(4)[2]
    for branch in document.branches:
        alone = ViewedDocument(document.prompt_ids, [branch])
        assert branch_length(2, branch, 4) == alone.packed_length(4) == len(pack([alone], 4))


def test_attention_rule_pair_by_pair() -> None:
    packed = pack(documents(2)[1:], 2)
    ids = (packed.document_L, packed.branch_L, packed.block_L, packed.view_L)
    found = attention_rule(tuple(i[:, None] for i in ids), tuple(i[None, :] for i in ids)).tolist()
    rows = rows_of(packed)
    for q, (_, q_position, q_document, q_branch, q_view) in enumerate(rows):
        for k, (_, k_position, k_document, k_branch, k_view) in enumerate(rows):
            is_sequence = q_document == k_document and k_branch in (0, q_branch)
            is_context = k_view == 0 and k_position // 2 < q_position // 2
            is_own_block = k_view == q_view and k_position // 2 == q_position // 2
            assert found[q][k] == (is_sequence and (is_context or is_own_block)), (rows[q], rows[k])


def test_placeholder_is_one_fully_masked_block() -> None:
    packed = placeholder_pack(4, MASK)
    assert (len(packed), packed.num_branches) == (8, 1)
    assert packed.token_ids_L[packed.action_index_T].tolist() == [MASK] * 4
    assert packed.is_reveal_T.all()
