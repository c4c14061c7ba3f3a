"""What benchmarks share: model shapes, fair timings, peak memory, and where a number comes from."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import torch

from dirl.diffusion.packing import PackedViews, attention_rule
from dirl.model.checkpoint import default_device
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.sdar import SDARConfig, SDARForCausalLM
from dirl.model.kernels import use_fused_kernels
from dirl.model.tiny import tiny
from dirl.training.run_state import git_state, installed_version

# SDAR's shapes are Qwen3's: hidden, intermediate, layers, heads, key/value heads, tied embeddings.
SHAPES = {
    "0.2b": (576, 1536, 30, 8, 2, True),
    "1.7b": (2048, 6144, 28, 16, 8, True),
    "4b": (2560, 9728, 36, 32, 8, True),
    "8b": (4096, 12288, 36, 32, 8, False),
}
MODEL_NAMES = ("tiny", *SHAPES)
Name = TypeVar("Name")


def build_model(name: str) -> BlockDiffusionModel:
    """A model of that shape with random weights and a run's kernels: float32 on a CPU, bfloat16 on a GPU."""
    device = default_device()
    torch.manual_seed(0)
    if name == "tiny":
        model: Any = tiny()[0]
    else:
        hidden, intermediate, layers, heads, kv_heads, tied = SHAPES[name]
        config = SDARConfig(
            vocab_size=151_936,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=128,
            tie_word_embeddings=tied,
            max_position_embeddings=32_768,
            tokenizer_length=151_670,
        )
        with torch.device(device):
            model = SDARForCausalLM(config)
    use_fused_kernels(model, "auto")
    model.to(device)
    if device.type == "cuda":
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32, as in a loaded model
            parameter.data = parameter.data.bfloat16()
    return model


def model_fields(name: str, model: BlockDiffusionModel) -> dict[str, Any]:
    """What was run; `liger` is read from the model, which Liger's kernels are in or not."""
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "liger": "forward" in vars(model.model.norm),
    }


@dataclass(frozen=True)
class Timing:
    """Several runs of one piece of work."""

    seconds: list[float]
    peak_memory_gb: float  # of the process on a CPU, of the device's allocator on a GPU

    @property
    def best(self) -> float:
        return min(self.seconds)

    def as_fields(self) -> dict[str, Any]:
        return {
            "seconds_min": round(self.best, 4),
            "seconds_median": round(statistics.median(self.seconds), 4),
            "seconds_max": round(max(self.seconds), 4),
            "peak_memory_gb": round(self.peak_memory_gb, 3),
        }


def time_in_turn(works: Mapping[Name, Callable[[], object]], *, repeats: int, warmups: int = 1) -> dict[Name, Timing]:
    """Each piece of work several times, taking turns: a machine that slows down slows all of them."""
    for _ in range(warmups):
        for work in works.values():
            work()
    seconds: dict[Name, list[float]] = {name: [] for name in works}
    memory = dict.fromkeys(works, 0.0)
    for _ in range(repeats):
        for name, work in works.items():
            reset_peak_memory()
            start = time.perf_counter()
            work()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
            memory[name] = max(memory[name], peak_memory_gb())
    return {name: Timing(seconds[name], memory[name]) for name in works}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak starts again from here


def peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 / 1e9
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def matmul_tflops(size: int = 8192, repeats: int = 20) -> float:
    """The rate this device reaches on one large matrix product in the benchmark's precision."""
    on_gpu = torch.cuda.is_available()
    size = size if on_gpu else 1024
    a, b = (torch.randn(size, size, device=default_device(), dtype=torch.bfloat16 if on_gpu else None) for _ in "ab")
    timing = time_in_turn({"matmul": lambda: a @ b}, repeats=repeats, warmups=3)["matmul"]
    return 2 * size**3 / timing.best / 1e12


def rate_fields(
    model: BlockDiffusionModel, rows: Sequence[PackedViews], seconds: float, matmul: float
) -> dict[str, float]:
    """TFLOP/s reached in training, those of one large matrix product, and their ratio, the model FLOP utilisation."""
    tflops = training_flops(model, rows) / seconds / 1e12
    return {"tflops": round(tflops, 4), "matmul_tflops": round(matmul, 4), "mfu": round(tflops / matmul, 4)}


def training_flops(model: BlockDiffusionModel, rows: Sequence[PackedViews]) -> float:
    """Floating-point operations of one forward and backward pass over packs or rows, recomputation not counted.

    All their tokens go through the layers, the scored ones through lm_head, and attention takes the pairs it allows.
    """
    config = model.config
    num_tokens, num_pairs = sum(map(len, rows)), sum(map(count_pairs, rows))
    num_scored = sum(len(row.actions) for row in rows)
    head = config.vocab_size * config.hidden_size
    layers = sum(p.numel() for p in model.model.layers.parameters())
    attention = 4 * num_pairs * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 3 * (2 * layers * num_tokens + 2 * head * num_scored + attention)


def count_pairs(row: PackedViews) -> int:
    """(query, key) pairs the attention rule allows, counted in strips."""
    ids = row.tokens.ids
    strips = (tuple(i[start : start + 1024, None] for i in ids) for start in range(0, len(row), 1024))
    return sum(int(attention_rule(queries, tuple(i[None] for i in ids)).sum()) for queries in strips)


def print_line(benchmark: str, **fields: Any) -> None:
    """One JSON line: what was measured, where, and from which commit."""
    print(json.dumps({"benchmark": benchmark, **fields, **provenance()}), flush=True)


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit (DIRL_COMMIT where it is set) and date."""
    on_gpu = torch.cuda.is_available()
    state = git_state(Path(__file__).resolve().parents[1])
    commit = (state["git_commit"] or "unknown")[:12] + ("+changes" if state["git_dirty"] else "")
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "transformers": installed_version("transformers"),
        "python": platform.python_version(),
        "commit": os.environ.get("DIRL_COMMIT") or commit,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
