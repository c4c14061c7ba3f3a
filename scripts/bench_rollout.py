"""Decoding speed of TorchEngine against a straightforward one-sequence block decoder, at equal outputs.

    python scripts/bench_rollout.py [--model tiny|1.7b|4b|8b] [--batch-sizes 1 16 64 256] [--completion-length 128]
    python scripts/bench_rollout.py --approximate-caches [--model DIR] [--task] [--generation-window 32]

The plain decoder is what public SDAR code does: one sequence at a time, a growing key/value cache, one forward pass
per denoising step and one more to commit a finished block. Both draw from the same random streams, so the tokens must
agree. Two tokens a step by default, about what a trained model reveals (random weights are never confident; with
--unmasking-strategy low_confidence_dynamic they reveal one). All completions have the same length, as in benchmarks of
serving engines: ends of sequence are ignored unless --stop is given. One JSON line a batch size; `speedup` is the ratio
of tokens per second in this run, in which the two took turns, each at its fastest repeat; `speedup_median` is the
median of the turns.

With --approximate-caches attention is full, and rollout.approximate_cache=none, prefix and dual take turns instead; one
line for each. `logp_difference` compares what an engine recorded with the exact replay of the same completions, in nats
a token; `greedy_equal` is the share of places where greedy decoding gives the token that it gives with none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from bench_setup import (
    MODEL_NAMES,
    build_model,
    model_fields,
    peak_memory_gb,
    print_line,
    reset_peak_memory,
    synchronize,
)
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import render_prompt
from dirl.data.tasks import noisy_sums_problems
from dirl.diffusion.distribution import counter_uniform, sample
from dirl.diffusion.unmasking import reveal_positions
from dirl.model.attention import masked_attention
from dirl.model.checkpoint import load
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import suppressed_by
from dirl.model.tiny import tiny
from dirl.rollout.engine import ApproximateCache, Completion, EngineConfig, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import logprobs


class GrowingCache:
    """Keys and values of one sequence, concatenated block by block."""

    def __init__(self, num_layers: int, block_length: int) -> None:
        self.block_length = block_length
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self.num_calls = 0
        self.keeps = True

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        layer = self.num_calls % len(self.layers)  # a forward pass asks once a layer, in their order
        self.num_calls += 1
        past = self.layers[layer]
        key, value = key_NGLE, value_NGLE
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        if self.keeps:
            self.layers[layer] = (key, value)
        block_K = torch.arange(key.shape[2], device=key.device) // self.block_length
        block_Q = block_K[-query_NHLE.shape[2] :]
        mask = (block_K <= block_Q[:, None])[None, None]
        return masked_attention(query_NHLE, key, value, mask, scaling).transpose(1, 2)


class PlainDecoder:
    """Decodes one prompt after another."""

    def __init__(self, model: BlockDiffusionModel, sampling: SamplingConfig, stop_ids: list[int]) -> None:
        self.model, self.sampling, self.stop_ids = model, sampling, stop_ids
        self.suppressed_V = suppressed_by(model)

    @torch.inference_mode()
    def generate(self, prompt_ids: list[int], seed: int) -> list[int]:
        """Completion tokens of every block touched."""
        config = self.model.config
        block_length, mask = config.block_size, config.mask_token_id
        cache = GrowingCache(config.num_hidden_layers, block_length)
        first = len(prompt_ids) // block_length
        if first:
            self._forward(cache, prompt_ids[: first * block_length], 0, keeps=True)
        tail, completion = prompt_ids[first * block_length :], []
        for block in range(first, (len(prompt_ids) + self.sampling.max_completion_length) // block_length):
            tokens = tail + [mask] * (block_length - len(tail))
            step = 0
            while mask in tokens:
                tokens = self._denoise(self._forward(cache, tokens, block, keeps=False), tokens, block, step, seed)
                step += 1
            self._forward(cache, tokens, block, keeps=True)
            new, tail = tokens[len(tail) :], []
            completion += new
            if any(token in self.stop_ids for token in new):
                break
        return completion

    def _forward(self, cache: GrowingCache, tokens: list[int], block: int, *, keeps: bool) -> Tensor:
        cache.keeps = keeps
        device = self.suppressed_V.device
        ids = torch.tensor([tokens], device=device)
        position = torch.arange(len(tokens), device=device)[None] + block * self.model.config.block_size
        hidden = self.model.model(input_ids=ids, position_ids=position, attention_plan=cache, use_cache=False)
        return hidden.last_hidden_state[0]

    def _denoise(self, hidden_BD: Tensor, tokens: list[int], block: int, step: int, seed: int) -> list[int]:
        mask, device = self.model.config.mask_token_id, hidden_BD.device
        masked = [i for i, token in enumerate(tokens) if token == mask]
        logits = self.model.lm_head(hidden_BD[masked])
        distribution, rule = self.sampling.rules(self.model.scheme)
        tempered = distribution.tempered_logprobs(logits, self.suppressed_V)
        drawn_from = distribution.sampling_logprobs(tempered)
        confidence = distribution.confidence_logprobs(logits, self.suppressed_V, tempered, drawn_from)
        count = torch.ones(len(masked), dtype=torch.int64, device=device)
        position = torch.tensor(masked, device=device) + block * len(tokens)
        drawn = sample(drawn_from, counter_uniform(count * seed, position, count * 2 * step))
        masked_B = torch.zeros(1, len(tokens), dtype=torch.bool, device=device)
        masked_B[0, masked] = True
        prob_B, nothing_B = (torch.zeros(1, len(tokens), device=device) for _ in "pn")
        prob_B[0, masked] = confidence.gather(1, drawn[:, None]).squeeze(1).exp()
        step_N = torch.full((1,), step, device=device)
        revealed = reveal_positions(rule, masked_B, prob_B, nothing_B, nothing_B, step_N=step_N)[0].tolist()
        new = list(tokens)
        for lane, token in zip(masked, drawn.tolist(), strict=True):
            if revealed[lane]:
                new[lane] = token
        return new


def model_and_tokenizer(name: str) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """A shape with random weights (the tokenizer then only says where to stop), or a checkpoint directory."""
    if name in MODEL_NAMES:
        return build_model(name).eval(), tiny()[1]
    return load(name)


def in_turn(works: Sequence[Callable[[], Any]], repeats: int) -> list[tuple[list[float], Any]]:
    """Seconds of several runs of each, and what the last one gave; they take turns, so that noise meets all alike."""
    seconds: list[list[float]] = [[] for _ in works]
    results: list[Any] = [None] * len(works)
    for _ in range(repeats):
        for index, work in enumerate(works):
            synchronize()
            start = time.perf_counter()
            results[index] = work()
            synchronize()
            seconds[index].append(time.perf_counter() - start)
    return list(zip(seconds, results, strict=True))


def sampling_of(arguments: argparse.Namespace) -> SamplingConfig:
    return SamplingConfig(
        max_completion_length=arguments.completion_length,
        unmasking_strategy=arguments.unmasking_strategy,
        denoising_steps=arguments.denoising_steps,
        generation_window=arguments.generation_window,
    )


def prompts_of(
    arguments: argparse.Namespace, model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """As many as the largest batch: random tokens of nearly one length, or problems of the embedded task."""
    count = max(arguments.batch_sizes)
    if arguments.task:
        return [render_prompt(tokenizer, problem.question) for problem in noisy_sums_problems(count, 0)]
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(250, model.config.vocab_size - 10)
    return [
        torch.randint(5, vocabulary, (arguments.prompt_length + i % 4,), generator=generator).tolist()
        for i in range(count)
    ]


def engine_of(
    arguments: argparse.Namespace,
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    approximate_cache: ApproximateCache = "none",
) -> TorchEngine:
    config = EngineConfig(max_batch_size=max(arguments.batch_sizes), approximate_cache=approximate_cache)
    engine = TorchEngine(model, tokenizer, config, compiled=arguments.compile)
    if not arguments.stop:
        engine.stop_ids = []
    return engine


def fields_of_work(arguments: argparse.Namespace, completions: Sequence[Completion]) -> dict[str, Any]:
    """What was decoded."""
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return {
        "compiled": arguments.compile,
        "stop": arguments.stop,
        "batch_size": len(completions),
        "prompt_length": None if arguments.task else arguments.prompt_length,
        "completion_length": arguments.completion_length,
        "unmasking_strategy": arguments.unmasking_strategy,
        "tokens_per_step": round(num_tokens / sum(c.num_denoising_steps for c in completions), 2),
    }


def measure_caches(arguments: argparse.Namespace) -> None:
    """Full attention: every approximate_cache against none."""
    model, tokenizer = model_and_tokenizer(arguments.model)
    if arguments.model in MODEL_NAMES:
        model.config.full_attention = True
    sampling, prompts = sampling_of(arguments), prompts_of(arguments, model, tokenizer)
    kinds = get_args(ApproximateCache)
    engines = [engine_of(arguments, model, tokenizer, kind) for kind in kinds]
    for batch_size in arguments.batch_sizes:
        batch, seeds = prompts[:batch_size], list(range(batch_size))
        reset_peak_memory()
        runs = in_turn([partial(engine.generate, batch, sampling, seeds) for engine in engines], arguments.repeats)
        greedy = [engine.generate(batch, replace(sampling, temperature=0.0), seeds) for engine in engines]
        for kind, (seconds, completions), answers in zip(kinds, runs, greedy, strict=True):
            with torch.no_grad():
                exact_T = torch.cat(logprobs(model, completions, sampling)).cpu()
            recorded_T = torch.tensor([logprob for c in completions for logprob in c.logprobs or []])
            difference_T = (exact_T - recorded_T).abs()
            pairs = [
                pair
                for one, other in zip(greedy[0], answers, strict=True)
                for pair in zip(one.token_ids, other.token_ids, strict=False)
            ]
            print_line(
                "approximate_cache",
                **model_fields(arguments.model, model),
                **fields_of_work(arguments, completions),
                task=arguments.task,
                generation_window=arguments.generation_window,
                approximate_cache=kind,
                seconds_min=round(min(seconds), 4),
                speedup=round(min(runs[0][0]) / min(seconds), 2),
                logp_difference_mean=round(float(difference_T.mean()), 6),
                logp_difference_max=round(float(difference_T.max()), 6),
                greedy_equal=round(sum(one == other for one, other in pairs) / len(pairs), 4),
                peak_memory_gb=round(peak_memory_gb(), 3),
            )


def measure(arguments: argparse.Namespace) -> None:
    model, tokenizer = model_and_tokenizer(arguments.model)
    sampling, prompts = sampling_of(arguments), prompts_of(arguments, model, tokenizer)
    engine = engine_of(arguments, model, tokenizer)
    plain = PlainDecoder(model, sampling, engine.stop_ids)
    few = prompts[: arguments.plain_sequences]
    for batch_size in arguments.batch_sizes:
        batch, seeds = prompts[:batch_size], list(range(batch_size))
        engine.generate(batch[:1], sampling, seeds[:1])
        reset_peak_memory()  # the peak is the engine's: the plain decoder keeps one sequence
        (plain_seconds, expected), (seconds, completions) = in_turn(
            [
                lambda: [plain.generate(p, i) for i, p in enumerate(few)],
                lambda b=batch, s=seeds: engine.generate(b, sampling, s),
            ],
            arguments.repeats,
        )
        pairs = list(zip(expected, completions, strict=False))
        num_plain, num_tokens = sum(map(len, expected)), sum(len(c.token_ids) for c in completions)
        plain_rate, rate = num_plain / min(plain_seconds), num_tokens / min(seconds)
        in_each_turn = [num_tokens / ours / (num_plain / s) for s, ours in zip(plain_seconds, seconds, strict=True)]
        print_line(
            "rollout",
            **model_fields(arguments.model, model),
            **fields_of_work(arguments, completions),
            engine_tokens_per_s=round(rate, 1),
            plain_tokens_per_s=round(plain_rate, 1),
            speedup=round(rate / plain_rate, 2),
            speedup_median=round(statistics.median(in_each_turn), 2),  # of the turns
            repeats=arguments.repeats,
            peak_memory_gb=round(peak_memory_gb(), 3),
            compared=len(pairs),
            equal=sum(plain_ids == completion.token_ids for plain_ids, completion in pairs),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help=f"{', '.join(MODEL_NAMES)} (random weights) or a directory")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--completion-length", type=int, default=128)
    parser.add_argument("--unmasking-strategy", default="low_confidence_static", help="as rollout.unmasking_strategy")
    parser.add_argument(
        "--denoising-steps", type=int, default=2, help="steps a block, for strategies with a fixed count"
    )
    parser.add_argument("--plain-sequences", type=int, default=8, help="how many prompts the plain decoder decodes")
    parser.add_argument("--compile", action="store_true", help="the engine with rollout.compile=always")
    parser.add_argument("--stop", action="store_true", help="end completions at an end-of-sequence token")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--approximate-caches", action="store_true", help="full attention, over each of them")
    parser.add_argument("--generation-window", type=int, default=32, help="full attention: tokens of a window")
    parser.add_argument("--task", action="store_true", help="prompts of task:noisy_sums, of lengths of their own")
    arguments = parser.parse_args()
    (measure_caches if arguments.approximate_caches else measure)(arguments)


if __name__ == "__main__":
    main()
