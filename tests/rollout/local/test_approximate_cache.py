"""Decoding over keys of before: it is what whole passes with frozen keys and values give, and no more is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dirl.model.attention import masked_attention
from dirl.model.checkpoint import load
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.engine import ApproximateCache, Completion, EngineConfig, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import logprobs
from tests.model import published
from tests.oracle import canvas_states, make_extreme, sampling_probs, sharp_tiny_model
from tests.rollout.local.test_canvas import Kept

KINDS: tuple[ApproximateCache, ...] = ("prefix", "dual")
SAMPLINGS = {
    "threshold": SamplingConfig(confidence_threshold=0.1, max_completion_length=20, generation_window=6),
    "greedy": SamplingConfig(
        temperature=0.0,
        unmasking_strategy="low_confidence_static",
        denoising_steps=3,
        max_completion_length=20,
        generation_window=6,
    ),
    "one window": SamplingConfig(
        unmasking_strategy="sequential", denoising_steps=4, max_completion_length=11, generation_window=0, top_k=40
    ),
}
LENGTHS = (0, 1, 3, 9, 9)


def prompts_of(vocabulary: int = 256) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def decode(
    model: BlockDiffusionModel, tokenizer: Any, sampling: SamplingConfig, kind: ApproximateCache, **engine: Any
) -> list[Completion]:
    config = EngineConfig(approximate_cache=kind, **engine)
    return TorchEngine(model, tokenizer, config).generate(prompts_of(), sampling, range(len(LENGTHS)))


def likely_to_stop(shift: int) -> tuple[BlockDiffusionModel, Any]:
    model, tokenizer = sharp_tiny_model(block_length=0, shift=shift)
    make_extreme(model, [tokenizer.eos_token_id], 3.0)  # type: ignore[list-item]
    return model, tokenizer


class FrozenKeys:
    """Whole passes over one canvas, in which positions that are not read have the keys and values of an earlier one."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.is_read_L: Tensor | None = None  # None: all are, and are kept
        self.layer = 0

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        if self.is_read_L is None:
            self.layers.append((key_NGLE, value_NGLE))
        else:
            key, value = self.layers[self.layer]
            key_NGLE = torch.where(self.is_read_L[:, None], key_NGLE, key)
            value_NGLE = torch.where(self.is_read_L[:, None], value_NGLE, value)
            self.layer += 1
        mask = torch.ones(1, 1, 1, key_NGLE.shape[2], dtype=torch.bool)
        return masked_attention(query_NHLE, key_NGLE, value_NGLE, mask, scaling).transpose(1, 2)


def slow_logprobs(
    model: BlockDiffusionModel, completion: Completion, sampling: SamplingConfig, kind: ApproximateCache
) -> Tensor:
    """Log-probability of each token at the step that revealed it, by a pass over the whole canvas each step; (R,)."""
    start, window, shift = len(completion.prompt_ids), sampling.generation_window or 99, model.scheme.shift
    found, opened = {}, -1
    frozen = FrozenKeys()
    for state in canvas_states(replace(completion, generation_window=window), model.scheme.mask_token_id):
        number = (state.revealed[0] - start) // window
        first = start + number * window
        position_L = torch.arange(len(state.noisy))
        if number > opened:
            frozen, opened = FrozenKeys(), number
        else:
            end = first + window if kind == "dual" else len(state.noisy)
            frozen.is_read_L, frozen.layer = (position_L >= first - shift) & (position_L < end), 0
        hidden_NLD = model.model(
            input_ids=torch.tensor([state.noisy]), position_ids=position_L[None], attention_plan=frozen, use_cache=False
        ).last_hidden_state
        row_L = (position_L - shift).clamp(min=0)
        probs_LV = sampling_probs(model.lm_head(hidden_NLD[0, row_L]), model, sampling)
        for position in state.revealed:
            token = completion.token_ids[position - start]
            assert sampling.temperature > 0 or probs_LV[position].argmax() == token
            found[position] = probs_LV[position, token].log()
    return torch.stack([found[start + i] for i in range(len(completion.token_ids))])


def largest_difference(found: list[float] | None, expected: Tensor) -> float:
    assert found is not None
    return float((torch.tensor(found) - expected).abs().max())


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_a_whole_pass_with_frozen_keys(kind: ApproximateCache, shift: int, name: str) -> None:
    sampling = SAMPLINGS[name]
    model, tokenizer = likely_to_stop(shift)
    completions = decode(model, tokenizer, sampling, kind)
    if name == "threshold":
        assert len({len(completion.token_ids) for completion in completions}) > 1, "they end at different times"
    exact = logprobs(model, completions, sampling)
    for completion in completions:
        slow = slow_logprobs(model, completion, sampling, kind)
        assert largest_difference(completion.logprobs, slow) <= 1e-5
    errors = [largest_difference(c.logprobs, exact_R) for c, exact_R in zip(completions, exact, strict=True)]
    assert max(errors) > 1e-3, "no approximation was made"


