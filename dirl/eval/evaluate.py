"""A model and data sets -> samples.jsonl, results.json and report.md.

A decoding mode is a name for changes to the sampling: `dynamic` (threshold), `static` (one token a step) and `greedy`
(dynamic at temperature 0). Samples are written as they come, so that a killed evaluation continues; a changed
configuration is refused, not mixed in. Each sample has a seed of its own, from (seed, problem, sample).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dirl.config import config_to_dict, save_config
from dirl.data.chat import load_tokenizer, render_prompt
from dirl.data.problems import Problem
from dirl.eval.benchmarks import load_benchmark
from dirl.eval.report import write_report
from dirl.eval.results import ModeResult, Sample, summarise
from dirl.model.checkpoint import ModelConfig, default_device, load_model
from dirl.reward.math_answer import extract_boxed
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rollout.build import EngineConfig, build_engine
from dirl.rollout.columns import reward_columns, stable_seed
from dirl.rollout.engine import Completion, RolloutEngine, SamplingConfig

ModeName = Literal["dynamic", "static", "greedy"]


@dataclass(frozen=True, kw_only=True)
class EvalDataConfig:
    """What is asked."""

    datasets: list[str] = field(default_factory=lambda: ["task:noisy_sums"])  # benchmark names, paths, task:NAME
    limit: int = 0  # problems of each data set; 0: all
    seed: int = 0  # draws the problems of a task
    system_prompt: str = ""
    suffix: str = ""  # appended to each question


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Everything of an evaluation."""

    output_dir: str = "outputs/eval"
    seed: int = 0
    num_samples: int = 1  # k completions a problem; greedy decoding needs only one
    modes: list[ModeName] = field(default_factory=lambda: list[ModeName](["dynamic"]))
    confidence_thresholds: list[float] = field(default_factory=list)  # further dynamic runs, for a sweep
    chunk_size: int = 512  # completions between two writes of samples.jsonl
    overwrite: bool = False  # start again where samples of another configuration are found
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def __post_init__(self) -> None:
        for key in ("num_samples", "chunk_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        if "accuracy" not in self.reward.functions:
            raise ValueError("reward.functions must hold accuracy: an evaluation counts right answers")

    @property
    def fingerprint(self) -> str:
        """Changes with everything that changes a sample."""
        relevant = config_to_dict(self)
        for key in ("output_dir", "chunk_size", "overwrite", "modes", "confidence_thresholds", "engine"):
            del relevant[key]
        return hashlib.blake2b(json.dumps(relevant, sort_keys=True).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Mode:
    """One way of decoding."""

    name: str
    sampling: SamplingConfig
    num_samples: int


def decoding_modes(
    names: Sequence[ModeName], thresholds: Sequence[float], sampling: SamplingConfig, num_samples: int
) -> list[Mode]:
    """The modes of an evaluation. Greedy completions of a problem are all alike: one is enough."""
    dynamic = replace(sampling, unmasking_strategy="low_confidence_dynamic")
    static = replace(sampling, unmasking_strategy="low_confidence_static", denoising_steps=0)
    samplings: dict[ModeName, SamplingConfig] = {
        "dynamic": dynamic,
        "static": static,
        "greedy": replace(dynamic, temperature=0.0),
    }
    chosen: dict[str, SamplingConfig] = {name: samplings[name] for name in names}
    for threshold in thresholds:
        chosen[f"dynamic@{threshold:g}"] = replace(dynamic, confidence_threshold=threshold)
    return [Mode(name, s, num_samples if s.temperature > 0 else 1) for name, s in chosen.items()]


class Evaluator:
    """Decodes problems and judges the answers."""

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        rubric: Rubric,
        *,
        seed: int = 0,
        system_prompt: str = "",
        suffix: str = "",
    ) -> None:
        self.engine, self.tokenizer, self.rubric, self.seed = engine, tokenizer, rubric, seed
        self.system_prompt, self.suffix = system_prompt, suffix

    def evaluate(self, problems: Sequence[Problem], mode: Mode, *, dataset: str = "") -> ModeResult:
        """All samples of all problems in one go."""
        todo = list(product(range(len(problems)), range(mode.num_samples)))
        start = time.perf_counter()
        samples = self.samples(problems, mode, todo)
        return summarise(dataset, mode.name, mode.sampling, samples, seconds=time.perf_counter() - start)

    def samples(self, problems: Sequence[Problem], mode: Mode, todo: Sequence[tuple[int, int]]) -> list[Sample]:
        """The samples named by (problem index, sample index)."""
        asked = [problems[problem] for problem, _ in todo]
        completions = self.engine.generate(
            [
                render_prompt(self.tokenizer, problem.question, system_prompt=self.system_prompt, suffix=self.suffix)
                for problem in asked
            ],
            mode.sampling,
            [stable_seed(self.seed, *which) for which in todo],
        )
        scores = self.rubric.score(
            [problem.question for problem in asked],
            [completion.text for completion in completions],
            completion_ids=[completion.token_ids for completion in completions],
            step_maps=[completion.step_map for completion in completions],
            columns=reward_columns(asked, completions, mode.sampling.max_completion_length),
        )
        return [
            _sample(which, completion, accuracy)
            for which, completion, accuracy in zip(todo, completions, scores.parts["accuracy"], strict=True)
        ]


def run_evaluation(config: EvalConfig) -> Path:
    """Evaluate every data set in every mode; returns the report's path."""
    directory = Path(config.output_dir)
    benchmarks = [load_benchmark(name, limit=config.data.limit, seed=config.data.seed) for name in config.data.datasets]
    tokenizer = load_tokenizer(config.model.path)
    store = SampleStore(directory, config)
    model = load_model(config.model, tokenizer)
    model.to(default_device())  # type: ignore[arg-type]
    engine = build_engine(model, tokenizer, config.engine)
    modes = decoding_modes(config.modes, config.confidence_thresholds, config.sampling, config.num_samples)
    results = []
    with Rubric(config.reward) as rubric:
        evaluator = Evaluator(
            engine,
            tokenizer,
            rubric,
            seed=config.seed,
            system_prompt=config.data.system_prompt,
            suffix=config.data.suffix,
        )
        for benchmark, mode in product(benchmarks, modes):
            done = store.load(benchmark.name, mode.name)
            todo = product(range(len(benchmark.problems)), range(mode.num_samples))
            missing = [which for which in todo if which not in done]
            start, new_tokens = time.perf_counter(), 0
            for chunk in _chunks(missing, config.chunk_size):
                samples = evaluator.samples(benchmark.problems, mode, chunk)
                store.append(benchmark.name, mode.name, samples)
                done |= {(s.problem, s.sample): s for s in samples}
                new_tokens += sum(sample.completion_length for sample in samples)
            seconds = time.perf_counter() - start
            # A continued evaluation decoded only part of its samples: time those.
            timed = seconds if len(missing) == len(done) else 0.0
            ordered = [done[which] for which in sorted(done)]
            results.append(summarise(benchmark.name, mode.name, mode.sampling, ordered, seconds=timed))
    engine.close()
    return write_report(directory, config.model.path, results)


class SampleStore:
    """samples.jsonl: a header line with the configuration's fingerprint, then one line a sample."""

    def __init__(self, directory: Path, config: EvalConfig) -> None:
        self.path = directory / "samples.jsonl"
        header = {"fingerprint": config.fingerprint}
        if self.path.exists() and not config.overwrite:
            lines = self._lines()
            if not lines or lines[0] != header:
                raise FileExistsError(
                    f"{self.path} holds samples of another configuration; choose another output_dir or overwrite=true"
                )
            return
        save_config(config, directory / "config.yaml")
        self.path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def load(self, dataset: str, mode: str) -> dict[tuple[int, int], Sample]:
        """What is there already, by (problem, sample)."""
        rows = [row for row in self._lines()[1:] if (row.pop("dataset"), row.pop("mode")) == (dataset, mode)]
        return {(row["problem"], row["sample"]): Sample(**row) for row in rows}

    def append(self, dataset: str, mode: str, samples: Sequence[Sample]) -> None:
        rows = [{"dataset": dataset, "mode": mode, **asdict(sample)} for sample in samples]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))

    def _lines(self) -> list[dict[str, Any]]:
        """Complete lines; one that a kill cut short is cut off the file too, so that the next append starts clean."""
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self.path.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]


def _sample(which: tuple[int, int], completion: Completion, accuracy: float | None) -> Sample:
    return Sample(
        problem=which[0],
        sample=which[1],
        is_right=bool(accuracy),
        answer=extract_boxed(completion.text),
        text=completion.text,
        token_ids=completion.token_ids,
        step_map=completion.step_map,
        completion_length=completion.completion_length,
        num_denoising_steps=completion.num_denoising_steps,
        is_truncated=completion.is_truncated,
    )


def _chunks(items: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    return (items[start : start + size] for start in range(0, len(items), size))
