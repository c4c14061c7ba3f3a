"""Documents -> noisy views: what is scored, and that noise depends on seed and place only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dirl.data.conversations import Document
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import DiffusionScheme
from dirl.sft.batch import batch_noise_levels, make_example, pack_micro_batches, packed_tokens, view_document

MASK, FILL, BLOCK = 99, 98, 4
SCHEME = DiffusionScheme(block_length=BLOCK, mask_token_id=MASK)


@pytest.mark.parametrize("prompt_length", range(1, 6))
@pytest.mark.parametrize("score_fill", [True, False])
def test_the_last_block_is_filled_and_scored_on_request(prompt_length: int, score_fill: bool) -> None:
    document = Document(list(range(prompt_length)), list(range(50, 57)))
    example = make_example(document, SCHEME, FILL, score_fill=score_fill)
    num_fill = -(prompt_length + 7) % BLOCK
    assert example.trajectory.completion_ids.tolist() == document.completion_ids + [FILL] * num_fill
    assert example.num_scored == 7 + num_fill * score_fill
    scored = example.trajectory.token_ids_KB[example.scored_KB].tolist()
    assert scored == document.completion_ids + [FILL] * num_fill * score_fill


@pytest.mark.parametrize(("num_tokens", "num_fill"), [(7, 3), (10, 0), (11, 9)])
def test_under_full_attention_windows_are_filled(num_tokens: int, num_fill: int) -> None:
    """From the end of the prompt on, whatever its length."""
    document = Document([1, 2, 3], list(range(num_tokens)))
    example = make_example(document, replace(SCHEME, block_length=0), FILL, score_fill=True, window=10)
    assert example.trajectory.completion_ids.tolist() == document.completion_ids + [FILL] * num_fill
    assert example.scored_KB.tolist() == [[False] * 3 + [True] * (num_tokens + num_fill)]


def test_unscored_fill_is_never_masked() -> None:
    example = make_example(Document([1, 2], [50, 51, 52]), SCHEME, FILL, score_fill=False)
    for seed in range(20):
        views = view_document(example, torch.ones(2), MASK, noise=NoiseConfig(), seed=seed).branches[0]
        assert views.token_ids_VB.tolist() == [[1, 2, MASK, MASK], [MASK, FILL, FILL, FILL]]


def test_complementary_pairs_score_every_token_once() -> None:
    noise = NoiseConfig(complementary=True)
    examples = [
        make_example(Document([1] * n, list(range(50, 61))), SCHEME, FILL, score_fill=True) for n in range(1, 6)
    ]
    for seed, (example, levels_K) in enumerate(zip(examples, batch_noise_levels(examples, noise, 3), strict=True)):
        document = view_document(example, levels_K, MASK, noise=noise, seed=seed)
        (packed,) = pack_micro_batches([document], SCHEME, lambda lengths: [list(range(len(lengths)))])
        assert sorted(packed.actions.completion_index_T.tolist()) == list(range(example.num_scored))


@pytest.mark.parametrize("noise_level", ["block", "sequence"])
def test_noise_levels_depend_on_the_seed_and_spread_over_the_batch(noise_level: str) -> None:
    noise = NoiseConfig(noise_level=noise_level)  # type: ignore[arg-type]
    examples = [make_example(Document([1], [50] * n), SCHEME, FILL, score_fill=True) for n in range(3, 43)]
    levels = batch_noise_levels(examples, noise, 7)
    assert all(torch.equal(a, b) for a, b in zip(levels, batch_noise_levels(examples, noise, 7), strict=True))
    assert not torch.equal(levels[0], batch_noise_levels(examples, noise, 8)[0])
    assert [len(level_K) for level_K in levels] == [len(example.scored_KB) for example in examples]
    drawn = torch.cat([level_K[:1] if noise_level == "sequence" else level_K for level_K in levels])
    if noise_level == "sequence":
        assert all(len(level_K.unique()) == 1 for level_K in levels)
    # One level in each of as many equal intervals as there are levels.
    gaps = drawn.sort().values.diff() * len(drawn)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 - noise.min_noise), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize(("block_length", "origin"), [(0, "start"), (4, "start"), (8, "start"), (8, "prompt_end")])
def test_what_a_document_takes_in_a_pack_is_known_before(block_length: int, origin: Any, complementary: bool) -> None:
    noise = NoiseConfig(complementary=complementary)
    scheme = DiffusionScheme(block_length=block_length, mask_token_id=3, block_origin=origin)
    for prompt_length in (0, 1, 4, 9):
        for length in (1, 4, 7, 20):
            document = Document([1] * prompt_length, [2] * length)
            example = make_example(document, scheme, 0, score_fill=True, window=6)
            levels_K = batch_noise_levels([example], noise, seed=0)[0]
            viewed = view_document(example, levels_K, 3, noise=noise, seed=0)
            known = packed_tokens(prompt_length, length, scheme=scheme, num_views=1 + complementary, window=6)
            assert known == viewed.packed_length(block_length)
