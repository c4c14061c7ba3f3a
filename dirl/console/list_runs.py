"""`dirl runs FOLDER`: the runs under a folder, one line each, from what they have written; one may still be running."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dirl.errors import UserError, one_line
from dirl.model.model_path import best_of
from dirl.show.cost import brief, clock, cost_of
from dirl.show.metric_table import read_metrics

_ACCURACY = ("eval/accuracy", "eval/greedy/accuracy", "completions/accuracy")
_TOKENS_PER_STEP = ("eval/tokens_per_step", "eval/greedy/tokens_per_step", "completions/tokens_per_step")
_HEADS = {"tokens_per_step": "tokens/step", "rolled_out": "rolled out", "rates": "train, rollout tok/s", "mfu": "MFU"}
_WHERE_FILLED = {"state", "trained", "rolled_out", "rates", "mfu"}  # the others are always shown


@dataclass(frozen=True, kw_only=True)
class RunLine:
    """What is known of a run, in words; "-" where nothing is."""

    run: str
    state: str = "-"  # what a sweep knows of it
    stage: str = "-"
    step: str = "-"
    best: str = "-"
    accuracy: str = "-"
    tokens_per_step: str = "-"
    time: str = "-"
    cost: str = "-"
    trained: str = "-"  # packed tokens
    rolled_out: str = "-"  # completion tokens
    rates: str = "-"  # tokens in a second of each, per GPU or core
    mfu: str = "-"
    trouble: str = ""  # what of its files cannot be read


def wide_console() -> Console:
    """The terminal, or a file, which has room."""
    return Console(width=None if sys.stdout.isatty() else 200)


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
    print_lines(lines, console)


def print_lines(lines: Sequence[RunLine], console: Console) -> None:
    """The table, and under it what could not be read."""
    names = [field.name for field in fields(RunLine) if field.name not in ("run", "trouble")]
    shown = [name for name in names if name not in _WHERE_FILLED or any(getattr(one, name) != "-" for one in lines)]
    table = Table("run", box=box.SIMPLE_HEAD)
    for name in shown:
        table.add_column(_HEADS.get(name, name), no_wrap=name != "rates")
    for one in lines:
        table.add_row(one.run, *(getattr(one, name) for name in shown))
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
    cost = cost_of(rows, record)
    return RunLine(
        run=name,
        stage="rl" if "rollout" in settings else "sft" if settings else "-",
        step=f"{rows[-1]['step'] if rows else 0}/{settings.get('max_steps', '?')}",
        best=f"{best[1]:.4g} @ {best[0]}" if best else "-",
        accuracy=_percent(_latest(rows, _ACCURACY)),
        tokens_per_step=_number(_latest(rows, _TOKENS_PER_STEP)),
        time=clock(cost.total_seconds) if rows else "-",
        cost=cost.device_hours(cost.total_seconds) if rows else "-",
        trained=brief(cost.trained),
        rolled_out=brief(cost.rolled_out),
        rates=", ".join(map(brief, filter(None, (cost.train_rate(), cost.rollout_rate())))) or "-",
        mfu=_percent(cost.mfu),
        trouble=trouble,
    )


def evaluation_line(folder: Path, name: str) -> RunLine | None:
    """The line of an evaluation: means over its data sets and modes; None before its end."""
    path = folder / "results.json"
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return RunLine(
        run=name,
        stage="eval",
        accuracy=_percent(fmean(result["avg_at_k"] for result in results)),
        tokens_per_step=_number(fmean(result["tokens_per_step"] for result in results)),
        time=clock(sum(result["seconds"] for result in results)),
    )


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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
