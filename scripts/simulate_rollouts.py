"""Seconds of an RL step, simulated: phases in turn, side by side, and partial rollouts, for any number of GPUs.

    python scripts/simulate_rollouts.py --gpus 8,128,1024 [--sigma 1.0] [--knee 64] [--max-staleness 1]
    python scripts/simulate_rollouts.py --calibrate RUN [--predict RUN,RUN] [--gpus 2]

The defaults are the paper's: SDAR-8B on H200s, 128 prompts of 32 completions. With --calibrate the rates and the
completions are those of a run (its metrics.jsonl, run.json and completions/), and a GPU is a process like its own;
--predict puts each run's measured seconds a step beside what the model makes of that run's own rates and work, of the
calibrated run's, and of these slowed as the run's trainer was, where others used the machine. Where phases do not share
GPUs, the split is the fastest in eighths. The model: rollout_model.py.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import numpy as np
from rollout_model import Arm, Rates, StepWork, Summary, Workload, simulate, summary_of

from dirl.errors import UserError
from dirl.files import read_json_lines
from dirl.show.metric_table import read_metrics

FIRST_STEPS = 2  # they load code, and nothing is ahead of them
KNEES = (math.inf, *(2.0**n for n in range(9, -1, -1)))  # of a fit, the simplest first


@dataclass(frozen=True)
class RunRecord:
    """What a run has left on the disk."""

    path: Path
    rows: list[dict[str, Any]]  # a line of metrics.jsonl a step
    rollout: Mapping[str, Any]  # its configuration
    lengths: list[list[int]]  # completion lengths of groups, a list each

    @property
    def arm(self) -> Arm:
        staleness = self.rollout["max_staleness"]
        is_colocated = self.rollout["mode"] == "colocate"
        name = f"max_staleness={staleness}"
        return Arm(name, 1, 1, is_colocated, staleness, oversampling=self.rollout["oversampling"])

    @property
    def engine_seconds(self) -> list[float]:
        """Decoding and scoring of the rounds that each step took."""
        prefix = "engine_s" if "engine_s/rollout" in self.rows[0] else "timing_s"
        return [row.get(f"{prefix}/rollout", 0.0) + row.get(f"{prefix}/reward", 0.0) for row in self.rows]

    @property
    def train_pace(self) -> float:
        """Seconds of training a packed token: says how busy a shared machine was."""
        rows = self.rows[FIRST_STEPS:]
        return sum(row["timing_s/train"] for row in rows) / sum(row["num_tokens"] for row in rows)

    @property
    def workload(self) -> Workload:
        num_generations = self.rollout["num_generations"]
        steps = [
            StepWork(
                useful_share=useful_share_of(row),
                tokens_per_step=row["completions/tokens_per_step"],
                packing=row["num_tokens"] / (row["groups/kept"] * num_generations * row["completions/mean_length"]),
            )
            for row in self.rows
        ]
        return Workload(
            lambda random: self.lengths[random.integers(len(self.lengths))],
            self.rollout["prompts_per_step"],
            steps,
            max_sampling_rounds=self.rollout["max_sampling_rounds"],
        )


def useful_share_of(row: Mapping[str, float]) -> float:
    dropped = sum(value for name, value in row.items() if name.startswith("groups/dropped_"))
    return row["groups/kept"] / (row["groups/kept"] + dropped)


def read_run(path: Path) -> RunRecord:
    """
    Raises:
        UserError: it is no RL run of one process, too short, or has no completions/.
    """
    for name in ("metrics.jsonl", "run.json"):
        if not (path / name).is_file():
            raise UserError(f"{path / name}: no such file; name the output_dir of an RL run")
    rows = read_metrics(path / "metrics.jsonl")
    config = json.loads((path / "run.json").read_text(encoding="utf-8"))["config"]
    if "rollout" not in config or len(rows) < 2 * FIRST_STEPS:
        raise UserError(f"{path}: not an RL run of at least {2 * FIRST_STEPS} steps")
    lengths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for file in sorted(path.glob("completions/*.jsonl")):
        for row in read_json_lines(file, "a completion", lambda row: row["completion_length"]):
            lengths[file.name, row["group"]].append(row["completion_length"])
    if not lengths:
        raise UserError(f"{path}/completions: no completions; run with completions_steps set")
    return RunRecord(path, rows, config["rollout"], list(lengths.values()))


def calibrate(run: RunRecord) -> Rates:
    """A pass's seconds and the knee that come nearest to the engine's seconds; a line through the trainer's."""
    tokens, seconds = ([row[name] for row in run.rows[FIRST_STEPS:]] for name in ("num_tokens", "timing_s/train"))
    fixed, each = line_through(tokens, seconds)
    pushes = [row["timing_s/update_weights"] for row in run.rows]  # waits for a round are in some
    rates = Rates(1.0, 1 / each, math.inf, run.rollout["max_batch_size"], fixed, quantiles(pushes, n=10)[0])
    measured, fits = run.engine_seconds[FIRST_STEPS:], []
    in_turn = replace(run.arm, max_staleness=0)
    for knee in KNEES:
        steps = simulate(run.workload, replace(rates, knee=knee), in_turn, len(run.rows))
        simulated = [step.engine_seconds for step in steps[FIRST_STEPS:]]
        # Seconds are in proportion to those of a pass: the factor that makes the means equal, and what it leaves.
        factor = fmean(measured) / fmean(simulated)
        left = sum((a - factor * b) ** 2 for a, b in zip(measured, simulated, strict=True))
        fits.append((left, factor, knee))
    _, pass_seconds, knee = min(fits)
    return replace(rates, pass_seconds=pass_seconds, knee=knee)


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of least squares, neither below zero."""
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((one - mean_x) ** 2 for one in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread if spread else 0.0
    if slope <= 0 or mean_y < slope * mean_x:  # through the origin
        slope = mean_y / mean_x
    return max(mean_y - slope * mean_x, 0.0), slope


def predicted(run: RunRecord, work: RunRecord, rates: Rates) -> Summary:
    """The run's arm with another's work and rates."""
    return summary_of(simulate(work.workload, rates, run.arm, len(work.rows))[FIRST_STEPS:])


def print_validation(calibrated: RunRecord, runs: Sequence[RunRecord]) -> None:
    rates = calibrate(calibrated)
    print(f"rates of {calibrated.path.name}: {words_of(rates)}\n")
    print("| run | | measured s/step | predicted, its own rates | those rates | those, at its trainer's pace |")
    print("| --- | --- | --- | --- | --- | --- |")
    for run in runs:
        measured = fmean(row["timing_s/step"] for row in run.rows[FIRST_STEPS:])
        slower = run.train_pace / calibrated.train_pace
        guesses = [
            predicted(run, run, calibrate(run)).seconds,
            predicted(run, calibrated, rates).seconds,
            predicted(run, calibrated, rates.slowed(slower)).seconds,
        ]
        cells = " | ".join(f"{guess:.2f} ({guess / measured - 1:+.0%})" for guess in guesses)
        print(f"| {run.path.name} | {run.arm.name} | {measured:.2f} | {cells}, {slower:.2f} times slower |")


def words_of(rates: Rates) -> str:
    return (
        f"{rates.pass_seconds:.4g} s a pass of up to {rates.knee:g} sequences, {rates.slots} in flight; "
        f"{rates.train_tokens_per_s:.0f} packed tokens/s and {rates.train_seconds:.2f} s a step; "
        f"{rates.push_seconds:.3f} s a push"
    )


def draw_lengths(random: np.random.Generator, *, options: argparse.Namespace) -> list[int]:
    """A group's: log-normal, a part of the variance between prompts, cut at the most."""
    sigma, share = options.sigma, options.prompt_share
    deviates = math.sqrt(share) * random.standard_normal() + math.sqrt(1 - share) * random.standard_normal(
        options.num_generations
    )
    lengths = options.mean_length * np.exp(sigma * deviates - sigma**2 / 2)
    return lengths.round().clip(1, options.max_length).astype(int).tolist()


