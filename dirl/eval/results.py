"""Samples of one data set in one decoding mode -> its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from dirl.eval import statistics
from dirl.rollout.engine import SamplingConfig


@dataclass(frozen=True)
class Sample:
    """One judged completion."""

    problem: int  # index in the data set
    sample: int  # 0..k-1
    is_right: bool
    answer: str | None  # content of the last box; None: no answer
    text: str
    token_ids: list[int]
    step_map: list[int]
    completion_length: int  # tokens up to and including EOS
    num_denoising_steps: int
    is_truncated: bool


@dataclass(frozen=True)
class ModeResult:
    """One row of results.json. Shares and accuracies are in [0, 1], lengths in tokens."""

    dataset: str
    mode: str
    temperature: float
    confidence_threshold: float
    num_problems: int
    num_samples: int
    avg_at_k: float
    pass_at_k: dict[str, float]
    maj_at_k: float
    standard_error: float  # over problems
    standard_error_sampling: float  # over random numbers, on these problems
    tokens_per_step: float  # all tokens up to EOS / all denoising steps
    output_length_mean: float
    output_length_p50: float
    output_length_p95: float
    truncated: float
    no_answer: float
    tokens_per_s: float  # 0 where the evaluation was continued
    seconds: float


def summarise(
    dataset: str, mode: str, sampling: SamplingConfig, samples: Sequence[Sample], *, seconds: float
) -> ModeResult:
    """The numbers of samples that are sorted by problem."""
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.problem)]
    correct = [[sample.is_right for sample in group] for group in groups]
    k = len(groups[0])
    lengths = [sample.completion_length for sample in samples]
    return ModeResult(
        dataset=dataset,
        mode=mode,
        temperature=sampling.temperature,
        confidence_threshold=sampling.confidence_threshold,
        num_problems=len(groups),
        num_samples=k,
        avg_at_k=statistics.average(correct),
        pass_at_k={str(n): statistics.pass_at(correct, n) for n in _powers_of_two(k)},
        maj_at_k=statistics.majority(correct, [[sample.answer for sample in group] for group in groups]),
        standard_error=statistics.standard_error_over_problems(correct),
        standard_error_sampling=statistics.standard_error_over_sampling(correct),
        tokens_per_step=sum(lengths) / sum(sample.num_denoising_steps for sample in samples),
        output_length_mean=sum(lengths) / len(lengths),
        output_length_p50=statistics.percentile(lengths, 0.5),
        output_length_p95=statistics.percentile(lengths, 0.95),
        truncated=sum(sample.is_truncated for sample in samples) / len(samples),
        no_answer=sum(sample.answer is None for sample in samples) / len(samples),
        tokens_per_s=sum(lengths) / seconds if seconds else 0.0,
        seconds=seconds,
    )


def _powers_of_two(k: int) -> list[int]:
    return [2**i for i in range(int(math.log2(k)) + 1)]
