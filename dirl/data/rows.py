"""A data path -> numbered rows, and numbered rows -> checked items: what problems and conversations share.

A path is a local .json, .jsonl, .parquet or .csv file, or a hub id `owner/name`, with `owner/name:config` for data sets
of several configurations. Rows are numbered from 1; in a .jsonl file the number is the line.
"""

from __future__ import annotations

import csv
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from dirl.errors import UserError, one_line
from dirl.files import expand, is_hub_id

logger = logging.getLogger(__name__)

T = TypeVar("T")
NumberedRow = tuple[int, object]


class DataError(UserError):
    """Data that cannot be used: one line naming file, row, value and remedy."""


def read_rows(path: str, *, split: str) -> Iterator[NumberedRow]:
    """Rows of a local file or of a hub data set, as they stand; `split` chooses only in the latter.

    Raises:
        DataError: the path is missing, unreadable or of an unknown kind.
    """
    file = expand(path)
    name, colon, configuration = path.partition(":")
    if file.is_dir():
        raise DataError(f"{path} is a directory; name one file ending in {', '.join(READERS)}")
    if file.is_file():
        return _read_file(file)
    if not is_hub_id(name) or (colon and not re.fullmatch(r"[\w.-]+", configuration)):
        raise DataError(f"data file {path} does not exist")
    return _read_hub(path, name, configuration, split=split)


def convert_rows(
    path: str,
    rows: Iterator[NumberedRow],
    convert: Callable[[dict[str, object]], T],
    *,
    limit: int,
    skip_bad_rows: bool,
) -> tuple[list[T], int]:
    """The first `limit` (0: all) converted rows, and how many bad ones were skipped on the way.

    Raises:
        DataError: a row that `convert` refuses with a ValueError (unless skipped), or no good row at all.
    """
    items: list[T] = []
    num_bad = 0
    for number, row in rows:
        if limit and len(items) == limit:
            break
        try:
            if isinstance(row, _NotJson):
                raise UserError(f"is not valid JSON: {shorten(str(row))}")
            if not isinstance(row, dict):
                raise UserError(f"is not an object of named columns: {shorten(row)}")
            for value in row.values():
                check_text(value)
            items.append(convert(row))
        except ValueError as error:
            if not skip_bad_rows:
                raise DataError(
                    f"{path} row {number} {error} (fix it, or set data.skip_bad_rows=true to leave bad rows out)"
                ) from error
            num_bad += 1
    if num_bad:
        logger.warning("%s: skipped %d bad rows, kept %d", path, num_bad, len(items))
    if not items:
        raise DataError(f"{path} holds no {'good ' if num_bad else ''}rows")
    return items, num_bad


class _NotJson(str):
    """A line that could not be read."""


def check_text(value: object) -> None:
    """Raises: ValueError for a text with half a surrogate pair, which JSON can hold and no tokenizer reads."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"holds {shorten(value)}, which is no valid Unicode (position {error.start})") from error


def shorten(value: object) -> str:
    """The value as it may stand in a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_file(file: Path) -> Iterator[NumberedRow]:
    if file.suffix not in READERS:
        raise DataError(f"{file} has the unknown suffix {file.suffix!r}; expected one of {', '.join(READERS)}")
    try:
        yield from READERS[file.suffix](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error


def _read_json(file: Path) -> Iterator[NumberedRow]:
    text = file.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}); a file of one object per line is named .jsonl") from error
    if not isinstance(content, list):
        raise DataError(f"{file} holds a JSON {type(content).__name__}; expected an array of row objects")
    return iter(enumerate(content, start=1))


def _read_jsonl(file: Path) -> Iterator[NumberedRow]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError:  # also a number of more digits than Python reads
                yield number, _NotJson(line.strip())  # refused or counted as a bad row


def _read_csv(file: Path) -> Iterator[NumberedRow]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), start=1):
            yield number, row.get(None, row)  # under None: cells beyond the header, so a bad row


def _read_parquet(file: Path) -> Iterator[NumberedRow]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(file)
    except ArrowException as error:
        raise DataError(f"{file} is not a readable parquet file: {one_line(error, 200)}") from error
    return iter(enumerate(table.to_pylist(), start=1))


def _read_hub(path: str, name: str, configuration: str, *, split: str) -> Iterator[NumberedRow]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise DataError(f"{path} is no local file, and loading it from the hub failed: {reason}") from error
    return iter(enumerate(dataset, start=1))


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
