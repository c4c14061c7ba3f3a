"""Numbered rows -> checked items: what problems and conversations share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from dirl.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DataError(UserError):
    """Data that cannot be used: one line naming file, row, value and remedy."""


class FoundRow(NamedTuple):
    """A row as it stands in its source."""

    number: int  # for people: from 1; in a .jsonl file the line
    place: int  # for the source, which reads it again from there
    content: object


class NotJson(str):
    """A line that could not be read."""


def convert_rows(
    path: str,
    rows: Iterable[FoundRow],
    convert: Callable[[dict[str, object]], T],
    *,
    columns: Mapping[str, str],
    limit: int,
    skip_bad_rows: bool,
) -> Iterator[tuple[FoundRow, T]]:
    """The first `limit` (0: all) good rows and what `convert` makes of them; bad ones are counted and said at the end.

    Args:
        columns: of `row_columns`.
    Raises:
        DataError: a row that `convert` refuses with a ValueError (unless skipped), or no good row at all.
    """
    num_good = num_bad = 0
    for row in rows:
        if limit and num_good == limit:
            break
        try:
            item = convert(row_columns(row.content, columns))
        except ValueError as error:
            if not skip_bad_rows:
                raise bad_row(path, row.number, error) from error
            num_bad += 1
            continue
        num_good += 1
        yield row, item
    if num_bad:
        logger.warning("%s: skipped %d bad rows, kept %d", path, num_bad, num_good)
    if not num_good:
        raise DataError(f"{path} holds no {'good ' if num_bad else ''}rows")


def bad_row(path: str, number: int, error: ValueError) -> DataError:
    """What is wrong with a row, and what can be done about it."""
    return DataError(f"{path} row {number} {error} (fix it, or set data.skip_bad_rows=true to leave bad rows out)")


def row_columns(content: object, columns: Mapping[str, str]) -> dict[str, object]:
    """A row as dirl reads it: columns under the names that are wanted, lists of text parts as texts.

    Args:
        columns: wanted name -> name in the data; a column that bears a wanted name itself is left out.
    Raises:
        ValueError: saying what is wrong with the row.
    """
    if isinstance(content, NotJson):
        raise UserError(f"is not valid JSON: {shorten(str(content))}")
    if not isinstance(content, dict):
        raise UserError(f"is not an object of named columns: {shorten(content)}")
    row = {name: _joined(value) if isinstance(value, list) else value for name, value in content.items()}
    if columns:
        row = _renamed(row, columns)
    for value in row.values():
        check_text(value)
    return row


def _renamed(row: dict[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    if missing := [name for name in columns.values() if name not in row]:
        raise UserError(f"has the columns {', '.join(row)}; data.columns={dict(columns)} names {missing[0]!r} too")
    taken = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in taken}
    return kept | {wanted: row[name] for wanted, name in columns.items()}


def _joined(items: list[Any]) -> object:
    """Text parts [{"type": "text", "text": ...}, ...] as one text, also where they are the content of messages."""
    if items and all(isinstance(part, dict) and part.get("type") == "text" for part in items):
        texts = [part.get("text") for part in items]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else items
    if any(isinstance(message, dict) and isinstance(message.get("content"), list) for message in items):
        return [_message(message) for message in items]
    return items


def _message(message: Any) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    return {**message, "content": _joined(content)} if isinstance(content, list) else message


def check_text(value: object) -> None:
    """Raises: ValueError for a text with half a surrogate pair, which JSON can hold and no tokenizer reads."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"holds {shorten(value)}, which is no valid Unicode (position {error.start})") from error


def column_names(row: Iterable[object]) -> str:
    """The columns of a row as they may stand in a one-line message."""
    names = map(str, row)
    return ", ".join(name if name.isprintable() else ascii(name) for name in names) or "(none)"


def shorten(value: object) -> str:
    """The value as it may stand in a one-line message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
