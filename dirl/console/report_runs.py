"""`dirl report RUN_DIR [RUN_DIR ...]`: the page of a run, of several side by side, or of several in groups."""

from __future__ import annotations

import glob
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from dirl.data.chat import load_tokenizer, token_texts
from dirl.errors import MissingFileError, UserError, one_line
from dirl.eval.estimates import Difference
from dirl.eval.sample_store import SAMPLES
from dirl.eval.scores import Scores, compare_groups, read_scores
from dirl.show.metric_table import read_metrics
from dirl.show.report.groups import (
    Run,
    Table,
    final_values,
    group_runs,
    mean_and_error,
    metric_names,
    write_group_report,
)
from dirl.show.report.samples import Decode
from dirl.show.report.write import write_report

_NOTE = (
    "What a group ended with above the first one. The plain standard error is that of the two means over runs: what "
    "other seeds would change. Interval and p are a paired bootstrap (10,000 resamples) over the problems that both "
    "groups were evaluated on: what other problems would change; only where such samples exist. Neither is part of the "
    "other."
)


def report_runs(patterns: Sequence[str], output: str | None, group_by: str = "") -> Path:
    """Write the page; returns its path.

    Args:
        patterns: directories of runs, or shell patterns of them, which a shell has not expanded.
        group_by: a key of their configurations; empty: side by side.
    """
    run_dirs = _expanded(patterns)
    if group_by:
        return report_groups(run_dirs, output, group_by)
    return write_report(run_dirs, output, decode=_decoder(run_dirs))


def report_groups(run_dirs: Sequence[Path], output: str | Path | None, key: str) -> Path:
    """The page of runs in groups by a key, or by several with commas; default: by_<key>.html beside them."""
    scores = {_name(folder, run_dirs): read_scores(folder) for folder in run_dirs}
    runs = [_read(folder, _name(folder, run_dirs), scores) for folder in run_dirs]
    groups = group_runs(runs, key)
    path = Path(output) if output else _parent(run_dirs)
    if path.is_dir():
        path /= f"by_{key.replace(',', '_')}.html"
    return write_group_report(groups, path, key, _differences(groups, scores) if len(groups) > 1 else None)


def _expanded(patterns: Sequence[str]) -> list[Path]:
    """Directories as they are named; of a pattern, those that hold a run or an evaluation.

    Raises:
        UserError: a pattern without any.
    """
    found: list[Path] = []
    for pattern in patterns:
        if Path(pattern).exists() or not glob.has_magic(pattern):
            found.append(Path(pattern))
            continue
        matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True)) if _holds_run(Path(match))]
        if not matches:
            raise UserError(f"{pattern}: no run matches; give the output directories of sft or rl runs, or evaluations")
        found += matches
    return list(dict.fromkeys(found))


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("metrics.jsonl", SAMPLES))


def _read(folder: Path, name: str, scores: Mapping[str, Scores]) -> Run:
    if not _holds_run(folder):
        raise MissingFileError(f"{folder}: no metrics.jsonl and no {SAMPLES}; give output directories of runs")
    try:
        record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/run.json cannot be read, which says what to group by: {one_line(error)}") from error
    if (folder / SAMPLES).is_file():
        return Run(name, record, [], {metric: fmean(right.values()) for metric, right in scores[name].items()})
    rows = read_metrics(folder / "metrics.jsonl")
    return Run(name, record, rows, final_values(rows))


def _parent(folders: Sequence[Path]) -> Path:
    """The folder that holds all of them."""
    return Path(os.path.commonpath([folder.absolute().parent for folder in folders]))


def _name(folder: Path, folders: Sequence[Path]) -> str:
    return folder.absolute().relative_to(_parent(folders)).as_posix()


def _differences(groups: Mapping[str, Sequence[Run]], scores: Mapping[str, Scores]) -> Table:
    """Every group against the first, in every metric that both ended with."""
    first, *others = groups
    rows = [["metric", "group", f"above {first}", "± over runs", "95 % over problems", "p", "problems", "differ"]]
    for metric in metric_names(groups):
        for other in others:
            a, b = ([run.values[metric] for run in groups[name] if metric in run.values] for name in (first, other))
            if a and b:
                scores_a, scores_b = ([scores[run.name] for run in groups[name]] for name in (first, other))
                rows.append([metric, other, *_compared(a, b, compare_groups(scores_a, scores_b, metric))])
    return Table("Differences", _NOTE, rows)


def _compared(a: Sequence[float], b: Sequence[float], paired: tuple[int, Difference] | None) -> list[str]:
    """Cells of a row: difference of the means, its error over runs, and the paired comparison where there is one."""
    (mean_a, error_a), (mean_b, error_b) = mean_and_error(a), mean_and_error(b)
    error = math.hypot(error_a, error_b)
    cells = [f"{mean_b - mean_a:+.4g}", "one run" if math.isnan(error) else f"{error:.2g}"]
    if paired is None:
        return [*cells, "no samples", "-", "-", "-"]
    count, difference = paired
    interval = f"{difference.low:+.4f} to {difference.high:+.4f}"
    return [*cells, interval, f"{difference.p_value:.4f}", str(count), "yes" if difference.is_significant else "no"]


def _decoder(run_dirs: Sequence[Path]) -> Decode | None:
    """The tokenizer of the first run that saved one: for completions recorded without texts."""
    final = next((run_dir / "final" for run_dir in run_dirs if (run_dir / "final/tokenizer.json").is_file()), None)
    if final is None:
        return None
    tokenizer = cache(partial(load_tokenizer, final))  # takes seconds, and most runs bring their texts
    return lambda ids: token_texts(tokenizer(), [ids])[0]
