"""Shares of right samples by problem, of evaluations and of runs' held-out problems -> what is compared pair by pair.

A run keeps those of its newest evaluation in heldout.json, an evaluation all its samples in samples.jsonl.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from dirl.data.problems import Problem
from dirl.eval.estimates import Difference, paired_bootstrap
from dirl.eval.results import Sample
from dirl.eval.sample_store import SAMPLES, read_header, read_samples
from dirl.files import write_json
from dirl.show.metric_table import read_metrics

HELDOUT = "heldout.json"
Scores = Mapping[str, Mapping[str, float]]  # what was measured -> problem -> share of right samples


def problem_means(samples: Iterable[Sample]) -> dict[int, float]:
    """Share of right samples of each problem."""
    by_problem: dict[int, list[bool]] = {}
    for sample in samples:
        by_problem.setdefault(sample.problem, []).append(sample.correct)
    return {problem: fmean(correct) for problem, correct in by_problem.items()}


def write_scores(
    output_dir: str | Path, step: int, problems: Sequence[Problem], samples: Mapping[str, Iterable[Sample]]
) -> None:
    """Keep what a run's evaluation found, in place of the one before.

    Args:
        step: it came after.
        samples: of each metric that is their accuracy.
    """
    means = {name: problem_means(of_metric) for name, of_metric in samples.items()}
    right = {name: {_key(i, problems[i]): mean for i, mean in found.items()} for name, found in means.items()}
    write_json(Path(output_dir) / HELDOUT, {"step": step, "right": right})


def read_scores(directory: Path) -> Scores:
    """Those of an evaluation or of a run's newest; empty where there are none, as of a run that has gone back since."""
    if (directory / SAMPLES).is_file():
        header, found = read_header(directory), read_samples(directory / SAMPLES)
        return {
            f"{dataset} {mode}": {
                f"{header.get(f'problems.{dataset}')} {problem}": mean
                for problem, mean in problem_means(samples.values()).items()
            }
            for (dataset, mode), samples in found.items()
        }
    path = directory / HELDOUT
    if not path.is_file():
        return {}
    kept, rows = json.loads(path.read_text(encoding="utf-8")), read_metrics(directory / "metrics.jsonl")
    newest = next(
        (row["step"] for row in reversed(rows) if any(row.get(name) is not None for name in kept["right"])), 0
    )
    return kept["right"] if kept["step"] == newest else {}


def compare_groups(a: Sequence[Scores], b: Sequence[Scores], name: str) -> tuple[int, Difference] | None:
    """How far the runs of group b are above those of a on the problems that both have, and how many these are.

    A problem counts with its mean over a group's runs that have it: other problems would change the difference within
    the interval, and what other seeds would change is not in it. None: no such problems.
    """
    means_a, means_b = _means(a, name), _means(b, name)
    shared = sorted(means_a.keys() & means_b.keys())
    if not shared:
        return None
    return len(shared), paired_bootstrap([means_a[key] for key in shared], [means_b[key] for key in shared])


def _means(runs: Sequence[Scores], name: str) -> dict[str, float]:
    by_problem: dict[str, list[float]] = {}
    for run in runs:
        for key, share in run.get(name, {}).items():
            by_problem.setdefault(key, []).append(share)
    return {key: fmean(shares) for key, shares in by_problem.items()}


def _key(index: int, problem: Problem) -> str:
    """Of a problem in its place: the same may stand in two."""
    text = json.dumps([problem.question, problem.answer])
    return f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()} {index}"
