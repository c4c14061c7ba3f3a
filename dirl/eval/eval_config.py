"""What an evaluation is told: model, data sets, and modes of decoding.

A mode is a name for changes to the sampling: `dynamic` (threshold), `static` (one token a step), `greedy` (dynamic at
temperature 0) and `custom` (none).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

from dirl.config import PATH, Config, bounded
from dirl.errors import UserError
from dirl.eval.benchmarks import Benchmark, Dates, load_benchmarks
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.registry import published_decoder
from dirl.presets import Presets
from dirl.reward.rubric import JUDGES, RewardConfig
from dirl.rollout.engine import EngineConfig, SamplingConfig

ModeName = Literal["dynamic", "static", "greedy", "custom"]


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig(Config):
    """What is asked."""

    # benchmark names, paths, task:NAME
    datasets: list[str] = field(default_factory=lambda: ["task:noisy_sums"], metadata=PATH)
    limit: int = bounded(0, least=0)  # problems of each data set; 0: all
    columns: dict[str, str] = field(default_factory=dict)  # of paths: {name that is read: name in the data}
    seed: int = bounded(0, least=0, below=2**32)  # draws the problems of a task
    system_prompt: str = ""
    suffix: str = ""  # appended to each question that does not say what its answer must look like
    skip_bad_rows: bool = False
    start_date: str = ""  # of LiveCodeBench: the first day whose problems count, YYYY-MM-DD; empty: all
    end_date: str = ""  # and the last

    def check(self) -> None:
        for key in ("start_date", "end_date"):
            value = getattr(self, key)
            if value and not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
                raise UserError(f"{key} must be a day such as 2025-01-31, got {value!r}")
        if self.start_date and self.end_date and self.start_date > self.end_date:
            raise UserError(f"end_date={self.end_date} is before start_date={self.start_date}")

    def load(self) -> list[Benchmark]:
        """The data sets."""
        dates = Dates(self.start_date, self.end_date)
        how = {name: getattr(self, name) for name in ("limit", "seed", "skip_bad_rows", "columns")}
        return load_benchmarks(self.datasets, **how, dates=dates)


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """Everything of an evaluation."""

    PRESETS: ClassVar[Mapping[str, Presets]] = {"sampling": published_decoder}

    output_dir: str = field(default="outputs/eval", metadata=PATH)
    seed: int = bounded(0, least=0, below=2**32)
    num_samples: int = bounded(1, least=1)  # k completions a problem; greedy decoding needs only one
    modes: list[ModeName] = field(default_factory=lambda: list[ModeName](["dynamic"]))
    # further dynamic runs, for a sweep
    confidence_thresholds: list[float] = field(default_factory=list, metadata={"least": 0, "most": 1})
    chunk_size: int = bounded(512, least=1)  # completions of each process between two writes of samples.jsonl
    overwrite: bool = False  # start again where samples of another configuration or model are found
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> None:
        if Path(self.output_dir).is_file():
            raise UserError(f"output_dir={self.output_dir} is a file; name a directory")
        if not set(JUDGES) & set(self.reward.functions):
            raise UserError(f"reward.functions must hold {' or '.join(JUDGES)}: an evaluation counts right answers")
        if not self.decoding_modes:
            raise UserError("modes is empty; name at least one of dynamic, static, greedy, custom")
        default = SamplingConfig()
        for key in ("unmasking_strategy", "denoising_steps"):
            value = getattr(self.sampling, key)
            if "custom" not in self.modes and value != getattr(default, key):
                raise UserError(f"sampling.{key}={value} is read by the mode custom only; add custom to modes")

    @property
    def decoding_modes(self) -> list[Mode]:
        return decoding_modes(self.modes, self.confidence_thresholds, self.sampling, self.num_samples)


@dataclass(frozen=True)
class Mode:
    """One way of decoding."""

    name: str
    sampling: SamplingConfig
    num_samples: int
    # prompts (token ids) -> the confidence threshold of each; None: that of the sampling
    thresholds_of: Callable[[Sequence[Sequence[int]]], list[float]] | None = None


def decoding_modes(
    names: Sequence[ModeName], thresholds: Sequence[float], sampling: SamplingConfig, num_samples: int
) -> list[Mode]:
    """The modes of an evaluation. Greedy completions of a problem are all alike: one is enough."""
    dynamic = replace(sampling, unmasking_strategy="low_confidence_dynamic")
    samplings: dict[ModeName, SamplingConfig] = {
        "dynamic": dynamic,
        "static": replace(sampling, unmasking_strategy="low_confidence_static", denoising_steps=0),
        "greedy": replace(dynamic, temperature=0.0),
        "custom": sampling,
    }
    chosen: dict[str, SamplingConfig] = {name: samplings[name] for name in names}
    for threshold in thresholds:
        if "dynamic" not in names or threshold != sampling.confidence_threshold:
            chosen[f"dynamic@{threshold:g}"] = replace(dynamic, confidence_threshold=threshold)
    return [Mode(name, s, num_samples if s.temperature > 0 else 1) for name, s in chosen.items()]
