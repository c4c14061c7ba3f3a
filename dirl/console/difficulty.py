"""`dirl difficulty`: a model and a data set -> the same rows with the share of the model's answers that are right.

It is an evaluation of the data set's problems: decoded, judged, kept and continued as `dirl eval` does it, in the
folder OUT.samples. `data.pass_rate` of an RL run reads the column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from dirl.config import Config, bounded
from dirl.data.problems import PASS_RATE, Problem, problem_from_row, with_all_columns
from dirl.data.row_source import open_rows
from dirl.data.rows import convert_rows
from dirl.errors import UserError
from dirl.eval.benchmarks import Benchmark
from dirl.eval.eval_config import EvalConfig, EvalDataConfig
from dirl.eval.evaluate import run_evaluation
from dirl.eval.sample_store import SAMPLES, read_samples
from dirl.files import write_whole
from dirl.model.checkpoint import ModelConfig
from dirl.presets import Presets
from dirl.reward.rubric import RewardConfig
from dirl.rollout.engine import EngineConfig, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class DifficultyDataConfig(Config):
    """What is asked, as in an RL run."""

    limit: int = bounded(0, least=0)  # rows read, and written; 0: all
    columns: dict[str, str] = field(default_factory=dict)  # {name that dirl or a reward reads: name in the data}
    system_prompt: str = ""
    suffix: str = ""  # appended to each question
    skip_bad_rows: bool = False  # they are not written


@dataclass(frozen=True, kw_only=True)
class DifficultyConfig(Config):
    """How pass rates are found: as the completions of an RL run would be sampled and judged."""

    PRESETS: ClassVar[Mapping[str, Presets]] = EvalConfig.PRESETS

    k: int = bounded(8, least=1)  # completions a problem
    seed: int = bounded(0, least=0, below=2**32)
    chunk_size: int = bounded(512, least=1)  # completions of each process between two writes of samples.jsonl
    overwrite: bool = False  # start again where samples of another configuration or model are found
    model: ModelConfig = field(default_factory=ModelConfig)  # its path is MODEL
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DifficultyDataConfig = field(default_factory=DifficultyDataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)

    def check(self) -> None:
        if self.k > 1 and self.sampling.temperature == 0:
            raise UserError(f"k={self.k} completions of sampling.temperature=0 are all alike; raise it, or set k=1")


class Difficulty:
    """The pass rates of a data set.

    Args:
        data: a file or a hub data set, of which the split `train` is read.
        out: a .jsonl file to write.
    Raises:
        UserError: one of them cannot be read or written so.
    """

    def __init__(self, data: str, out: str, config: DifficultyConfig) -> None:
        self.data, self.out, self.config = data, Path(out), config
        self._samples = Path(f"{out}.samples")
        self._check_paths()
        rows = open_rows(data, split="train").scan()
        how = {name: getattr(config.data, name) for name in ("columns", "limit", "skip_bad_rows")}
        found = list(convert_rows(data, rows, _problem_of, **how))
        self._rows = [row.content for row, _ in found]
        self._benchmark = Benchmark(Path(data).stem, with_all_columns([problem for _, problem in found]))

    def evaluate(self) -> None:
        """Decode and judge what is not in OUT.samples yet; on every process."""
        config = self.config
        evaluation = EvalConfig(
            output_dir=str(self._samples),
            seed=config.seed,
            num_samples=config.k,
            modes=["custom"],
            chunk_size=config.chunk_size,
            overwrite=config.overwrite,
            model=config.model,
            engine=config.engine,
            data=EvalDataConfig(
                datasets=[self.data],
                limit=config.data.limit,
                system_prompt=config.data.system_prompt,
                suffix=config.data.suffix,
                skip_bad_rows=config.data.skip_bad_rows,
            ),
            sampling=config.sampling,
            reward=config.reward,
        )
        run_evaluation(evaluation, [self._benchmark])

    def write(self) -> str:
        """OUT, whole, from the samples; a line about it. On one process."""
        samples, k = read_samples(self._samples / SAMPLES)[self._benchmark.name, "custom"], self.config.k
        rates = [fmean(samples[row, sample].correct for sample in range(k)) for row in range(len(self._rows))]
        rated = [{**row, PASS_RATE: rate} for row, rate in zip(self._rows, rates, strict=True)]  # type: ignore[dict-item]
        write_whole(self.out, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rated))
        never, always = (sum(rate == end for rate in rates) for end in (0, 1))
        return f"pass rates: {self.out} (mean {fmean(rates):.3f} of {len(rates)}; {never} never right, {always} always)"

    def _check_paths(self) -> None:
        if self.data.startswith("task:"):
            raise UserError(f"{self.data} has no rows to write a column into; name a file or a hub data set")
        if self.out.suffix != ".jsonl":
            raise UserError(f"{self.out} must end in .jsonl: one row a line is written")
        if self.out.exists() and not self._samples.is_dir():
            raise UserError(f"{self.out} is there, and {self._samples} is not: it is another file; name a new one")


def _problem_of(row: dict[str, object]) -> Problem:
    try:
        json.dumps(row, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"holds what JSON has no form for ({error})") from error
    return problem_from_row(row)
