"""metrics.jsonl and run.json -> what a run cost: hours by phase, tokens, rates, and how well its GPUs were used.

A step that `logging_steps` left out of the log counts like the next that was logged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

from dirl.show.metric_table import TABLE

# Phases of a step, one after another; what the step takes beside them is "other". SFT's step is training as a whole.
_AFTER_STEP = ("eval", "save")
_TIMED = [row.name for row in TABLE.rows if row.name.startswith("timing_s/") and not row.part]
_IN_STEP = [phase for phase in (name.removeprefix("timing_s/") for name in _TIMED) if phase not in _AFTER_STEP]
# Matrix products of a GPU in bfloat16, without sparsity, in 1e12 operations a second; the first name that fits counts.
# Source: the makers' data sheets.
_PEAKS = (
    *(("B200", 2250), ("H100 PCIe", 756), ("H100 NVL", 835), ("H200", 989), ("H100", 989), ("H800", 989), ("H20", 148)),
    *(("A100", 312), ("A800", 312), ("L40S", 362), ("L40", 181), ("L4", 121), ("A10", 125), ("RTX 4090", 165)),
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run has cost so far."""

    seconds: Mapping[str, float] = field(default_factory=dict)  # by phase, those that took any; their sum is the whole
    engine_seconds: float = 0.0  # decoding beside the trainer, in no phase
    trained: float = 0.0  # packed tokens of all optimizer steps: clean ones and views
    rolled_out: float = 0.0  # completion tokens up to their ends
    devices: int = 0  # GPUs of the run, or cores it may use; 0: not known
    device: str = "core"  # or GPU
    mfu: float | None = None  # share of the GPUs' peak that training used; None: peak or model not known

    @property
    def total_seconds(self) -> float:
        """Time of steps, evaluations and checkpoints."""
        return sum(self.seconds.values())

    def train_rate(self) -> float:
        """Tokens trained in a second of training, per device."""
        return _per(self.trained, self.seconds.get("train", 0.0) * self.devices)

    def rollout_rate(self) -> float:
        """Tokens rolled out in a second of decoding, per device."""
        return _per(self.rolled_out, (self.seconds.get("rollout", 0.0) + self.engine_seconds) * self.devices)

    def device_hours(self, seconds: float) -> str:
        """Such as "0.52 core-h"; "-" where the devices are not known."""
        return f"{seconds / 3600 * self.devices:.2f} {self.device}-h" if self.devices else "-"


def cost_of(rows: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> Cost:
    """The cost of a run.

    Args:
        rows: of its metrics.jsonl.
        record: its run.json, or empty.
    """
    settings = record.get("config", {})
    weights = _steps_of(rows, settings)
    seconds = dict.fromkeys((*_IN_STEP, "other", *_AFTER_STEP), 0.0)
    for row, weight in zip(rows, weights, strict=True):
        for phase, spent in _phases(row):
            seconds[phase] += spent * (1.0 if phase in _AFTER_STEP else weight)
    device, devices = _devices(record)
    trained = _total(rows, weights, "num_tokens")
    return Cost(
        seconds={phase: spent for phase, spent in seconds.items() if spent},
        engine_seconds=_total(rows, weights, "engine_s/rollout"),
        trained=trained,
        rolled_out=_total(rows, weights, "num_completion_tokens"),
        devices=devices,
        device=device,
        mfu=_mfu(trained, seconds["train"] * devices, record),
    )


def cost_table(cost: Cost) -> list[list[str]]:
    """Rows for people, a head first: each phase, all of them, and what came of it."""
    total = cost.total_seconds
    rows = [["phase", "time", "share", f"{cost.device}-hours"]]
    for phase, spent in cost.seconds.items():
        share = f"{100 * spent / total:.1f} %"
        rows.append([phase.replace("_", " "), clock(spent), share, cost.device_hours(spent)])
    rows.append(["all", clock(total), "100 %", cost.device_hours(total)])
    rows.append(["tokens", "number", "per second", f"per second and {cost.device}"])
    for name, count, rate in (
        ("trained", cost.trained, cost.train_rate()),
        ("rolled out", cost.rolled_out, cost.rollout_rate()),
    ):
        if count:
            rows.append([name, brief(count), brief(rate * cost.devices), brief(rate)])
    if cost.mfu is not None:
        rows.append(["model FLOPs utilisation", f"{100 * cost.mfu:.1f} %", "", ""])
    return rows


def clock(seconds: float) -> str:
    """Such as 1:02:03; below ten seconds with a digit behind the point."""
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))


def brief(count: float) -> str:
    """Three digits of a number, such as 1.2 M; "-" for none."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.3g}" if count else "-"


def _steps_of(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> list[float]:
    """How many batches each row stands for: its own, and those since the row before."""
    per_row = settings.get("num_iterations", 1) * settings.get("steps_per_generation", 1)
    steps = [0, *(row["step"] for row in rows)]
    return [max(1.0, (now - before) / per_row) for before, now in pairwise(steps)]


def _phases(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Seconds of a row by phase."""
    step = row.get("timing_s/step") or 0.0
    parts = {phase: row.get(f"timing_s/{phase}") or 0.0 for phase in _IN_STEP}
    if not parts["train"]:  # of SFT, which has no other phase
        parts["train"] = step - sum(parts.values())
    yield from parts.items()
    yield "other", max(step - sum(parts.values()), 0.0)
    for phase in _AFTER_STEP:
        yield phase, row.get(f"timing_s/{phase}") or 0.0


def _total(rows: Sequence[Mapping[str, Any]], weights: Sequence[float], name: str) -> float:
    return sum((row.get(name) or 0.0) * weight for row, weight in zip(rows, weights, strict=True))


def _devices(record: Mapping[str, Any]) -> tuple[str, int]:
    """What a run occupies: a GPU a process; without GPUs the threads of its processes, at most all cores."""
    hardware = record.get("hardware", {})
    gpus, processes = hardware.get("gpus") or [], record.get("num_processes")
    if gpus:
        return "GPU", processes or len(gpus)
    cores = hardware.get("cpu_cores") or 0
    threads = hardware.get("threads_per_process")
    return "core", min(cores, threads * (processes or 1)) if threads else cores


def _mfu(trained: float, device_seconds: float, record: Mapping[str, Any]) -> float | None:
    """Operations that training needs over those that its GPUs could have done meanwhile.

    Counted are the matrices of the layers: two operations a weight and token forward, twice that backward, without the
    weights' own gradients where only adapters are trained. Attention, the head and all passes without gradient are not,
    so that it is a lower bound.
    """
    config, gpus = record.get("config", {}), record.get("hardware", {}).get("gpus") or [""]
    weights = record.get("model", {}).get("layer_weights_per_token")
    peak = next((peak for name, peak in _PEAKS if name in gpus[0]), None)
    is_bf16 = config.get("bf16") or config.get("model", {}).get("dtype") == "bfloat16"
    if not (weights and peak and is_bf16 and device_seconds):
        return None
    operations = 4 if config.get("lora", {}).get("r") else 6
    return operations * weights * trained / (device_seconds * peak * 1e12)


def _per(count: float, seconds: float) -> float:
    return count / seconds if seconds else 0.0
