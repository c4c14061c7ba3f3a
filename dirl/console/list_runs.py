"""`dirl runs FOLDER`: the runs under a folder, one line each, from what they have written; one may still be running."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dirl.errors import UserError, one_line
from dirl.model.model_path import best_of
from dirl.show.metric_table import read_metrics

_ACCURACY = ("eval/accuracy", "eval/greedy/accuracy", "completions/accuracy")
_TOKENS_PER_STEP = ("eval/tokens_per_step", "eval/greedy/tokens_per_step", "completions/tokens_per_step")
_PHASES = ("timing_s/step", "timing_s/eval", "timing_s/save")  # one after another; others lie within them


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """What is known of a run, in words; "-" where nothing is."""

    run: str
    stage: str = "-"
    step: str = "-"
    best: str = "-"
    accuracy: str = "-"
    tokens_per_step: str = "-"
    time: str = "-"
    cost: str = "-"
    trouble: str = ""  # what of its files cannot be read


def list_runs(folder: str, console: Console) -> None:
    """Print the table, and under it what could not be read.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{folder}: no such folder; name one with runs in it")
    runs = sorted({path.parent for name in ("run.json", "metrics.jsonl") for path in root.rglob(name)})
    lines = [line for run in runs if (line := line_of(run, str(run.relative_to(root)))) is not None]
    if not lines:
        raise UserError(f"{folder}: no run of dirl sft or dirl rl under it")
    table = Table("run", box=box.SIMPLE_HEAD)
    for heading in ("stage", "step", "best", "accuracy", "tokens/step", "time", "cost"):
        table.add_column(heading, no_wrap=True)
    for one in lines:
        table.add_row(one.run, one.stage, one.step, one.best, one.accuracy, one.tokens_per_step, one.time, one.cost)
    console.print(table)
    for one in lines:
        if one.trouble:
            console.print(f"{one.run}: {one.trouble}", markup=False, highlight=False, soft_wrap=True)


def line_of(run: Path, name: str) -> RunLine | None:
    """A run's line; None for what is no run of training, such as an evaluation."""
    record, trouble = _read_record(run)
    settings = record.get("config", {})
    if record and "max_steps" not in settings:
        return None
    try:
        rows = read_metrics(run / "metrics.jsonl")
        best = best_of(run, settings) if settings else None
    except (OSError, UserError, ValueError) as error:
        is_new = isinstance(error, FileNotFoundError)
        rows, best, trouble = [], None, trouble or ("" if is_new else one_line(error))
    seconds = seconds_of(rows, settings)
    return RunLine(
        run=name,
        stage="rl" if "rollout" in settings else "sft" if settings else "-",
        step=f"{rows[-1]['step'] if rows else 0}/{settings.get('max_steps', '?')}",
        best=f"{best[1]:.4g} @ {best[0]}" if best else "-",
        accuracy=_percent(_latest(rows, _ACCURACY)),
        tokens_per_step=_number(_latest(rows, _TOKENS_PER_STEP)),
        time=str(timedelta(seconds=round(seconds))) if rows else "-",
        cost=_cost(seconds, record) if rows else "-",
        trouble=trouble,
    )


def seconds_of(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> float:
    """Time in steps, evaluations and checkpoints; a step that `logging_steps` left out counts like the next logged."""
    per_row = settings.get("num_iterations", 1) * settings.get("steps_per_generation", 1)
    total, previous = 0.0, 0
    for row in rows:
        step_seconds, *others = (row.get(name) or 0.0 for name in _PHASES)
        total += step_seconds * max(1.0, (row["step"] - previous) / per_row) + sum(others)
        previous = row["step"]
    return total


def _read_record(run: Path) -> tuple[dict[str, Any], str]:
    """run.json, or what is wrong with it."""
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        return ({"config": {}, **record}, "") if isinstance(record["config"], dict) else ({}, "run.json is no record")
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"run.json: {one_line(error, 100)}"


def _latest(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> float | None:
    """The newest number under the first of the names that a run has."""
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            return values[-1]
    return None


def _cost(seconds: float, record: Mapping[str, Any]) -> str:
    """GPU-hours of all its processes; without GPUs, hours of every core of the machine."""
    hardware = record.get("hardware", {})
    gpus = hardware.get("gpus") or []
    count = record.get("num_processes", len(gpus)) if gpus else hardware.get("cpu_cores")
    return f"{seconds / 3600 * count:.2f} {'GPU' if gpus else 'core'}-h" if count else "-"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
