"""Next-token prediction from the clean copies of a pack, against a model that reads each document alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dirl.data.conversations import Document
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import pack
from dirl.model.attention import DensePlan
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import suppressed_by
from dirl.model.tiny import tiny
from dirl.sft.batch import view_document
from dirl.sft.block_starts import count_block_starts, next_token_loss, with_noisy_starts
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from tests.oracle import sharp_tiny_model

DOCUMENTS = [Document([1, 2, 3, 4, 5][: length % 6], list(range(40, 40 + length))) for length in range(5, 17)]
CONFIG = SFTConfig(
    output_dir="unused",
    global_batch_size=12,
    max_tokens_per_micro_batch=100,
    data=SFTDataConfig(num_heldout=0),
    autoregressive_weight=0.3,
)


def trainer(config: SFTConfig, block_length: int) -> SFTTrainer:
    model, tokenizer = sharp_tiny_model(sharpness=9.0)
    model.config.block_size = block_length
    return SFTTrainer(config, model=model, tokenizer=tokenizer, documents=DOCUMENTS)


@torch.no_grad()
def expected(trained: SFTTrainer) -> list[float]:
    """Negative log-probabilities of the first tokens of blocks, one document and one token at a time."""
    block_length, found = trained.model.config.block_size, []
    for example in trained.examples(DOCUMENTS):
        ids = torch.cat([example.trajectory.prompt_ids, example.trajectory.completion_ids])
        prompt_length = len(example.trajectory.prompt_ids)
        for place in range(max(prompt_length, 1), len(ids)):
            if place % block_length == 0:
                # Nothing from `place` on is there, so that nothing can have been seen.
                logits_V = trained.model(input_ids=ids[None, :place]).logits[0, -1].float()
                logits_V = logits_V.masked_fill(trained.rule.suppressed_V, -torch.inf)
                found.append(-float(logits_V.log_softmax(0)[ids[place]]))
    return found


@pytest.mark.parametrize("block_length", [1, 4, 8])
@pytest.mark.parametrize("complementary", [False, True])
def test_block_starts_are_predicted_from_what_stands_before_them(block_length: int, complementary: bool) -> None:
    trained = trainer(replace(CONFIG, noise=NoiseConfig(complementary=complementary)), block_length)
    oracle = expected(trained)
    examples = trained.examples(DOCUMENTS)
    assert count_block_starts(example.trajectory for example in examples) == len(oracle) > 0
    packs = trained._packs(examples, trained.config.noise, seed=3, starts=True)
    assert len(packs) > 1
    with torch.no_grad():
        scored = [trained.learner.module(packed, trained.rule).logprob_T for packed in packs]
    ours = [-x for packed, s in zip(packs, scored, strict=True) for x in s[packed.actions.view_T < 0].tolist()]
    assert sorted(ours) == pytest.approx(sorted(oracle), abs=2e-5)
    loss = sum(
        float(next_token_loss(s, packed.actions, float(len(oracle)))) for packed, s in zip(packs, scored, strict=True)
    )
    assert loss == pytest.approx(sum(oracle) / len(oracle), abs=1e-5)


def test_a_step_adds_the_weighted_mean_and_learns_from_it() -> None:
    with_term, without = trainer(CONFIG, 4), trainer(replace(CONFIG, autoregressive_weight=0.0), 4)
    mean = sum(expected(with_term)) / len(expected(with_term))
    ours, theirs = with_term.step(), without.step()
    assert ours["loss_autoregressive"] == pytest.approx(mean, abs=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"] + 0.3 * mean, abs=1e-4)
    assert "loss_autoregressive" not in theirs
    assert ours["num_tokens"] == theirs["num_tokens"]  # no pass more
    first = next(p for p in with_term.model.parameters())
    assert not torch.equal(first, next(p for p in without.model.parameters()))


def test_the_noisy_views_are_scored_as_without_it() -> None:
    trained = trainer(CONFIG, 4)
    examples = trained.examples(DOCUMENTS)
    for plain, more in zip(
        trained._packs(examples, trained.config.noise, seed=3),
        trained._packs(examples, trained.config.noise, seed=3, starts=True),
        strict=True,
    ):
        count = len(more.actions) - len(plain.actions)
        assert count > 0 and bool((more.actions.weight_T[:count] == 0).all())
        for name, column in plain.actions.columns().items():
            assert torch.equal(more.actions.columns()[name][count:].nan_to_num(), column.nan_to_num()), name
        with torch.no_grad():
            scores = [trained.learner.module(packed, trained.rule).logprob_T for packed in (plain, more)]
        torch.testing.assert_close(scores[1][count:], scores[0])


def shifted_noisy_copy(model: BlockDiffusionModel, noisy_ids: Tensor, clean_ids: Tensor) -> Tensor:
    """Log-probabilities of every token in Fast-dLLM's layout: a whole noisy copy beside a whole clean one; (L, V)."""
    length = len(clean_ids)
    block_L = torch.arange(length) // model.config.block_size
    same_LL, earlier_LL = block_L[:, None] == block_L, block_L[:, None] > block_L
    nothing_LL = torch.zeros_like(same_LL)
    mask_LL = torch.cat([torch.cat([same_LL, earlier_LL], 1), torch.cat([nothing_LL, same_LL | earlier_LL], 1)])
    hidden_LD = model.model(
        input_ids=torch.cat([noisy_ids, clean_ids])[None],
        position_ids=torch.arange(length).repeat(2)[None],
        attention_plan=DensePlan(mask_LL[None]),
        use_cache=False,
    ).last_hidden_state[0, :length]
    logits_LV = model.lm_head(hidden_LD).masked_fill(suppressed_by(model), -torch.inf)
    return logits_LV.log_softmax(-1)[[0, *range(length - 1)]]


