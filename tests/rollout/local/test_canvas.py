"""Decoding under full attention, and of shifted predictions, step by step against plain forward passes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from dirl.diffusion.unmasking import UnmaskingStrategy
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.engine import Completion, EngineConfig, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.watch import Frame, Observer
from tests.oracle import (
    confidence_probs,
    make_extreme,
    reference_reveal,
    sampling_probs,
    sharp_tiny_model,
    state_logits,
    states_of,
)

STRATEGIES: dict[UnmaskingStrategy, SamplingConfig] = {
    "low_confidence_dynamic": SamplingConfig(confidence_threshold=0.05),
    "low_confidence_static": SamplingConfig(unmasking_strategy="low_confidence_static", denoising_steps=4),
    "sequential": SamplingConfig(unmasking_strategy="sequential", denoising_steps=3),
    "entropy_bounded": SamplingConfig(unmasking_strategy="entropy_bounded", entropy_bound=4.0),
}


def decoded(
    sampling: SamplingConfig, block_length: int, shift: int, **engine: Any
) -> tuple[BlockDiffusionModel, list[Completion]]:
    model, tokenizer = sharp_tiny_model(block_length=block_length, shift=shift)
    make_extreme(model, [tokenizer.eos_token_id], 3.0)  # type: ignore[list-item]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in (1, 3, 4, 9, 9)]
    return model, TorchEngine(model, tokenizer, EngineConfig(**engine)).generate(prompts, sampling, range(len(prompts)))


@pytest.mark.parametrize(("block_length", "shift"), [(0, 0), (0, 1), (4, 1)])
@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_greedy_tokens_and_their_order(strategy: UnmaskingStrategy, block_length: int, shift: int) -> None:
    """Each step reveals the most likely tokens, and where the strategy's own words say."""
    sampling = replace(STRATEGIES[strategy], temperature=0.0, max_completion_length=16, generation_window=6)
    model, completions = decoded(sampling, block_length, shift)
    for completion in completions:
        clean = completion.prompt_ids + completion.token_ids
        steps_taken = dict.fromkeys(range(99), 0)  # of a block, or of a window
        for state in states_of(model, completion):
            logits_BV = state_logits(model, clean, state.block, state.noisy)
            confidence_BV = confidence_probs(logits_BV, model, sampling)
            probs_BV = sampling_probs(logits_BV, model, sampling)
            number = state.block
            lanes = range(len(state.noisy))
            if block_length == 0:
                number = (state.revealed[0] - len(completion.prompt_ids)) // 6
                start = len(completion.prompt_ids) + number * 6
                lanes = range(start, min(start + 6, len(completion.prompt_ids) + 16))
            token_B = confidence_BV.argmax(dim=1)
            masked = [lane in state.revealed + state.held for lane in lanes]
            if block_length == 0:  # the last window is cut, and has its steps all the same
                masked += [False] * (6 - len(lanes))
            expected = reference_reveal(
                sampling.rules(model.scheme)[1],
                masked,
                [float(confidence_BV[lane, token_B[lane]]) for lane in lanes],
                [float(torch.special.entr(probs_BV[lane]).sum()) for lane in lanes],
                [0.0] * len(masked),
                steps_taken[number],
            )
            steps_taken[number] += 1
            assert state.revealed == [lane for lane, is_revealed in zip(lanes, expected, strict=False) if is_revealed]
            offset = state.block * len(state.noisy)
            assert [clean[offset + lane] for lane in state.revealed] == token_B[state.revealed].tolist()


def test_a_completion_ends_with_the_window_of_its_stop_token() -> None:
    sampling = SamplingConfig(confidence_threshold=0.05, max_completion_length=20, generation_window=6)
    model, completions = decoded(sampling, 0, 0)
    eos = TorchEngine(model, sharp_tiny_model()[1]).stop_ids
    assert {c.finish_reason for c in completions} == {"stop", "length"} or all(c.num_unwritten for c in completions)
    for completion in completions:
        num_written = len(completion.token_ids)
        stops = [i for i, token in enumerate(completion.token_ids) if token in eos]
        assert completion.num_unwritten == 20 - num_written
        assert num_written == (min((stops[0] // 6 + 1) * 6, 20) if stops else 20)
        assert completion.num_denoising_steps == max(completion.step_map)
        windows = [completion.step_map[i : i + 6] for i in range(0, num_written, 6)]
        assert all(max(left) < min(right) for left, right in pairwise(windows))


@pytest.mark.parametrize("bounds", [{"max_batch_size": 2}, {"max_cached_tokens": 60}], ids=str)
@pytest.mark.parametrize(("block_length", "shift"), [(0, 1), (4, 1)])
def test_a_sample_does_not_depend_on_its_batch(bounds: dict[str, int], block_length: int, shift: int) -> None:
    sampling = SamplingConfig(confidence_threshold=0.1, max_completion_length=15, generation_window=4)
    _, together = decoded(sampling, block_length, shift)
    _, apart = decoded(sampling, block_length, shift, **bounds)
    for one, other in zip(together, apart, strict=True):
        assert (one.token_ids, one.step_map) == (other.token_ids, other.step_map)


def test_thresholds_of_their_own_are_obeyed() -> None:
    sampling = SamplingConfig(max_completion_length=12, generation_window=12)
    model, tokenizer = sharp_tiny_model(block_length=0)
    engine = TorchEngine(model, tokenizer)
    slow, fast = engine.generate([[5, 6]] * 2, sampling, [0, 0], thresholds=[1.0, 0.01])
    assert fast.num_denoising_steps < slow.num_denoising_steps == len(slow.token_ids)
    assert (slow.confidence_threshold, fast.confidence_threshold) == (1.0, pytest.approx(0.01))


class Kept(Observer):
    """The frames of every step."""

    def __init__(self) -> None:
        self.frames: list[list[Frame]] = []

    def stepped(self, frames_of) -> None:  # type: ignore[no-untyped-def]
        self.frames.append(frames_of())


def test_an_observer_sees_the_canvas_fill() -> None:
    model, tokenizer = sharp_tiny_model(block_length=0)
    observer = Kept()
    sampling = SamplingConfig(max_completion_length=8, generation_window=4, confidence_threshold=0.0)
    (completion,) = TorchEngine(model, tokenizer, observer=observer).generate([[7]], sampling, [0])
    assert observer.frames[-1][0].token_ids == completion.token_ids
    assert [frame.is_committed for (frame,) in observer.frames] == [[True] * 4, [True] * 8][: len(observer.frames)]