@pytest.mark.parametrize("name", ["llada", "llada_moe", "dream", "a2d_qwen2", "a2d_llama", "a2d_qwen3_moe"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_family_with_full_attention(kind: ApproximateCache, name: str, tmp_path: Path) -> None:
    published.write(published.PUBLISHED[name](), tmp_path)
    model, tokenizer = load(str(tmp_path))
    model.config.full_attention = True
    sampling = SAMPLINGS["greedy"]
    engine = TorchEngine(model, tokenizer, EngineConfig(approximate_cache=kind))
    for completion in engine.generate(prompts_of(80), sampling, range(len(LENGTHS))):
        assert largest_difference(completion.logprobs, slow_logprobs(model, completion, sampling, kind)) <= 1e-5


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_with_one_step_a_window_nothing_is_approximate(kind: ApproximateCache, shift: int) -> None:
    """Whether there is one window or several: the first step of each reads all."""
    model, tokenizer = likely_to_stop(shift)
    for window in (0, 5):
        sampling = SamplingConfig(
            unmasking_strategy="low_confidence_static",
            denoising_steps=1,
            max_completion_length=16,
            generation_window=window,
        )
        assert decode(model, tokenizer, sampling, kind) == decode(model, tokenizer, sampling, "none")


@pytest.mark.parametrize("bounds", [{"max_batch_size": 2}, {"max_cached_tokens": 60}], ids=str)
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_does_not_depend_on_its_batch(kind: ApproximateCache, shift: int, bounds: dict[str, int]) -> None:
    model, tokenizer = likely_to_stop(shift)
    together = decode(model, tokenizer, SAMPLINGS["threshold"], kind)
    apart = decode(model, tokenizer, SAMPLINGS["threshold"], kind, **bounds)
    assert len({completion.num_denoising_steps for completion in together}) > 1
    for one, other in zip(together, apart, strict=True):
        assert (one.token_ids, one.step_map) == (other.token_ids, other.step_map)
        assert largest_difference(one.logprobs, torch.tensor(other.logprobs)) <= 1e-5


@pytest.mark.parametrize("shift", [0, 1])
def test_further_steps_read_no_more_than_they_must(shift: int) -> None:
    model, tokenizer = likely_to_stop(shift)
    sampling = replace(SAMPLINGS["greedy"], max_completion_length=12)
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: widths.append(given[0].shape[1]))
    read = {}
    for kind in ("none", *KINDS):
        TorchEngine(model, tokenizer, EngineConfig(approximate_cache=kind)).generate([[5] * 30], sampling, [0])
        read[kind], widths = widths[:6], []
    assert read["none"] == [42] * 6
    assert read["prefix"] == [42, 12 + shift, 12 + shift, 42, 6 + shift, 6 + shift]
    assert read["dual"] == [42, 6 + shift, 6 + shift] * 2


def test_an_observer_sees_what_is_returned() -> None:
    model, tokenizer = sharp_tiny_model(block_length=0)
    observer = Kept()
    engine = TorchEngine(model, tokenizer, EngineConfig(approximate_cache="dual"), observer=observer)
    (completion,) = engine.generate([[7]], SAMPLINGS["greedy"], [0])
    assert len(observer.frames) == completion.num_denoising_steps
    assert observer.frames[-1][0].token_ids == completion.token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_stored_keys_are_rounded_as_fresh_ones(kind: ApproximateCache) -> None:
    model, tokenizer = likely_to_stop(1)
    config = EngineConfig(approximate_cache=kind)
    engine = TorchEngine(model, tokenizer, config, autocast=torch.bfloat16)
    completions = engine.generate(prompts_of(), SAMPLINGS["greedy"], range(len(LENGTHS)))
    plain = TorchEngine(model, tokenizer, config).generate(prompts_of(), SAMPLINGS["greedy"], range(len(LENGTHS)))
    firsts = [
        (one.logprobs[i], other.logprobs[i])
        for one, other in zip(completions, plain, strict=True)
        for i, step in enumerate(one.step_map)
        if step == 1 and one.token_ids[i] == other.token_ids[i] and one.logprobs and other.logprobs
    ]
    assert firsts and all(abs(a - b) < 0.2 for a, b in firsts)
