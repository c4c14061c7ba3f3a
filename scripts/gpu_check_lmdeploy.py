"""LMDeploy's engine on a GPU: what no CPU test can show. One JSON line a result; exit status 1 where something failed.

    python scripts/gpu_check_lmdeploy.py [--models tiny 1.7b 8b] [--parts parity push sleep speed steps]

Models have random weights. parity: engine against trainer, both in bfloat16, nats. push: seconds of update_weights.
sleep: seconds and device memory of sleep and wake at both levels. speed: tokens a second against TorchEngine at equal
work. steps: three RL steps with trainer and engine on this GPU (1.7b only). Needs no network; see docs/lmdeploy.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_setup import build_model, print_line, synchronize
from torch import Tensor

from dirl.data.problems import Problem
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import ViewedDocument, pack
from dirl.diffusion.views import replay_views
from dirl.model.checkpoint import default_device
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.rollout.engine import RolloutEngine, SamplingConfig
from dirl.rollout.lmdeploy.engine import LMDeployEngine
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import trajectory_of

PARTS = ("parity", "push", "sleep", "speed", "steps")


def prompts_of(count: int, length: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, min(vocab_size, 150_000), (count, length), generator=generator).tolist()


def seconds_of(work: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def used_gb() -> float:
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


def parity(name: str, model: BlockDiffusionModel, engine: LMDeployEngine) -> None:
    """Recorded logprobs, of holds too, against the packed scorer of the trainer; whether a group is diverse."""
    sampling = SamplingConfig(max_completion_length=64, unmasking_strategy="low_confidence_static", denoising_steps=2)
    prompts = prompts_of(32, 100, model.config.vocab_size)
    completions = engine.generate(prompts, replace(sampling, record_holds=True), range(32))
    differences: dict[str, list[Tensor]] = {"logp": [], "hold_logp": []}
    for completion in completions:
        trajectory = trajectory_of(completion, model.scheme)
        views = replay_views(trajectory, model.scheme.mask_token_id)
        document = ViewedDocument(trajectory.prompt_ids, [views])
        packed = pack([document], model.scheme.block_length).to(default_device())
        rule = ScoringRule(*sampling.rules(model.scheme), suppressed_by(model))
        with torch.no_grad():
            scored_T = PackedScorer(model)(packed, rule).logprob_T.cpu()
        is_reveal_T = packed.actions.is_reveal_T.cpu()
        place = packed.actions.completion_index_T.cpu()[is_reveal_T]
        recorded = torch.tensor(completion.logprobs)[place], torch.tensor(completion.hold_logprobs)
        scored = scored_T[is_reveal_T], scored_T[~is_reveal_T]
        for kind, ours, theirs in zip(differences, recorded, scored, strict=True):
            differences[kind].append((ours - theirs).abs())
    found = {kind: torch.cat(parts) for kind, parts in differences.items()}
    print_line(
        "lmdeploy_parity",
        model=name,
        tokens=len(found["logp"]),
        **{f"{kind}_difference_mean": round(float(parts.mean()), 5) for kind, parts in found.items()},
        **{f"{kind}_difference_max": round(float(parts.max()), 5) for kind, parts in found.items()},
    )
    group = engine.generate(prompts[:1] * 8, sampling, range(8))
    print_line("lmdeploy_distinct", model=name, distinct=len({tuple(c.token_ids) for c in group}), of=8)
    again = engine.generate(prompts[:1] * 8, sampling, range(8))
    same = sum(a.token_ids == b.token_ids for a, b in zip(group, again, strict=True))
    print_line("lmdeploy_repeats", model=name, same=same, of=8)  # CUDA graphs replayed: nothing left over


def push(name: str, model: BlockDiffusionModel, engine: LMDeployEngine) -> None:
    seconds = [seconds_of(lambda: engine.update_weights(model)) for _ in range(6)]
    size = sum(p.numel() for p in model.parameters()) * 2 / 1e9
    print_line(
        "lmdeploy_push",
        model=name,
        gigabytes=round(size, 2),
        seconds_first=round(seconds[0], 4),
        seconds_median=round(statistics.median(seconds[1:]), 4),
    )


def sleep(name: str, model: BlockDiffusionModel, engine: LMDeployEngine) -> None:
    for level in (1, 2):
        engine.sleep_level = level  # type: ignore[assignment]
        awake = used_gb()
        asleep_seconds = seconds_of(engine.sleep)
        asleep = used_gb()
        push_seconds = seconds_of(lambda: engine.update_weights(model))
        wake_seconds = seconds_of(engine.wake)
        engine.generate(prompts_of(4, 20, model.config.vocab_size), SamplingConfig(max_completion_length=8), range(4))
        print_line(
            "lmdeploy_sleep",
            model=name,
            level=level,
            seconds_sleep=round(asleep_seconds, 3),
            seconds_push_asleep=round(push_seconds, 3),
            seconds_wake=round(wake_seconds, 3),
            gigabytes_awake=round(awake, 1),
            gigabytes_asleep=round(asleep, 1),
        )


def speed(name: str, model: BlockDiffusionModel, engine: LMDeployEngine) -> None:
    """Two tokens a step, as a trained model reveals about; no EOS in sight."""
    sampling = SamplingConfig(max_completion_length=64, unmasking_strategy="low_confidence_static", denoising_steps=2)
    engines: dict[str, RolloutEngine] = {"lmdeploy": engine, "torch": TorchEngine(model, tiny()[1], compiled=True)}
    for batch_size in (64, 256):
        prompts = prompts_of(batch_size, 200, model.config.vocab_size)
        rates = {
            engine_name: round(tokens_per_second(decoder, prompts, sampling), 1)
            for engine_name, decoder in engines.items()
        }
        print_line(
            "lmdeploy_speed",
            model=name,
            batch_size=batch_size,
            tokens_per_s=rates["lmdeploy"],
            torch_engine_tokens_per_s=rates["torch"],
            ratio=round(rates["lmdeploy"] / rates["torch"], 2),
        )


def tokens_per_second(engine: RolloutEngine, prompts: list[list[int]], sampling: SamplingConfig) -> float:
    engine.generate(prompts, sampling, range(len(prompts)))
    found: list[Any] = []
    seconds = seconds_of(lambda: found.extend(engine.generate(prompts, sampling, range(len(prompts)))))
    return sum(len(completion.token_ids) for completion in found) / seconds


def steps(name: str, model: BlockDiffusionModel) -> None:
    """Rollout, sleep, train, push, wake: three times, on one GPU."""
    with tempfile.TemporaryDirectory() as directory:
        config = RLConfig(
            output_dir=directory,
            max_steps=3,
            bf16=True,
            max_tokens_per_micro_batch=16_384,
            rollout=RolloutConfig(
                engine="lmdeploy",
                cache_max_entry_count=0.3,
                prompts_per_step=16,
                num_generations=8,
                dynamic_sampling=False,
                max_completion_length=128,
            ),
            reward=RewardConfig(functions=[f"{Path(__file__).resolve()}:first_token_is_even"]),
        )
        problems = [Problem("What is 2 + 2?" + "?" * i, "4", {}) for i in range(64)]
        # Float32 weights under autocast: what one process trains without a sharded optimizer's master weights.
        trainer = RLTrainer(config, model=model.float(), tokenizer=tiny()[1], problems=problems)
        try:
            for step in range(3):
                metrics = trainer.step() | trainer.timings.drain()
                kept = {
                    key: round(value, 4) for key, value in metrics.items() if key.startswith(("timing", "sampling"))
                }
                peak = torch.cuda.max_memory_allocated() / 1e9
                print_line("lmdeploy_rl_step", model=name, step=step + 1, peak_memory_gb=round(peak, 1), **kept)
        finally:
            trainer.engine.close()


def first_token_is_even(
    prompts: list[str], completions: list[str], *, completion_ids: list[list[int]], **_: object
) -> list[float | None]:
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "1.7b", "8b"])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    failures = 0
    for name in arguments.models:
        failures += check_model(name, arguments.parts)
        gc.collect()
        torch.cuda.empty_cache()
    return int(failures > 0)


def check_model(name: str, parts: list[str]) -> int:
    """How many parts failed; the others are still measured."""
    model = build_model(name).eval()
    failures = 0
    one_engine: dict[str, Callable[..., None]] = {"parity": parity, "push": push, "sleep": sleep, "speed": speed}
    chosen = [part for part in one_engine if part in parts]
    engine = None
    try:
        if chosen:
            start = time.perf_counter()
            engine = LMDeployEngine(model, tiny()[1], max_batch_size=256, cache_max_entry_count=0.4)
            print_line("lmdeploy_start", model=name, seconds=round(time.perf_counter() - start, 1))
        for part in chosen:
            failures += attempt(part, name, lambda part=part: one_engine[part](name, model, engine))
    except Exception as error:
        failures += report(error, "start", name)
    finally:
        if engine is not None:
            engine.close()
            del engine
            gc.collect()
            torch.cuda.empty_cache()
    if "steps" in parts and name == "1.7b":
        failures += attempt("steps", name, lambda: steps(name, model.train()))
    return failures


def attempt(part: str, name: str, work: Callable[[], None]) -> int:
    try:
        work()
    except Exception as error:  # reported, counted, and the next part measured
        return report(error, part, name)
    return 0


def report(error: Exception, part: str, name: str) -> int:
    traceback.print_exc()
    print_line("lmdeploy_failed", model=name, part=part, error=f"{type(error).__name__}: {error}"[:300])
    return 1


if __name__ == "__main__":
    sys.exit(main())
