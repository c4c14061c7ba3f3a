"""Hidden states -> scores in chunks of whole views, against one piece; and what a model may never emit."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule, action_logprobs
from dirl.diffusion.packing import Actions, PackedViews, pack
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.model.attention import DensePlan
from dirl.model.families.sdar import SDARConfig, SDARForCausalLM
from dirl.model.logprobs import PackedScorer, _chunks_of_views, score_actions, suppressed_by
from tests.documents import action_table, random_document
from tests.oracle import sharp_tiny_model

VOCABULARY, HIDDEN = 11, 6
RULE = ScoringRule(
    TokenDistribution(0.9),
    UnmaskingRule(confidence_threshold=0.2),
    torch.arange(VOCABULARY) == VOCABULARY - 1,
    wants_entropy=True,
)


def random_actions(lengths: list[int]) -> Actions:
    """Views of the given numbers of actions; the first of each is revealed."""
    view_T = torch.arange(1, len(lengths) + 1).repeat_interleave(torch.tensor(lengths))
    is_first_T = torch.cat([torch.arange(length) == 0 for length in lengths])
    return action_table(torch.randint(0, VOCABULARY - 1, (len(view_T),)), is_first_T, view_T)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5, 7, 100])
def test_chunks_never_cut_a_view_and_are_as_long_as_allowed(max_rows: int) -> None:
    lengths = [3, 1, 1, 4, 2, 2, 6, 1]
    actions = random_actions(lengths)
    view_T = actions.view_T
    slices = _chunks_of_views(actions.view_ends, max_rows)
    assert [index for rows in slices for index in range(len(view_T))[rows]] == list(range(len(view_T)))
    borders = {sum(lengths[:i]) for i in range(len(lengths) + 1)}
    for rows in slices:
        assert {rows.start, rows.stop} <= borders
        assert rows.stop - rows.start <= max_rows or len(view_T[rows].unique()) == 1
    for one, other in pairwise(slices):
        first_of_next = next(border for border in sorted(borders) if border > other.start)
        assert first_of_next - one.start > max_rows, "the next view would have fitted"


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 9])
def test_chunks_change_neither_scores_nor_gradients(rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = random_actions([3, 1, 2, 4, 4, 1])
    hidden_TD, lm_head = torch.randn(len(actions), HIDDEN, requires_grad=True), nn.Linear(HIDDEN, VOCABULARY)
    inputs = [hidden_TD, *lm_head.parameters()]

    def gradients(logprob_T: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((torch.arange(len(actions)) * logprob_T).sum(), inputs)

    expected = action_logprobs(lm_head(hidden_TD), actions, RULE)
    monkeypatch.setattr("dirl.model.logprobs.LOGITS_PER_CHUNK", rows_per_chunk * VOCABULARY)
    scores = score_actions(hidden_TD, lm_head, actions, RULE)
    torch.testing.assert_close(scores.logprob_T, expected[0])
    torch.testing.assert_close(scores.entropy_T, expected[1])
    assert (scores.entropy_T > 0).all()
    for one, other in zip(gradients(scores.logprob_T), gradients(expected[0]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("rows_per_chunk", "num_passes"), [(5, 2), (1000, 1)])
def test_lm_head_sees_scored_positions_only_a_chunk_at_a_time(
    rows_per_chunk: int, num_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = sharp_tiny_model()
    assert isinstance(tokenizer.mask_token_id, int)
    packed = pack([random_document(*shape, 4, tokenizer.mask_token_id) for shape in ((9, [2, 3]), (2, [4]))], 4)
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    monkeypatch.setattr("dirl.model.logprobs.LOGITS_PER_CHUNK", rows_per_chunk * len(rule.suppressed_V))
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    scores = PackedScorer(model)(packed, rule)
    forward = list(rows)
    assert sum(forward) == len(packed.actions) < len(packed)
    assert max(forward) <= rows_per_chunk and (len(forward) > 1) == (num_passes == 2)
    scores.logprob_T.sum().backward()
    assert sorted(rows) == sorted(forward * num_passes), "backward computes the logits of several chunks again"


def test_scores_of_no_actions_still_belong_to_the_graph() -> None:
    hidden_TD, lm_head = torch.randn(0, HIDDEN, requires_grad=True), nn.Linear(HIDDEN, VOCABULARY)
    scores = score_actions(hidden_TD, lm_head, random_actions([1]).rows(slice(0, 0)), RULE)
    assert scores.logprob_T.shape == scores.entropy_T.shape == (0,)
    assert scores.logprob_T.dtype == scores.entropy_T.dtype == torch.float32 and not scores.entropy_T.requires_grad
    scores.logprob_T.sum().backward()
    assert hidden_TD.grad is not None
    for parameter in lm_head.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_without_actions_still_takes_part_in_backward(tied: bool) -> None:
    """Under ZeRO and DDP a parameter without a gradient on one rank is one that the other ranks wait for."""
    tiny, _ = sharp_tiny_model()
    model = SDARForCausalLM(SDARConfig(**{**tiny.config.to_dict(), "tie_word_embeddings": tied}))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    packed = pack([random_document(9, [2, 3], 4, model.config.mask_token_id)], 4)
    idle = PackedViews(packed.tokens, packed.actions.rows(slice(0, 0)))
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    PackedScorer(model)(idle, rule).logprob_T.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ("lm_head.weight" in gradients) == (not tied)
    assert [name for name, gradient in gradients.items() if gradient is None or gradient.any()] == []


def test_suppressed_ids_come_from_the_models_configuration() -> None:
    model, tokenizer = sharp_tiny_model()
    assert suppressed_by(model).nonzero().flatten().tolist() == [tokenizer.mask_token_id]
    model.config.tokenizer_length = 200
    assert suppressed_by(model).nonzero().flatten().tolist() == list(range(200, 264))
    model.config.tokenizer_length = None
    assert suppressed_by(model).nonzero().flatten().tolist() == [tokenizer.mask_token_id]


def test_packed_scorer_is_a_dense_forward_and_action_logprobs() -> None:
    model, tokenizer = sharp_tiny_model()
    assert isinstance(tokenizer.mask_token_id, int)
    documents = [random_document(*shape, 4, tokenizer.mask_token_id) for shape in ((9, [2, 3]), (2, [4]))]
    packed = pack(documents, 4)
    unmasking = UnmaskingRule(confidence_threshold=0.05)
    rule = ScoringRule(TokenDistribution(), unmasking, suppressed_by(model), wants_entropy=True)
    with torch.no_grad():
        scores = PackedScorer(model)(packed, rule)
        logits_LV = model(
            input_ids=packed.tokens.token_ids_L[None],
            position_ids=packed.tokens.position_L[None],
            attention_plan=DensePlan.packed(packed.tokens),
        ).logits[0]
    logprob_T, entropy_T = action_logprobs(logits_LV[packed.actions.index_T], packed.actions, rule)
    torch.testing.assert_close(scores.logprob_T, logprob_T, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.entropy_T, entropy_T, atol=1e-5, rtol=1e-5)
