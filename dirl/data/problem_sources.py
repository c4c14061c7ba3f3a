"""Sources of data -> problems: files, hub data sets, procedural tasks; and what of them is kept apart or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from dirl.data import reasoning_tasks
from dirl.data.data_config import DataConfig
from dirl.data.problems import Origin, Problem, problem_from_row, with_all_columns
from dirl.data.questions import EvaluationQuestions, Overlaps, kept_apart, question_key
from dirl.data.row_source import open_rows
from dirl.data.rows import DataError, convert_rows
from dirl.data.tasks import find_task
from dirl.errors import UserError


@dataclass(frozen=True)
class ProblemSplit:
    """Which problems are trained on, and which are not."""

    trained: list[Problem]
    heldout: list[Problem]  # those of data.heldout, in the order of their keys
    overlaps: Overlaps  # rows that ask what the evaluation asks


def load_problems(
    path: str,
    *,
    split: str = "train",
    limit: int = 0,
    skip_bad_rows: bool = False,
    seed: int = 0,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[Problem]:
    """Problems of a file, a hub data set, or a procedural task.

    Args:
        path: .json, .jsonl, .parquet or .csv file, hub id `owner/name[:config][@revision]`, or `task:NAME`.
        split: of a hub data set, or `train` / `heldout` of a task; a file has none.
        limit: at most that many, in the order of the file, so that every run sees the same; 0: all.
        seed: draws the problems of a task; a file's order does not depend on it.
        columns: name that is read -> name in the data; a task has its own.
    Raises:
        DataError: one line naming the file, the row, and what is wrong with it.
    """
    if path.startswith("task:"):
        return _task_problems(path, split=split, limit=limit, seed=seed)
    rows = open_rows(path, split=split).scan()
    found = convert_rows(path, rows, problem_from_row, columns=columns, limit=limit, skip_bad_rows=skip_bad_rows)
    return with_all_columns([replace(problem, origin=Origin(path, row.number)) for row, problem in found])


def load_sources(data: DataConfig, seed: int) -> list[Problem]:
    """The problems of all sources, one source after another. Raises: as `load_problems`."""
    problems: list[Problem] = []
    for index, source in enumerate(data.all_sources()):
        found = load_problems(
            source.path,
            split=source.split,
            limit=source.limit,
            skip_bad_rows=data.skip_bad_rows,
            seed=seed,
            columns=source.columns,
        )
        origins = [Origin(source.path, problem.origin.row, index, source.weight) for problem in found]
        problems += [replace(problem, origin=origin) for problem, origin in zip(found, origins, strict=True)]
    return with_all_columns(problems)


def split_problems(problems: Sequence[Problem], data: DataConfig, evaluation: Sequence[Problem]) -> ProblemSplit:
    """Training problems without those of `data.heldout` and what `data.decontaminate=drop` leaves out.

    Args:
        evaluation: what the run is evaluated on, besides.
    Raises:
        UserError: nothing of a source is left to train on, or nothing is held out.
    """
    apart: list[int] = []
    if data.heldout:
        apart = kept_apart([question_key(problem.question) for problem in problems], data.heldout)
        if not apart:
            raise UserError(f"data.heldout={data.heldout:g} keeps none of {len(problems)} rows apart; raise it")
    heldout, is_apart = [problems[index] for index in apart], set(apart)
    rows = {index: problem for index, problem in enumerate(problems) if index not in is_apart}
    overlaps = {}
    if data.decontaminate != "off":
        asked = EvaluationQuestions(problem.question for problem in [*evaluation, *heldout])
        for index, problem in rows.items():
            if overlap := asked.find(problem.origin.path, problem.origin.row or index + 1, problem.question):
                overlaps[index] = overlap
    is_dropped = data.decontaminate == "drop"
    trained = [problem for index, problem in rows.items() if not (is_dropped and index in overlaps)]
    if lost := {problem.origin.path for problem in problems} - {problem.origin.path for problem in trained}:
        raise UserError(
            f"data.heldout={data.heldout:g} and data.decontaminate={data.decontaminate} leave nothing of {min(lost)} "
            "to train on; lower the one, or change the other"
        )
    return ProblemSplit(trained, heldout, Overlaps(list(overlaps.values()), len(rows), is_dropped))


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
