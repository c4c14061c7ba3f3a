"""LMDeploy 0.18.0 with its own model and its own Triton kernels on a CPU, under Triton's interpreter: a program.

    TRITON_INTERPRET=1 python -m tests.rollout.lmdeploy.interpreted

Decodes with a tiny SDAR in float16, pushes other weights twice, sleeps at both levels, and prints one JSON line each:
the largest and mean difference between the logprobs that the engine recorded and those of dirl's model with the same
weights. Only CUDA's streams, its queries of the device and the word "cuda" are replaced. Needs triton 3.6 and numpy
below 2.4 (the interpreter's own limits); see test_lmdeploy_kernels.py.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dirl.rollout.engine import SamplingConfig
from dirl.rollout.replay import logprobs
from tests.rollout.engine_contract import likely_to_stop, random_prompts
from tests.rollout.lmdeploy.on_cpu import GIB, Event, Stream, to_cpu

SAMPLING = SamplingConfig(confidence_threshold=0.1, max_completion_length=8)
PROMPTS = random_prompts([1, 9, 3, 8])


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        _replace_device(patch)
        _replace_kernel_parts(patch)
        from dirl.rollout.lmdeploy.engine import LMDeployEngine

        models = [likely_to_stop(seed=seed)[0] for seed in range(3)]
        tokenizer = likely_to_stop()[1]
        for level in (1, 2):
            engine = LMDeployEngine(
                models[0],
                tokenizer,
                max_batch_size=8,
                sleep_level=level,
                eager_mode=True,
                dtype="float16",
                num_gpu_blocks=32,
            )
            _report(f"start, level {level}", engine, models[0])
            for push, model in enumerate(models[1:], 1):
                engine.sleep()
                engine.update_weights(model)
                engine.wake()
                _report(f"push {push}, asleep at level {level}", engine, model)
            engine.close()


def _report(name: str, engine: Any, model: Any) -> None:
    started = time.perf_counter()
    completions = engine.generate(PROMPTS, SAMPLING, range(len(PROMPTS)))
    seconds = time.perf_counter() - started
    with torch.no_grad():
        expected = torch.cat(logprobs(model, completions, SAMPLING))
    found = torch.tensor([x for completion in completions for x in completion.logprobs])
    difference = (found - expected).abs()
    row = {"name": name, "max": float(difference.max()), "mean": float(difference.mean()), "seconds": round(seconds, 1)}
    print(json.dumps(row), flush=True)


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call


def _replace_device(patch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=2, major=8, minor=0, name="cpu", uuid="0", warp_size=32)
    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": lambda *_: nullcontext(),
        "current_stream": lambda *_: Stream(),
        "synchronize": lambda *_: None,
        "empty_cache": lambda *_: None,
        "current_device": lambda: torch.device("cpu"),
        "device": lambda *_: nullcontext(),
        "graph_pool_handle": lambda: 0,
        "get_device_capability": lambda *_: (8, 0),
        "get_device_properties": lambda *_: properties,
    }.items():
        patch.setattr(torch.cuda, name, value)
    patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    for name in ("zeros", "empty", "ones", "full", "arange", "tensor", "as_tensor"):
        patch.setattr(torch, name, _on_cpu(getattr(torch, name)))
    from lmdeploy.pytorch import envs
    from lmdeploy.pytorch.engine.model_agent import agent as stock

    patch.setattr(envs, "skip_warmup", True)
    patch.setattr(stock, "get_gpu_memory", lambda *_: (GIB, GIB))
    patch.setattr(stock, "_try_to_cuda", to_cpu)
    patch.setattr(stock, "build_patched_model", _on_cpu(stock.build_patched_model))


def _replace_kernel_parts(patch: pytest.MonkeyPatch) -> None:
    """Aliases that the kernels took of Triton's functions before the interpreter could replace those."""
    import triton.language as tl

    for module, parts in {
        "flashattention": {"tl_log2": lambda x: tl.log2(x), "tl_exp2": lambda x: tl.exp2(x)},
        "pagedattention": {
            "tl_log2": lambda x: tl.log2(x),
            "tl_exp2": lambda x: tl.exp2(x),
            "fast_dividef": lambda x, y: x / y,
            "is_cuda": lambda: False,
        },
        "activation": {"fast_expf": lambda x: tl.exp(x)},
    }.items():
        name = f"lmdeploy.pytorch.kernels.cuda.{module}"
        importlib.import_module(name)
        for part, replacement in parts.items():
            patch.setattr(sys.modules[name], part, replacement)  # the package names functions like their modules


if __name__ == "__main__":
    main()
