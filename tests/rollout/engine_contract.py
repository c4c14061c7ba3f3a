"""What every rollout engine must do, as a suite: subclass `EngineContract`, say how to make the engine, and run it.

The model is the tiny one with sharp distributions and a likely EOS. Nothing here looks inside an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import decode, stop_token_ids
from dirl.diffusion.unmasking import UnmaskingStrategy
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.engine import Completion, RolloutEngine, RolloutError, SamplingConfig
from tests.oracle import (
    brute_force_logprobs,
    confidence_probs,
    make_extreme,
    reference_reveal,
    sampling_probs,
    sharp_tiny_model,
    state_logits,
)
from tests.parity.packs import packed, replayed

DYNAMIC = SamplingConfig(confidence_threshold=0.1, max_completion_length=20)
FIXED_COUNTS: tuple[UnmaskingStrategy, ...] = ("low_confidence_static", "sequential", "random")


def likely_to_stop(block_length: int = 4, seed: int = 0) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """The sharp tiny model, whose completions of 20 tokens end at an EOS about as often as not."""
    model, tokenizer = sharp_tiny_model(seed, block_length=block_length)
    make_extreme(model, stop_token_ids(tokenizer), 4.0)
    return model, tokenizer


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def blocks_of(completion: Completion, block_length: int) -> list[tuple[list[int], list[int]]]:
    """(token ids, steps) of the completion part of each touched block."""
    first = block_length - len(completion.prompt_ids) % block_length
    cuts = [0, *range(first, len(completion.token_ids) + 1, block_length)]
    spans = [slice(a, b) for a, b in pairwise(cuts)]
    return [(completion.token_ids[span], completion.step_map[span]) for span in spans]


class EngineContract:
    """Subclass as `class TestXEngine(EngineContract)` and define `make_engine`."""

    takes_thresholds = True  # one for each completion
    logprob_tolerance = 1e-5  # nats, of recorded logprobs against brute force

    def make_engine(
        self, model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256
    ) -> RolloutEngine:
        raise NotImplementedError

    def decode(
        self,
        prompts: list[list[int]],
        sampling: SamplingConfig = DYNAMIC,
        *,
        first_seed: int = 0,
        block_length: int = 4,
    ) -> list[Completion]:
        engine = self.make_engine(*likely_to_stop(block_length))
        return engine.generate(prompts, sampling, range(first_seed, first_seed + len(prompts)))

    # -- shape of the answer

    def test_nothing_in_nothing_out(self) -> None:
        assert self.decode([]) == []

    @pytest.mark.parametrize("block_length", [2, 4, 8])
    def test_one_completion_per_prompt_in_order_and_whole_blocks(self, block_length: int) -> None:
        prompts = random_prompts([1, 9, 3, 8, 4, 2, 17, 5, 16, 7])
        completions = self.decode(prompts, block_length=block_length)
        assert [completion.prompt_ids for completion in completions] == prompts
        for completion in completions:
            num_tokens = len(completion.token_ids)
            assert num_tokens > 0 and (len(completion.prompt_ids) + num_tokens) % block_length == 0
            assert len(completion.step_map) == num_tokens
            assert completion.logprobs is None or len(completion.logprobs) == num_tokens

    def test_an_empty_prompt_starts_at_block_zero(self) -> None:
        (completion,) = self.decode([[]])
        assert len(completion.token_ids) % 4 == 0

    def test_one_seed_per_prompt(self) -> None:
        engine = self.make_engine(*likely_to_stop())
        with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
            engine.generate([[1], [2]], DYNAMIC, [0])

    def test_no_room_for_a_block_is_an_error(self) -> None:
        engine = self.make_engine(*likely_to_stop())
        with pytest.raises(ValueError, match=r"max_completion_length 3 leaves no room .* prompt of 4 tokens"):
            engine.generate([[1, 2, 3, 4]], SamplingConfig(max_completion_length=3), [0])

    # -- the end

    def test_stops_at_the_end_of_the_block_of_the_first_eos(self) -> None:
        model, tokenizer = likely_to_stop()
        stops = stop_token_ids(tokenizer)
        completions = self.decode(random_prompts([5, 6, 7, 8] * 8))
        reasons = [completion.finish_reason for completion in completions]
        assert {"stop", "length"} == set(reasons)
        for completion in completions:
            hits = [i for i, token in enumerate(completion.token_ids) if token in stops]
            *earlier, (last, _) = blocks_of(completion, model.config.block_size)
            assert not any(token in stops for tokens, _ in earlier for token in tokens)
            assert completion.finish_reason == ("stop" if hits else "length")
            assert any(token in stops for token in last) == bool(hits)
            assert completion.completion_length == (hits[0] + 1 if hits else len(completion.token_ids))
            before_stop = completion.token_ids[: hits[0]] if hits else completion.token_ids
            assert completion.text == decode(tokenizer, before_stop)
            assert completion.is_truncated == (not hits)
        inside = [c for c in completions if c.completion_length < len(c.token_ids)]
        assert inside, "no completion ended inside a block"

    def test_eos_in_the_prompts_tail_does_not_stop(self) -> None:
        _, tokenizer = likely_to_stop()
        eos = stop_token_ids(tokenizer)[0]
        completions = self.decode([[1, 2, 3, 4, 5, eos]] * 16)
        assert all(len(c.token_ids) > 2 for c in completions if c.finish_reason == "length")
        assert any(len(c.token_ids) > 2 for c in completions)
        assert all(eos not in c.token_ids[:2] for c in completions if len(c.token_ids) > 2)

    def test_eos_in_the_completion_part_of_the_prompts_block_does(self) -> None:
        _, tokenizer = likely_to_stop()
        stops = stop_token_ids(tokenizer)
        completions = self.decode(random_prompts([6] * 32))
        ended = [c for c in completions if any(token in stops for token in c.token_ids[:2])]
        assert ended
        assert all((len(c.token_ids), c.finish_reason) == (2, "stop") for c in ended)

    @pytest.mark.parametrize(("limit", "touched"), [(4, 2), (6, 6), (7, 6), (13, 10)])
    def test_truncation_at_the_last_block_that_fits(self, limit: int, touched: int) -> None:
        sampling = SamplingConfig(max_completion_length=limit, confidence_threshold=0.1)
        completions = self.decode([[1, 2, 3, 4, 5, 6]] * 12, sampling)
        lengths = {len(c.token_ids) for c in completions if c.finish_reason == "length"}
        assert lengths == {touched}
        assert max(len(c.token_ids) for c in completions) <= limit

    # -- steps

    @pytest.mark.parametrize("block_length", [2, 4, 8])
    @pytest.mark.parametrize("strategy", ["low_confidence_dynamic", "entropy_bounded", *FIXED_COUNTS])
    def test_step_maps_are_one_based_and_contiguous_in_each_block(
        self, strategy: UnmaskingStrategy, block_length: int
    ) -> None:
        sampling = SamplingConfig(
            unmasking_strategy=strategy, confidence_threshold=0.05, entropy_bound=4.0, max_completion_length=20
        )
        completions = self.decode(random_prompts(range(1, 10)), sampling, block_length=block_length)
        for completion in completions:
            blocks = blocks_of(completion, block_length)
            for _, steps in blocks:
                assert sorted(set(steps)) == list(range(1, max(steps) + 1))
            assert completion.num_denoising_steps == sum(max(steps) for _, steps in blocks)
            assert completion.tokens_per_step == completion.completion_length / completion.num_denoising_steps

    @pytest.mark.parametrize("denoising_steps", [0, 1, 2, 4])
    @pytest.mark.parametrize("strategy", FIXED_COUNTS)
    def test_static_counts(self, strategy: UnmaskingStrategy, denoising_steps: int) -> None:
        sampling = SamplingConfig(
            unmasking_strategy=strategy, denoising_steps=denoising_steps, max_completion_length=16
        )
        count = 4 // (denoising_steps or 4)
        for completion in self.decode(random_prompts(range(1, 9)), sampling):
            for _, steps in blocks_of(completion, 4):
                per_step = [steps.count(step) for step in range(1, max(steps) + 1)]
                assert per_step[:-1] == [count] * (len(per_step) - 1) and 0 < per_step[-1] <= count
                if strategy == "sequential":
                    assert steps == sorted(steps)

    @pytest.mark.parametrize("top_k", [0, 2])
    @pytest.mark.parametrize("strategy", ["low_confidence_dynamic", "low_confidence_static"])
    def test_greedy_reveals_what_the_strategy_says(self, strategy: UnmaskingStrategy, top_k: int) -> None:
        """Every token and step of greedy decoding from plain forwards; confidence is read before top-k cuts."""
        model, _ = likely_to_stop()
        sampling = SamplingConfig(
            temperature=0.0,
            top_k=top_k,
            unmasking_strategy=strategy,
            confidence_threshold=0.1,
            max_completion_length=12,
        )
        for completion in self.decode(random_prompts([3, 4, 9]), sampling):
            assert (completion.token_ids, completion.step_map) == greedy_by_hand(model, completion, sampling)

    # -- randomness

    def test_seeds_make_samples(self) -> None:
        engine = self.make_engine(*likely_to_stop())
        prompt = random_prompts([6])[0]
        first, again = (engine.generate([prompt] * 8, DYNAMIC, range(8)) for _ in range(2))
        assert first == again
        assert len({tuple(c.token_ids) for c in first}) == 8
        same = engine.generate([prompt] * 3, DYNAMIC, [5, 5, 5])
        assert [c.token_ids for c in same] == [first[5].token_ids] * 3

    def test_greedy_needs_no_seed(self) -> None:
        greedy = SamplingConfig(temperature=0.0, max_completion_length=12)
        completions = self.decode([random_prompts([6])[0]] * 3, greedy)
        assert completions[0].token_ids == completions[1].token_ids == completions[2].token_ids

    @pytest.mark.parametrize("max_batch_size", [1, 3, 5, 64])
    def test_a_sample_does_not_depend_on_what_shares_the_batch(self, max_batch_size: int) -> None:
        model, tokenizer = likely_to_stop()
        prompts = random_prompts([1, 9, 3, 3, 8, 4, 21, 5, 16, 7, 2])
        prompts[3] = prompts[2]
        seeds = list(range(20, 31))
        alone = self.make_engine(model, tokenizer)
        expected = [alone.generate([prompt], DYNAMIC, [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
        engine = self.make_engine(model, tokenizer, max_batch_size=max_batch_size)
        order = torch.randperm(11).tolist()
        found = engine.generate([prompts[i] for i in order], DYNAMIC, [seeds[i] for i in order])
        for completion, i in zip(found, order, strict=True):
            assert (completion.token_ids, completion.step_map) == (expected[i].token_ids, expected[i].step_map)

    def test_thresholds_of_their_own(self) -> None:
        """A completion in a mixed batch is the one that its threshold alone gives."""
        if not self.takes_thresholds:
            pytest.skip("this engine has one threshold for all")
        prompts, seeds = random_prompts([1, 9, 3, 8, 4, 2, 17, 5]) * 2, range(16)
        thresholds = [0.02, 0.1, 0.3, 0.9] * 4
        engine, sampling = self.make_engine(*likely_to_stop(), max_batch_size=5), replace(DYNAMIC, record_holds=True)
        found = engine.generate(prompts, sampling, seeds, thresholds)
        assert [completion.confidence_threshold for completion in found] == thresholds
        for prompt, seed, threshold, completion in zip(prompts, seeds, thresholds, found, strict=True):
            (alone,) = engine.generate([prompt], replace(sampling, confidence_threshold=threshold), [seed])
            assert (completion.token_ids, completion.step_map) == (alone.token_ids, alone.step_map)
            assert completion.hold_logprobs == pytest.approx(alone.hold_logprobs, abs=self.logprob_tolerance)
            assert alone.confidence_threshold is None
        steps, tokens = (
            [sum(counts[i::4]) for i in range(4)]
            for counts in ([c.num_denoising_steps for c in found], [len(c.token_ids) for c in found])
        )
        assert steps[0] / tokens[0] < steps[1] / tokens[1] < steps[3] / tokens[3]
        again = engine.generate(prompts, DYNAMIC, seeds, [DYNAMIC.confidence_threshold] * 16)
        plain = engine.generate(prompts, DYNAMIC, seeds)
        assert [replace(completion, confidence_threshold=None) for completion in again] == plain

    def test_thresholds_that_cannot_be_are_errors(self) -> None:
        engine = self.make_engine(*likely_to_stop())
        if not self.takes_thresholds:
            with pytest.raises(ValueError, match=r"one confidence_threshold for the whole .* rollout\.engine=torch"):
                engine.generate([[1]], DYNAMIC, [0], [0.5])
            return
        with pytest.raises(ValueError, match="got 1 for 2 prompts"):
            engine.generate([[1], [2]], DYNAMIC, [0, 1], [0.5])
        with pytest.raises(ValueError, match="=sequential reads no thresholds"):
            engine.generate([[1]], replace(DYNAMIC, unmasking_strategy="sequential"), [0], [0.5])

    def test_first_tokens_have_the_frequencies_of_the_model(self) -> None:
        model, tokenizer = sharp_tiny_model(block_length=2)
        sampling = SamplingConfig(
            unmasking_strategy="sequential", max_completion_length=1, top_k=4, top_p=0.95, temperature=0.5
        )
        prompt, num_samples = [11, 12, 13], 2000
        completions = self.make_engine(model, tokenizer).generate([prompt] * num_samples, sampling, range(num_samples))
        counts_V = torch.tensor([c.token_ids[0] for c in completions]).bincount(minlength=264)
        with torch.no_grad():
            logits_BV = state_logits(model, prompt, 1, [13, tokenizer.mask_token_id])  # type: ignore[list-item]
        expected_V = num_samples * sampling_probs(logits_BV, model, sampling)[1]
        possible_V = expected_V > 0
        assert 2 <= int(possible_V.sum()) <= 4
        assert int(counts_V[~possible_V].sum()) == 0
        chi_square = ((counts_V - expected_V).square() / expected_V)[possible_V].sum()
        assert float(chi_square) < 16.3  # 3 degrees of freedom: 0.1 %

    # -- what is sampled

    def test_logprobs_are_those_of_brute_force(self) -> None:
        model, _ = likely_to_stop()
        sampling = SamplingConfig(confidence_threshold=0.1, max_completion_length=12, temperature=0.8, top_k=40)
        for completion in self.decode(random_prompts([2, 5, 8, 11]), sampling):
            if completion.logprobs is None:
                pytest.skip("this engine records no logprobs")
            with torch.no_grad():
                expected = brute_force_logprobs(model, completion, sampling).tolist()
            assert completion.logprobs == pytest.approx(expected, abs=self.logprob_tolerance)

    @pytest.mark.parametrize("strategy", get_args(UnmaskingStrategy))
    def test_holds_are_those_of_the_replay(self, strategy: UnmaskingStrategy) -> None:
        model, _ = likely_to_stop()
        drawn = {"temperature": 0.8, "top_k": 40, "confidence_threshold": 0.1, "entropy_bound": 3.0}
        sampling = SamplingConfig(unmasking_strategy=strategy, max_completion_length=12, **drawn)  # type: ignore[arg-type]
        prompts = random_prompts([2, 5, 8, 11] * 2)
        completions = self.decode(prompts, replace(sampling, record_holds=True))
        if completions[0].logprobs is None:
            pytest.skip("this engine records no logprobs")
        assert [replace(c, hold_logprobs=None) for c in completions] == self.decode(prompts, sampling)
        pack_ = packed([[completion] for completion in completions], model, shared=False)
        with torch.no_grad():
            expected_T = replayed(pack_, model, sampling)[~pack_.actions.is_reveal_T]
        assert len(expected_T) > 8
        recorded = [hold for completion in completions for hold in completion.hold_logprobs or []]
        assert recorded == pytest.approx(expected_T.tolist(), abs=self.logprob_tolerance)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_forbidden_tokens_never_appear(self, temperature: float) -> None:
        model, tokenizer = likely_to_stop()
        model.config.tokenizer_length = 250
        forbidden = [*range(250, 264)]
        make_extreme(model, forbidden, 5.0)
        prompts = random_prompts([2, 5, 8, 11] * 4)
        with torch.no_grad():
            noisy = [state_logits(model, p, len(p) // 4, [263] * 4).argmax(-1) for p in prompts]
        assert float((torch.cat(noisy) >= 250).float().mean()) > 0.3, "the model does not want forbidden tokens"
        sampling = SamplingConfig(temperature=temperature, max_completion_length=16)
        completions = self.make_engine(model, tokenizer).generate(prompts, sampling, range(16))
        assert all(token < 250 for completion in completions for token in completion.token_ids)

    # -- weights

    def test_pushing_the_engines_own_module_counts(self) -> None:
        model, tokenizer = likely_to_stop()
        engine = self.make_engine(model, tokenizer)
        assert engine.weights_version == 0
        engine.update_weights(model)
        engine.update_weights(model)
        assert engine.weights_version == 2

    def test_pushed_weights_are_those_that_decode(self) -> None:
        prompts, seeds = random_prompts([3, 6, 8]), [1, 2, 3]
        donor, tokenizer = likely_to_stop(seed=5)
        expected = self.make_engine(donor, tokenizer).generate(prompts, DYNAMIC, seeds)
        engine = self.make_engine(*likely_to_stop(seed=6))
        before = engine.generate(prompts, DYNAMIC, seeds)
        engine.update_weights(donor)
        assert before != expected
        assert engine.generate(prompts, DYNAMIC, seeds) == expected
        assert engine.weights_version == 1
        with torch.no_grad():  # a copy, not a reference
            donor.model.norm.weight.zero_()
        assert engine.generate(prompts, DYNAMIC, seeds) == expected

    def test_a_push_that_failed_halfway_leaves_the_engine_unusable_until_the_next(self) -> None:
        donor, tokenizer = likely_to_stop(seed=5)
        engine = self.make_engine(*likely_to_stop(seed=6))
        broken = deepcopy(donor)
        broken.model.norm.weight = nn.Parameter(broken.model.norm.weight.to("meta"))  # nothing there to copy
        with pytest.raises((RuntimeError, ValueError, KeyError)):
            engine.update_weights(broken)
        assert engine.weights_version == 0
        with pytest.raises(RolloutError, match="update_weights"):
            engine.generate([[1, 2]], DYNAMIC, [0])
        engine.update_weights(donor)
        expected = self.make_engine(donor, tokenizer).generate([[1, 2]], DYNAMIC, [0])
        assert engine.generate([[1, 2]], DYNAMIC, [0]) == expected

    def test_sleep_and_wake_change_nothing(self) -> None:
        engine = self.make_engine(*likely_to_stop())
        before = engine.generate([[1, 2]], DYNAMIC, [0])
        engine.sleep()
        engine.wake()
        assert engine.generate([[1, 2]], DYNAMIC, [0]) == before
        engine.close()


def greedy_by_hand(
    model: BlockDiffusionModel, completion: Completion, sampling: SamplingConfig
) -> tuple[list[int], list[int]]:
    """Token ids and step map of greedy decoding with one plain forward pass per step."""
    block_length, mask = model.config.block_size, model.config.mask_token_id
    _, rule = sampling.rules(model.scheme)
    total = len(completion.prompt_ids) + len(completion.token_ids)
    sequence = list(completion.prompt_ids)
    steps: list[int] = []
    while len(sequence) < total:
        start = len(sequence) // block_length * block_length
        tail = sequence[start:]
        block, when = tail + [mask] * (block_length - len(tail)), [0] * block_length
        masked = [lane >= len(tail) for lane in range(block_length)]
        while any(masked):
            with torch.no_grad():
                logits_BV = state_logits(model, sequence, start // block_length, block)
            confidence, token = (x.tolist() for x in confidence_probs(logits_BV, model, sampling).max(-1))
            shown = reference_reveal(rule, masked, confidence, [0.0] * block_length, [0.0] * block_length)
            step = max(when) + 1
            block = [t if now else old for t, now, old in zip(token, shown, block, strict=True)]
            when = [step if now else old for now, old in zip(shown, when, strict=True)]
            masked = [is_masked and not now for is_masked, now in zip(masked, shown, strict=True)]
        sequence, steps = sequence[:start] + block, steps + when[len(tail) :]
    return sequence[len(completion.prompt_ids) :], steps