@pytest.mark.parametrize("num_copies", [1, 2])
@torch.no_grad()
def test_noisy_starts_are_read_where_fast_dllm_reads_them(num_copies: int) -> None:
    noise = NoiseConfig(complementary=num_copies == 2, weight="even", block_start="noisy")
    model, tokenizer = sharp_tiny_model(sharpness=9.0, block_length=4, shift=1)
    config = replace(CONFIG, noise=noise, autoregressive_weight=0.0)
    trained = SFTTrainer(config, model=model, tokenizer=tokenizer, documents=DOCUMENTS)
    num_moved = 0
    for seed, example in enumerate(trained.examples(DOCUMENTS)):
        clean_ids = torch.cat([example.trajectory.prompt_ids, example.trajectory.completion_ids])
        levels_K = torch.full((len(example.scored_KB),), 0.6)
        viewed = view_document(example, levels_K, model.config.mask_token_id, noise=noise, seed=seed)
        plain = pack([viewed], 4, 1)
        packed = with_noisy_starts(plain, num_copies)
        num_moved += int((packed.actions.index_T != plain.actions.index_T).sum())
        (views,) = viewed.branches
        expected = {}
        for copy in range(num_copies):
            noisy_ids = clean_ids.clone()
            for view in range(copy, len(views), num_copies):
                noisy_ids.view(-1, 4)[views.block_V[view]] = views.token_ids_VB[view]
            logprob_LV = shifted_noisy_copy(model, noisy_ids, clean_ids)
            for view in range(copy, len(views), num_copies):
                for lane in views.revealed_VB[view].nonzero().squeeze(1).tolist():
                    place = int(views.block_V[view]) * 4 + lane
                    expected[view, lane] = logprob_LV[place, clean_ids[place]]
        found_T = trained.learner.module(packed, trained.rule).logprob_T
        torch.testing.assert_close(found_T, torch.stack([expected[key] for key in sorted(expected)]), atol=2e-5, rtol=0)
    assert num_moved > 5
    with torch.enable_grad():
        assert trained.step()["loss"] > 0


def test_one_block_has_no_start_to_predict() -> None:
    model, tokenizer = tiny()
    config = replace(CONFIG, global_batch_size=1)
    trained = SFTTrainer(config, model=model, tokenizer=tokenizer, documents=[Document([], [50, 51, 52])])
    assert trained.step()["loss_autoregressive"] == 0.0
