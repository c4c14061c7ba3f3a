"""A path -> problems: a file, a hub data set, or a procedural task."""

from __future__ import annotations

from dirl.data import reasoning_tasks
from dirl.data.problems import Problem, problem_from_row, with_all_columns
from dirl.data.row_source import open_rows
from dirl.data.rows import DataError, convert_rows
from dirl.data.tasks import find_task


def load_problems(
    path: str, *, split: str = "train", limit: int = 0, skip_bad_rows: bool = False, seed: int = 0
) -> list[Problem]:
    """Problems of a file, a hub data set, or a procedural task.

    Args:
        path: .json, .jsonl, .parquet or .csv file, hub id `owner/name[:config]`, or `task:NAME`.
        split: of a hub data set, or `train` / `heldout` of a task; a file has none.
        limit: at most that many, in the order of the file, so that every run sees the same; 0: all.
        seed: draws the problems of a task; a file's order does not depend on it.
    Raises:
        DataError: one line naming the file, the row, and what is wrong with it.
    """
    if path.startswith("task:"):
        return _task_problems(path, split=split, limit=limit, seed=seed)
    rows = open_rows(path, split=split).scan()
    found = convert_rows(path, rows, problem_from_row, limit=limit, skip_bad_rows=skip_bad_rows)
    return with_all_columns([problem for _, problem in found])


def _task_problems(path: str, *, split: str, limit: int, seed: int) -> list[Problem]:
    is_library = path.startswith(reasoning_tasks.PREFIX)
    task = None if is_library else find_task(path)
    if split not in ("train", "heldout"):
        raise DataError(f"{path} has the splits train and heldout, got {split!r}")
    if task is None:
        return reasoning_tasks.reasoning_problems(path, split=split, limit=limit, seed=seed)
    if split == "train":
        return task.problems(limit or task.num_train, seed, "train")
    return task.problems(limit or task.num_heldout, seed, "heldout")
