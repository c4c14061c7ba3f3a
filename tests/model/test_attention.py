"""Every plan of a pack == softmax over the pairs the rule allows, written out; and the tiles FlexAttention reads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import TokenTable, ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import replay_views
from dirl.model.attention import AttentionPlan, DensePlan
from dirl.model.flex_attention import (
    FLEX_TILE,
    FlexPlan,
    _flex,
    padded_for_flex,
    tile_block_mask,
    tile_reads,
    training_plan,
)
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.tiled_attention import TiledPlan, _tiles
from tests.documents import random_document
from tests.oracle import sharp_tiny_model

MASK = 99
# PyTorch hands the path of its own libraries to the linker unquoted.
COMPILES = pytest.mark.skipif(
    " " in torch.__file__, reason="torch.compile for CPUs does not work in a path with a space"
)
HEADS, KEY_HEADS, HEAD_DIM, SCALING = 4, 2, 8, 0.3
# (prompt length, touched blocks of each completion) of each document
PACKS = {
    "one": [(3, [2])],
    "short_prompts": [(0, [1]), (1, [2]), (3, [1, 2, 1]), (2, [4])],
    "shared": [(13, [3, 5, 1]), (8, [2, 2]), (4, [1])],
    "long": [(150, [60, 3]), (9, [70])],
    "long_prompts": [(403, [4, 9, 2]), (260, [3])],
    # Tiles that hold one branch's clean tokens only, and queries of another branch behind them.
    "long_branches": [(0, [64, 100])],
    # A tile that holds branches of two documents and no trunk, behind the trunk of the first.
    "short_after_long": [(256, [4]), (1, [20])],
    "cut": [(3, [9]), (8, [1, 6]), (0, [1, 5]), (150, [60, 3])],
}


def make_pack(name: str, block_length: int = 4) -> TokenTable:
    documents = [random_document(*shape, block_length, MASK) for shape in PACKS[name]]
    if name == "cut":
        documents = [part for document in documents for part in halves(document, block_length)]
    return pack(documents, block_length).tokens


def halves(document: ViewedDocument, block_length: int) -> list[ViewedDocument]:
    """Two parts of a document whose completions are cut: each has the clean tokens that its views read, and no more."""
    found = []
    for is_second in (False, True):
        branches = []
        for views in document.branches:
            middle = int(views.block_V[0] + views.block_V[-1]) // 2
            part = views.rows((views.block_V > middle) == is_second)
            if len(part):
                num_read = max(int(part.block_V[-1]) * block_length - len(document.prompt_ids), 0)
                branches.append(replace(part, completion_ids=part.completion_ids[:num_read]))
        if branches:
            found.append(ViewedDocument(document.prompt_ids, branches))
    return found


def allowed_pairs(tokens: TokenTable) -> Tensor:
    """The rule once more, from its words: which token may read which; (L, L) bool."""
    document, branch, block, view = (
        x.numpy() for x in (tokens.document_L, tokens.branch_L, tokens.block_L, tokens.view_L)
    )
    rows = []
    for q in range(len(tokens)):
        is_sequence = (document == document[q]) & ((branch == 0) | (branch == branch[q]))
        context = (view == 0) & (block < block[q])
        rows.append(torch.from_numpy(is_sequence & (context | ((view == view[q]) & (block == block[q])))))
    return torch.stack(rows)


def random_qkv(length: int) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((HEADS, 2.0), (KEY_HEADS, 2.0), (KEY_HEADS, 1.0))
    query, key, value = ((torch.randn(1, heads, length, HEAD_DIM) * scale).requires_grad_() for heads, scale in shapes)
    return query, key, value


def by_hand(qkv: tuple[Tensor, Tensor, Tensor], allowed_LL: Tensor) -> Tensor:
    """Attention over all pairs in float64; (1, L, H, E)."""
    query, key, value = (x[0].double() for x in qkv)
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, dim=0) for x in (key, value))
    scores_HLL = (query @ key.transpose(1, 2) * SCALING).masked_fill(~allowed_LL, -torch.inf)
    return (scores_HLL.softmax(-1) @ value).transpose(0, 1)[None].float()


def attended(plan: AttentionPlan, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return plan.attend(*qkv, SCALING)


@pytest.mark.parametrize("name", PACKS)
def test_dense_plan(name: str) -> None:
    tokens = make_pack(name)
    qkv = random_qkv(len(tokens))
    torch.testing.assert_close(attended(DensePlan.packed(tokens), qkv), by_hand(qkv, allowed_pairs(tokens)))


@pytest.mark.parametrize("chunk_tokens", [8, 40, 256])
@pytest.mark.parametrize("name", PACKS)
def test_tiled_plan_with_gradients(name: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirl.model.tiled_attention._CHUNK_TOKENS", chunk_tokens)
    tokens = make_pack(name)
    qkv = random_qkv(len(tokens))
    found, expected = attended(TiledPlan(tokens), qkv), by_hand(qkv, allowed_pairs(tokens))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(found.shape)
    gradients = (torch.autograd.grad((weight * output).sum(), qkv) for output in (found, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("block_length", [1, 2, 8])
def test_tiled_plan_of_other_block_lengths(block_length: int) -> None:
    tokens = make_pack("shared", block_length)
    qkv = random_qkv(len(tokens))
    torch.testing.assert_close(attended(TiledPlan(tokens), qkv), by_hand(qkv, allowed_pairs(tokens)))


def test_tiled_plan_of_a_padded_pack() -> None:
    tokens = make_pack("shared").padded(FLEX_TILE)
    qkv = random_qkv(len(tokens))
    found, expected = attended(TiledPlan(tokens), qkv), by_hand(qkv, allowed_pairs(tokens))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_tokens", [8, 64, 256])
def test_every_token_is_asked_in_exactly_one_tile(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirl.model.tiled_attention._CHUNK_TOKENS", chunk_tokens)
    tokens = make_pack("long")
    tiles = list(_tiles(tokens))
    asked = torch.cat([queries for queries, _ in tiles])
    assert asked.sort().values.equal(torch.arange(len(tokens)))
    # Chunks do cut long documents, so that their cost is not quadratic.
    assert max(len(queries) for queries, _ in tiles) <= max(2 * chunk_tokens, 4 + 4 * 4)  # a block is never cut
    assert sum(len(queries) * len(keys) for queries, keys in tiles) < 0.6 * len(tokens) ** 2


@pytest.mark.parametrize("name", PACKS)
def test_flex_plan_uncompiled(name: str) -> None:
    tokens = make_pack(name).padded(FLEX_TILE)
    query, key, value = (x.detach() for x in random_qkv(len(tokens)))  # no backward on the CPU
    found = attended(FlexPlan(tokens), (query, key, value))
    torch.testing.assert_close(found, by_hand((query, key, value), allowed_pairs(tokens)))


@COMPILES
@pytest.mark.slow
def test_flex_plan_compiled_reads_the_listed_tiles_only() -> None:
    tokens = make_pack("long_prompts").padded(FLEX_TILE)
    query, key, value = (x.detach() for x in random_qkv(len(tokens)))
    found = torch.compile(flex_attention)(
        query, key, value, block_mask=tile_block_mask(tokens), scale=SCALING, enable_gqa=True
    )
    expected = by_hand((query, key, value), allowed_pairs(tokens))
    torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]


@COMPILES
@pytest.mark.slow
def test_packs_of_one_padded_length_share_one_compiled_graph() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    flex = torch.compile(flex_attention, dynamic=False)
    before, lengths = counters["unique_graphs"], set()
    for num_blocks in (96, 97, 98):
        tokens = padded_for_flex(pack([random_document(9, [num_blocks, 3], 4, MASK)], 4).tokens)
        query, key, value = (x.detach() for x in random_qkv(len(tokens)))
        flex(query, key, value, block_mask=tile_block_mask(tokens), scale=SCALING, enable_gqa=True)
        lengths.add(len(tokens))
    assert len(lengths) == 1
    assert counters["unique_graphs"] - before == 1


@pytest.mark.gpu
def test_training_passes_of_one_padded_length_share_their_compiled_graphs() -> None:
    model, _ = sharp_tiny_model()
    scorer = PackedScorer(model).to("cuda")
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    _flex.cache_clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    graphs, lengths = [counters["unique_graphs"]], set()
    for num_blocks in (96, 97, 98):
        packed = pack([random_document(9, [num_blocks, 3], 4, model.config.mask_token_id)], 4).to("cuda")
        lengths.add(len(padded_for_flex(packed.tokens)))
        scorer(packed, rule).logprob_T.sum().backward()
        graphs.append(counters["unique_graphs"])
    assert len(lengths) == 1
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


def test_no_number_of_lengths_makes_attention_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past Dynamo's limit of recompilations (8) FlexAttention would run unfused, with a warning only."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    _flex.cache_clear()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    for num_tiles in range(1, 12):
        tokens = make_pack("one").padded(FLEX_TILE * num_tiles)
        query, key, value = (x.detach() for x in random_qkv(len(tokens)))
        _flex(True)(query, key, value, block_mask=tile_block_mask(tokens), enable_gqa=True)
    _flex.cache_clear()
    assert counters["unique_graphs"] - before == 11


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
def test_flex_plan_on_cuda_with_gradients(dtype: torch.dtype, tolerance: float) -> None:
    tokens = make_pack("long_prompts").padded(FLEX_TILE)
    qkv = tuple(torch.randn(1, heads, len(tokens), 32).to(dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS))
    weight = torch.randn(1, len(tokens), HEADS, 32)
    outcomes = []
    for device, make_plan in (("cpu", TiledPlan), ("cuda", FlexPlan)):
        kind = dtype if device == "cuda" else torch.float32
        here = query, key, value = [x.detach().to(device, kind).requires_grad_() for x in qkv]
        output = make_plan(tokens.to(device)).attend(query, key, value, SCALING)
        gradients = torch.autograd.grad((weight.to(device) * output).sum(), here)
        outcomes.append([(weight.to(device) * output).detach().cpu(), *(g.float().cpu() for g in gradients)])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", PACKS)
def test_tiles_cover_the_rule(name: str) -> None:
    tokens = make_pack(name).padded(FLEX_TILE)
    partial_NN, full_NN = tile_reads(tokens)
    allowed_NNTT = allowed_pairs(tokens).unflatten(0, (-1, FLEX_TILE)).unflatten(2, (-1, FLEX_TILE)).transpose(1, 2)
    some_NN, all_NN = allowed_NNTT.flatten(2).any(-1), allowed_NNTT.flatten(2).all(-1)
    assert not (partial_NN & full_NN).any()
    assert (some_NN <= (partial_NN | full_NN)).all(), "an allowed pair lies in a tile that is not read"
    assert (full_NN <= all_NN).all(), "a tile read in full holds a forbidden pair"


def test_a_tile_that_ends_in_the_block_where_the_queries_begin_is_not_read_in_full() -> None:
    # 64 blocks of one view each but for the first, which has two: the views of tile 3 begin at block 31, the last
    # clean block of tile 0.
    step_map = torch.ones(256, dtype=torch.int64)
    step_map[0] = 2
    trajectory = Trajectory(step_map[:0], torch.arange(256), step_map, 4)
    document = ViewedDocument(step_map[:0], [replay_views(trajectory, MASK)])
    tokens = pack([document], 4).tokens.padded(FLEX_TILE)
    assert int(tokens.block_L[3 * FLEX_TILE]) == int(tokens.block_L[FLEX_TILE - 1]) == 31
    partial_NN, full_NN = tile_reads(tokens)
    assert partial_NN[3, 0] and not full_NN[3, 0]


def test_tiles_are_sparse_and_some_are_read_in_full() -> None:
    tokens = pack([random_document(512, [9, 40], 4, MASK)], 4).tokens
    partial_NN, full_NN = tile_reads(tokens.padded(FLEX_TILE))
    for tile in range(4):  # the prompt: in full what is before, in part itself, nothing after
        assert full_NN[tile].nonzero().flatten().tolist() == list(range(tile))
        assert partial_NN[tile, :-1].nonzero().flatten().tolist() == [tile]  # the last tile holds padding, too
    assert full_NN[4:-1, :4].all()  # every completion reads the whole prompt
    assert int(partial_NN.sum()) < 0.4 * partial_NN.numel()


@pytest.mark.parametrize("name", PACKS)
def test_block_mask_lists_the_tiles(name: str) -> None:
    tokens = make_pack(name).padded(FLEX_TILE)
    mask = tile_block_mask(tokens)
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    lists = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    for (counts, indices), reads_NN in zip(lists, tile_reads(tokens), strict=True):
        for row, columns in enumerate(reads_NN):
            listed = indices[0, 0, row, : int(counts[0, 0, row])]
            assert listed.tolist() == columns.nonzero().squeeze(1).tolist()


def test_a_pack_of_odd_length_is_refused_by_flex() -> None:
    tokens = make_pack("one")
    with pytest.raises(ValueError, match=f"multiple of 128 tokens for FlexAttention, got {len(tokens)}"):
        tile_reads(tokens)


def test_block_causal_rows_with_padding() -> None:
    positions, is_token = torch.arange(7).expand(2, 7), torch.tensor([[1] * 7, [1] * 5 + [0] * 2]).bool()
    mask_N1LL = DensePlan.block_causal(positions, is_token, 2).mask_N1LL
    for row in range(2):
        for q in range(7):
            for k in range(7):
                expected = q == k or (q // 2 >= k // 2 and bool(is_token[row, k]))
                assert bool(mask_N1LL[row, 0, q, k]) == expected, (row, q, k)


def test_the_cpu_trains_on_tiles() -> None:
    assert isinstance(training_plan(make_pack("one")), TiledPlan)
    assert isinstance(training_plan(make_pack("one"), "sdpa"), TiledPlan)
    assert isinstance(training_plan(make_pack("one").padded(FLEX_TILE), "flex"), FlexPlan)


def test_packs_are_padded_to_few_lengths() -> None:
    tokens = pack([random_document(9, [30], 4, MASK)], 4).tokens
    lengths = set()
    for length in range(len(tokens), 6000, 37):
        grown = padded_for_flex(tokens.padded(length))
        lengths.add(len(grown))
        assert len(grown) % FLEX_TILE == 0 and length <= len(grown) <= max(1.25 * length, length + FLEX_TILE)
        if length <= 5500:  # a budget is not exceeded by more than what is missing to a whole tile
            assert len(padded_for_flex(tokens.padded(length), 5500)) == min(len(grown), 5504)
    assert len(lengths) <= 20
