"""A name or a path -> problems to evaluate on; and the numbers of the paper to stand beside ours."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from dirl.data import reasoning_tasks
from dirl.data.problem_sources import load_problems
from dirl.data.problems import Problem
from dirl.errors import MissingFileError, UserError
from dirl.eval.rules import REASONING, Rule, rule_of

NAMES = ("MATH500", "GSM8K", "AIME2024", "AIME2025", "OlympiadBench")  # of the paper's table
KNOWN = (*NAMES, "HumanEval", "MBPP", "LiveCodeBench-v6", "GPQA-Diamond", "MMLU-Pro", "IFEval")

# Accuracy (%), tokens per step, output length on NAMES in order. Source: DiRL (arXiv 2512.22234), Table 1.
PAPER_TABLE = {
    "Qwen2.5-7B-Instruct": "73.8/1.0/628.1 89.8/1.0/308.9 9.0/1.0/1005.5 5.6/1.0/970.5 36.6/1.0/862.0",
    "Qwen2.5-32B-Instruct": "81.1/1.0/554.6 94.0/1.0/291.2 12.9/1.0/831.7 11.9/1.0/839.7 45.7/1.0/742.4",
    "SDAR-8B-Chat static": "71.5/1.0/603.4 89.5/1.0/712.9 5.6/1.0/1342.4 8.5/1.0/920.8 35.6/1.0/890.4",
    "SDAR-8B-Chat dynamic": "71.9/2.4/616.6 89.9/2.8/708.8 9.2/2.4/1274.2 9.4/2.1/889.8 36.0/2.4/896.4",
    "TraDo-8B-Instruct static": "76.7/1.0/618.1 90.4/1.0/324.7 11.5/1.0/1036.1 13.5/1.0/988.0 40.2/1.0/864.3",
    "TraDo-8B-Instruct dynamic": "75.6/2.3/618.6 91.1/2.1/315.2 11.7/2.0/1091.4 15.0/1.9/996.2 40.3/2.1/868.0",
    "DiRL-8B-Instruct static": "85.1/1.0/1917.2 93.1/1.0/707.4 21.5/1.0/5434.2 22.9/1.0/5019.0 47.3/1.0/3556.4",
    "DiRL-8B-Instruct dynamic": "83.1/2.0/2000.7 93.0/2.2/730.1 20.6/1.7/5468.5 20.8/1.7/5129.6 46.4/1.8/3614.5",
}


@dataclass(frozen=True)
class Benchmark:
    """A data set under the name it has in reports."""

    name: str
    problems: list[Problem]

    @property
    def digest(self) -> str:
        """A hash of its problems, one after another: together they may be gigabytes."""
        found = hashlib.blake2b(b"[", digest_size=8)
        for index, problem in enumerate(self.problems):
            row = [problem.question, problem.answer, problem.columns, *problem.conversation]
            found.update(b", "[: 2 * bool(index)] + json.dumps(row, default=str, sort_keys=True).encode())
        found.update(b"]")
        return found.hexdigest()

    @property
    def rule(self) -> Rule:
        """How its answers are judged."""
        return REASONING if self.name.startswith(reasoning_tasks.PREFIX) else rule_of(self.problems[0])

    @property
    def categories(self) -> list[str]:
        """Of each problem; "" for one without."""
        return [str(problem.columns.get("category") or "") for problem in self.problems]


@dataclass(frozen=True)
class Dates:
    """Days, YYYY-MM-DD, from which and to which problems count; empty: without end."""

    first: str = ""
    last: str = ""

    def hold(self, problem: Problem) -> bool:
        """Whether a problem is of these days; one without a day is of no others."""
        day = problem.columns.get("contest_date")
        return day is None or (self.first or "0") <= str(day)[:10] <= (self.last or "9")


def load_benchmarks(
    names_or_paths: Sequence[str],
    *,
    limit: int = 0,
    seed: int = 0,
    skip_bad_rows: bool = False,
    dates: Dates = Dates(),
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[Benchmark]:
    """Several benchmarks, whose samples are told apart by name.

    Raises:
        ValueError: none, two of the same name, or dates where no problem has one.
    """
    benchmarks = [
        load_benchmark(name, limit=limit, seed=seed, skip_bad_rows=skip_bad_rows, dates=dates, columns=columns)
        for name in names_or_paths
    ]
    names = [benchmark.name for benchmark in benchmarks]
    if not names or len(set(names)) < len(names):
        raise UserError(f"data.datasets must name one or more data sets of different names, got {names}")
    has_dates = any(problem.columns.get("contest_date") for benchmark in benchmarks for problem in benchmark.problems)
    if dates != Dates() and not has_dates:
        raise UserError(f"data.start_date and data.end_date are of LiveCodeBench; no problem of {names} has a date")
    return benchmarks


def load_benchmark(
    name_or_path: str,
    *,
    limit: int = 0,
    seed: int = 0,
    skip_bad_rows: bool = False,
    dates: Dates = Dates(),
    columns: Mapping[str, str] = MappingProxyType({}),
) -> Benchmark:
    """A benchmark by name in any case (data/eval/NAME.json, or $DIRL_DATA/NAME.json), by path, or a held-out task.

    Args:
        columns: of what is named by its path: name that is read -> name in the data.
    Raises:
        FileNotFoundError: a known name whose file is not there.
        ValueError: neither a known name nor a path, no problem within the dates, or one that cannot be judged.
    """
    if name_or_path.startswith("task:"):
        return Benchmark(name_or_path, load_problems(name_or_path, split="heldout", limit=limit, seed=seed))
    name = {known.lower(): known for known in KNOWN}.get(name_or_path.lower())
    path = name_or_path if name is None else _file_of(name)
    if name is None and not Path(path).suffix and "/" not in path:
        raise UserError(
            f"data.datasets: unknown data set {path!r}; known are {', '.join(KNOWN)}, "
            "paths of .json, .jsonl or .parquet files, task:noisy_sums and task:reasoning_gym/NAME"
        )
    num_read, columns = 0 if dates != Dates() else limit, columns if name is None else {}
    read = load_problems(path, split="test", limit=num_read, skip_bad_rows=skip_bad_rows, columns=columns)
    problems = [problem for problem in read if dates.hold(problem)][: limit or None]
    if not problems:
        raise UserError(f"data.start_date and data.end_date leave no problem of {path}; its days are others")
    for number, problem in enumerate(problems, start=1):
        try:
            rule_of(problem).check(problem)
        except ValueError as error:
            raise UserError(f"{path}, problem {number}: {error}") from error
    return Benchmark(name or Path(path).stem, problems)


def _file_of(name: str) -> str:
    file = Path(os.environ.get("DIRL_DATA", "data/eval"), f"{name}.json")
    if not file.is_file():
        raise MissingFileError(
            f"data.datasets: {file} does not exist; fetch it with `bash download.sh data {name}`, or set DIRL_DATA to "
            f"the folder that holds {file.name}"
        )
    return str(file)
