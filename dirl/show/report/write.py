"""Run directories -> report.html."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dirl.errors import MissingFileError, UserError, one_line
from dirl.files import write_whole
from dirl.show.cost import cost_of, cost_table
from dirl.show.metric import MetricTable
from dirl.show.metric_table import TABLE, read_metrics
from dirl.show.report.curves import panel_charts
from dirl.show.report.page import report_page
from dirl.show.report.samples import Decode, choose_samples

logger = logging.getLogger(__name__)

REPORT = "report.html"
_ABSENT = "(not set)"


def write_report(
    run_dirs: str | Path | Sequence[str | Path],
    path: str | Path | None = None,
    *,
    decode: Decode | None = None,
    table: MetricTable = TABLE,
) -> Path:
    """Write the report of one run, or of several side by side; returns its path.

    Args:
        run_dirs: output directory of an SFT or RL run, finished or not, or several.
        path: None: report.html in the run's directory; of several, report_and_<others>.html in the first one's.
        decode: texts of tokens, for rows of completions that bring only ids.
        table: the metrics to show.
    Raises:
        MissingFileError: a directory holds no metrics.jsonl.
    """
    folders = [Path(run_dir) for run_dir in ([run_dirs] if isinstance(run_dirs, str | Path) else run_dirs)]
    if not folders:
        raise UserError("write_report: name at least one run directory")
    if path is not None and Path(path).is_dir():
        path = Path(path) / "report.html"
    names = _names(folders)
    runs = [_describe(folder, name, decode, table) for folder, name in zip(folders, names, strict=True)]
    configs = [flat(_read_json(folder / "run.json").get("config", {})) for folder in folders]
    title = " and ".join(names)
    subtitle = ", ".join(dict.fromkeys(f"{run.pop('date')}" for run in runs))
    text = report_page(title, subtitle, runs, differing(configs) if len(runs) > 1 else [])
    return write_whole(path or folders[0] / _file_name(names), text)


def refresh_report(run_dir: str | Path) -> None:
    """Write a run's report while it trains. Whatever goes wrong is a warning: a picture never ends a run."""
    try:
        write_report([run_dir])
    except Exception as error:
        logger.warning("report.html was not written, training goes on: %s", one_line(error))


def _describe(folder: Path, name: str, decode: Decode | None, table: MetricTable) -> dict[str, Any]:
    """One run as the page's script wants it."""
    source = folder / "metrics.jsonl"
    if not source.is_file():
        raise MissingFileError(f"{source}: no metrics to report; give the output_dir of an sft or rl run")
    rows = read_metrics(source)
    record = _read_json(folder / "run.json")
    config = record.get("config", {})
    return {
        "name": name,
        "date": str(record.get("date", "")),
        "tiles": _tiles(rows, config, table),
        "cost": cost_table(cost_of(rows, record)),
        "charts": panel_charts(rows, table),
        "samples": choose_samples(folder, decode, _block_length(folder, config)),
        "config": yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
        "environment": list(_environment(record)),
    }


def _tiles(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], table: MetricTable) -> list[tuple[str, str]]:
    """The newest number of what matters most."""
    last = rows[-1]["step"] if rows else 0
    tiles = [("step", f"{last} of {config['max_steps']}" if "max_steps" in config else str(last))]
    is_rl = any("reward" in row for row in rows)
    for metric in table.headlines():
        if not metric.tile or (metric.name == "loss" and is_rl):  # RL's is a surrogate: its value says nothing
            continue
        value = next((row[metric.name] for row in reversed(rows) if row.get(metric.name) is not None), None)
        if value is not None:
            tiles.append((metric.tile, f"{value:.4g}"))
    return tiles


def _environment(record: Mapping[str, Any]) -> Iterator[list[str]]:
    """Rows of a table: what ran, where."""
    for key, value in record.items():
        if key == "config":
            continue
        if isinstance(value, Mapping):
            for name, inner in value.items():
                yield [f"{key}: {name}", _text(inner)]
        else:
            yield [key, _text(value)]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def _block_length(folder: Path, config: Mapping[str, Any]) -> int:
    """What the configuration or the saved model says; 0: nobody does."""
    configured = config.get("model", {}).get("block_length", 0)
    return int(configured or _read_json(folder / "final" / "config.json").get("block_size", 0))


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    paths = [folder.resolve().parts for folder in folders]
    depth = next((n for n in range(2, 12) if len({parts[-n:] for parts in paths}) == len(paths)), 12)
    return ["/".join(parts[-depth:]).removeprefix("//") for parts in paths]


def _file_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return REPORT
    others = "_".join(name.replace("/", "_") for name in names[1:])
    return f"report_and_{others}.html"


def differing(configs: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Keys whose values differ between runs, each with the values."""
    keys = list(dict.fromkeys(key for config in configs for key in config))
    rows = [[key, *(config.get(key, _ABSENT) for config in configs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys -> values as text."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