def arms_for(num_gpus: int, options: argparse.Namespace) -> list[list[Arm]]:
    """Each mode with its splits, of which the fastest counts."""
    splits = sorted({max(1, min(num_gpus - 1, num_gpus * n // 8)) for n in range(1, 8)}) if num_gpus > 1 else []
    both = Arm("in turn", num_gpus, num_gpus, is_colocated=True, splits_groups=options.split_groups)
    ahead = replace(both, is_colocated=False, max_staleness=options.max_staleness)
    part = {"oversampling": options.oversampling, "is_partial": True}
    apart = [
        replace(ahead, name="in turn, apart", max_staleness=0),
        replace(ahead, name=f"ahead by {options.max_staleness}"),
        replace(ahead, name=f"ahead by {options.max_staleness}, partial", **part),
    ]
    over_splits = [[replace(arm, rollout_gpus=n, train_gpus=num_gpus - n) for n in splits] for arm in apart]
    return [arms for arms in ([both], [replace(both, name="in turn, partial", **part)], *over_splits) if arms]


def print_scale(workload: Workload, rates: Rates, options: argparse.Namespace) -> None:
    print(f"Simulated: {words_of(rates)}.\n")
    print("| GPUs | rollouts | decode + train | s/step | speed | trainer waits | engines wait | oldest group |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for num_gpus in options.gpus:
        slowest = None
        for arms in arms_for(num_gpus, options):
            found = [(measure(workload, rates, arm, options), arm) for arm in arms]
            summary, arm = max(found, key=lambda pair: pair[0].tokens_per_s)
            slowest = slowest or summary.tokens_per_s
            share = f"{num_gpus} in turn" if arm.is_colocated else f"{arm.rollout_gpus} + {arm.train_gpus}"
            cells = [
                f"{summary.seconds:,.{0 if summary.seconds > 10 else 2}f}",
                f"{summary.tokens_per_s / slowest:.2f}",
            ]
            cells += [f"{summary.trainer_waits:.0%}", f"{summary.engine_waits:.0%}", f"{summary.age}"]
            print(f"| {num_gpus} | {arm.name} | {share} | {' | '.join(cells)} |")


def measure(workload: Workload, rates: Rates, arm: Arm, options: argparse.Namespace) -> Summary:
    first = options.steps // 4  # until partial rollouts are as old as they get
    return summary_of(simulate(workload, rates, arm, options.steps, options.seed)[first:])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = partial(parser.add_argument, metavar="N")
    parser.add_argument("--gpus", type=lambda text: list(map(int, text.split(","))), default=[], metavar="N,N")
    parser.add_argument("--calibrate", type=Path, metavar="RUN", help="rates and completions of this run")
    parser.add_argument("--predict", type=lambda text: list(map(Path, text.split(","))), default=[], metavar="RUN,RUN")
    number("--max-staleness", type=int, default=1, help="rounds ahead, where phases go side by side")
    number("--oversampling", type=float, default=1.5, help="groups in flight a group wanted, of partial rollouts")
    parser.add_argument("--split-groups", action="store_true", help="ranks share completions, not whole groups")
    number("--steps", type=int, default=24, help="optimizer steps; the first quarter is not counted")
    number("--seed", type=int, default=0)
    number("--prompts-per-step", type=int, default=128, help="without --calibrate, as all below")
    number("--num-generations", type=int, default=32)
    number("--mean-length", type=float, default=2000.7, help="tokens of a completion")
    number("--sigma", type=float, default=1.0, help="standard deviation of the logarithm of lengths")
    number("--prompt-share", type=float, default=0.5, help="share of that variance that lies between prompts")
    number("--max-length", type=int, default=8192)
    number("--tokens-per-step", type=float, default=2.0)
    number("--pass-seconds", type=float, default=116 * 2.0 / 8192)
    number("--knee", type=float, default=64, help="sequences in flight, beyond which a pass takes longer")
    number("--slots", type=int, default=64, help="sequences in flight of a GPU at most")
    number("--train-tokens-per-s", type=float, default=4 * 8192 / 167, help="completion tokens, of a GPU")
    number("--push-seconds", type=float, default=0.1)
    options = parser.parse_args(arguments)
    if not options.gpus and not options.calibrate:
        parser.error("nothing to do: give --gpus, --calibrate or both")
    if options.predict and not options.calibrate:
        parser.error("--predict needs --calibrate RUN, whose rates it takes")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    lengths = partial(draw_lengths, options=options)
    work = [StepWork(tokens_per_step=options.tokens_per_step)]
    workload = Workload(lengths, options.prompts_per_step, work)
    rates = Rates(
        options.pass_seconds, options.train_tokens_per_s, options.knee, options.slots, 0.0, options.push_seconds
    )
    try:
        if options.calibrate:
            run = read_run(options.calibrate)
            print_validation(run, [run, *map(read_run, options.predict)])
            workload, rates = run.workload, calibrate(run)
    except UserError as error:
        raise SystemExit(str(error)) from None
    if options.gpus:
        print_scale(workload, rates, options)


if __name__ == "__main__":
    main()
