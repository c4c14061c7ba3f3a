"""One denoising step: chunks change nothing and bound memory, and engines with and without logits draw the same."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from dirl.diffusion.packing import DiffusionScheme
from dirl.diffusion.unmasking import UnmaskingStrategy
from dirl.rollout import block_step
from dirl.rollout.block_step import Blocks, DenoisingStep, Sampler
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from tests.oracle import sharp_tiny_model

SIZE, VOCAB, BLOCK, SEQUENCES = 6, 40, 4, 13
SAMPLINGS = [
    SamplingConfig(unmasking_strategy=strategy, confidence_threshold=0.1, entropy_bound=4.0, **drawn)  # type: ignore[arg-type]
    for strategy in get_args(UnmaskingStrategy)
    for drawn in (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8},
        {"temperature": 0.7, "top_k": 9, "confidence": "processed", "at_threshold": "hold"},
    )
]


class Head:
    """A head whose products are exact however rows are split: everything is a small multiple of 1/4."""

    def __init__(self) -> None:
        self.weight_XV = torch.randint(-4, 5, (SIZE, VOCAB), generator=torch.manual_seed(0)) / 4
        self.num_rows: list[int] = []

    def __call__(self, hidden_TX: Tensor) -> Tensor:
        self.num_rows.append(len(hidden_TX))
        return hidden_TX @ self.weight_XV


def some_blocks() -> tuple[Tensor, Blocks]:
    """Hidden states of all positions, and blocks in the middle of decoding."""
    generator = torch.Generator().manual_seed(1)
    hidden_TX = torch.randint(-4, 5, (SEQUENCES * BLOCK, SIZE), generator=generator) / 2
    masked_NB = torch.rand(SEQUENCES, BLOCK, generator=generator) < 0.6
    masked_NB[:, 0] = True
    position_NB = 4 * torch.randint(0, 9, (SEQUENCES, 1), generator=generator) + torch.arange(BLOCK)
    step_N = torch.randint(0, 4, (SEQUENCES,), generator=generator)
    return hidden_TX, Blocks(masked_NB, position_NB, step_N, torch.arange(SEQUENCES) + 5)


def assert_same(found: DenoisingStep, expected: DenoisingStep) -> None:
    assert bool(expected.revealed_NB.any()) and torch.equal(found.revealed_NB, expected.revealed_NB)
    for name in ("token_ids_NB", "logprobs_NB"):
        mine, theirs = (getattr(step, name)[expected.revealed_NB] for step in (found, expected))
        assert torch.equal(mine, theirs), name
    assert found.holds_NB is not None and expected.holds_NB is not None
    assert torch.equal(found.holds_NB.nan_to_num(9), expected.holds_NB.nan_to_num(9))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: f"{s.unmasking_strategy}-{s.temperature}")
def test_chunks_change_nothing_and_hidden_states_draw_as_logits_do(
    sampling: SamplingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_TX, blocks = some_blocks()
    suppressed_V = torch.arange(VOCAB) >= 37
    rules = sampling.rules(DiffusionScheme(block_length=BLOCK, mask_token_id=0))
    whole = Sampler(Head(), *rules, suppressed_V, records_holds=True).denoise(hidden_TX, blocks)
    of_logits = Sampler(lambda logits_TV: logits_TV, *rules, suppressed_V, records_holds=True)
    assert_same(of_logits.denoise(Head()(hidden_TX), blocks), whole)
    monkeypatch.setattr(block_step, "LOGITS_PER_CHUNK", 5 * VOCAB + 1)
    head, masked_T = Head(), blocks.masked_NB.flatten().nonzero().squeeze(1)
    of_masked = Sampler(head, *rules, suppressed_V, records_holds=True).denoise(hidden_TX[masked_T], blocks, masked_T)
    assert_same(of_masked, whole)
    held_NB = ~of_masked.holds_NB.isnan()  # type: ignore[union-attr]
    assert torch.equal(held_NB, blocks.masked_NB & ~of_masked.revealed_NB)
    num_read = len(masked_T) + int(held_NB.sum()) * ("low_confidence" in sampling.unmasking_strategy)
    assert max(head.num_rows) == 5 and sum(head.num_rows) == num_read
    assert_same(of_logits.denoise(Head()(hidden_TX), blocks), whole)
    assert not bool((of_masked.revealed_NB & ~blocks.masked_NB).any())


def test_an_engines_logits_are_bounded_whatever_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 blocks of 4 masked positions at once, and never more than 10 rows of logits."""
    model, tokenizer = sharp_tiny_model()
    sampling = SamplingConfig(confidence_threshold=0.1, max_completion_length=12)
    prompts, seeds = torch.randint(0, 256, (48, 8), generator=torch.manual_seed(7)).tolist(), range(48)
    expected = TorchEngine(model, tokenizer).generate(prompts, sampling, seeds)
    rows: list[int] = []

    def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    monkeypatch.setattr(block_step, "LOGITS_PER_CHUNK", 10 * model.config.vocab_size)
    model.lm_head.register_forward_pre_hook(count)
    found = TorchEngine(model, tokenizer).generate(prompts, sampling, seeds)
    assert max(rows) == 10
    assert [(c.token_ids, c.step_map) for c in found] == [(c.token_ids, c.step_map) for c in expected]
