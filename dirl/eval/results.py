"""Samples of one data set in one decoding mode -> its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from statistics import fmean
from typing import Literal

from dirl.eval import estimates
from dirl.rollout.engine import SamplingConfig


@dataclass(frozen=True)
class Sample:
    """One judged completion, without its tokens; samples.jsonl holds it with them."""

    problem: int  # index in the data set
    sample: int  # 0..k-1
    correct: bool
    answer: str | None  # what the rule of the data set takes for one; None: no answer
    completion_length: int  # tokens up to and including EOS
    num_denoising_steps: int
    finish_reason: Literal["stop", "length"]
    seconds: float  # its share of the time its chunk took to decode
    marks: dict[str, list[bool]] = field(default_factory=dict)  # further judgements, each of several parts


@dataclass(frozen=True)
class ModeResult:
    """One row of results.json. Shares and accuracies are in [0, 1], lengths in tokens."""

    dataset: str
    mode: str
    temperature: float
    confidence_threshold: float | None  # None: the strategy has none
    num_problems: int
    num_samples: int
    avg_at_k: float
    pass_at_k: dict[str, float]  # for 1, 2, 4, ... up to num_samples
    maj_at_k: float
    standard_error: float  # of avg_at_k, over problems; 0 for a single one
    standard_error_sampling: float  # of avg_at_k, over random numbers on these problems; 0 for single samples
    tokens_per_step: float  # all tokens up to EOS / all denoising steps
    tokens_per_step_mean: float  # the same ratio of each sample, averaged
    output_length_mean: float
    output_length_p50: float
    output_length_p95: float
    truncated: float
    no_answer: float
    tokens_per_s: float  # tokens up to EOS / seconds
    seconds: float  # spent decoding, over all runs that added samples
    rule: str = ""  # how answers were judged, with a version
    # by category, where problems have one: number of problems and avg@k
    by_category: dict[str, tuple[int, float]] = field(default_factory=dict)
    # of IFEval: share of samples with all instructions followed, and of instructions; strictly and loosely
    marks: dict[str, float] = field(default_factory=dict)


def summarise(
    dataset: str,
    mode: str,
    sampling: SamplingConfig,
    samples: Sequence[Sample],
    *,
    rule: str = "",
    categories: Sequence[str] = (),
) -> ModeResult:
    """The numbers of samples that are sorted by problem; `categories`: of each problem, "" for none."""
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.problem)]
    correct = [[sample.correct for sample in group] for group in groups]
    k = len(groups[0])
    lengths = [sample.completion_length for sample in samples]
    steps = [sample.num_denoising_steps for sample in samples]
    seconds = sum(sample.seconds for sample in samples)
    has_threshold = sampling.unmasking_strategy == "low_confidence_dynamic"
    return ModeResult(
        dataset=dataset,
        mode=mode,
        temperature=sampling.temperature,
        confidence_threshold=sampling.confidence_threshold if has_threshold else None,
        num_problems=len(groups),
        num_samples=k,
        avg_at_k=estimates.average(correct),
        pass_at_k={str(n): estimates.pass_at(correct, n) for n in _powers_of_two(k)},
        maj_at_k=estimates.majority(correct, [[sample.answer for sample in group] for group in groups]),
        standard_error=estimates.standard_error_over_problems(correct),
        standard_error_sampling=estimates.standard_error_over_sampling(correct),
        tokens_per_step=sum(lengths) / sum(steps),
        tokens_per_step_mean=sum(n / s for n, s in zip(lengths, steps, strict=True)) / len(samples),
        output_length_mean=sum(lengths) / len(lengths),
        output_length_p50=estimates.percentile(lengths, 0.5),
        output_length_p95=estimates.percentile(lengths, 0.95),
        truncated=sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        no_answer=sum(sample.answer is None for sample in samples) / len(samples),
        tokens_per_s=sum(lengths) / seconds if seconds > 0 else 0.0,
        seconds=seconds,
        rule=rule,
        by_category=_by_category(correct, categories),
        marks=_marks(samples),
    )


def _by_category(correct: estimates.Correct, categories: Sequence[str]) -> dict[str, tuple[int, float]]:
    found: dict[str, list[Sequence[bool]]] = {}
    for category, of_problem in zip(categories, correct, strict=bool(categories)):
        if category:
            found.setdefault(category, []).append(of_problem)
    return {name: (len(found[name]), estimates.average(found[name])) for name in sorted(found)}


def _marks(samples: Sequence[Sample]) -> dict[str, float]:
    """Of each judgement: the share of samples that have all parts right, and the share of parts."""
    found: dict[str, float] = {}
    for name in samples[0].marks:
        of_each = [sample.marks[name] for sample in samples]
        found[f"prompt, {name}"] = fmean(map(all, of_each))
        found[f"instruction, {name}"] = fmean(part for parts in of_each for part in parts)
    return found


def _powers_of_two(k: int) -> list[int]:
    """1, 2, 4, ... up to k."""
    return [2**i for i in range(k.bit_length())]
