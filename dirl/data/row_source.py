"""A data path -> a source of rows: it goes through them once in order, and reads single ones again from their places.

A path is a local .json, .jsonl, .parquet or .csv file, or a hub id `owner/name`, with `owner/name:config` for data sets
of several configurations and `@revision` at the end for a branch, tag or commit. Rows stay where they are, on disk: a
place is the byte a row begins at, or its index in a table (parquet files, hub data sets).
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Protocol

from dirl.data.rows import DataError, FoundRow, NotJson
from dirl.errors import one_line
from dirl.files import expand, is_hub_id

PIECE = 1 << 17  # bytes of a JSON array read at once
BATCH_ROWS = 100  # of a parquet file, written and read together
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's


class RowSource(Protocol):
    """Rows, numbered from 1."""

    def scan(self) -> Iterator[FoundRow]:
        """Every row in order.

        Raises:
            DataError: the source cannot be read.
        """
        ...

    def read(self, place: int) -> object:
        """The content of the row that `scan` found at a place."""
        ...


class ListedRows:
    """Rows that are in memory, or mapped into it."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows = rows

    def scan(self) -> Iterator[FoundRow]:
        for index, row in enumerate(self._rows):
            yield FoundRow(index + 1, index, row)

    def read(self, place: int) -> object:
        return self._rows[place]


def open_rows(path: str, *, split: str) -> RowSource:
    """The rows of a local file or of a hub data set, as they stand; `split` chooses only in the latter.

    Raises:
        DataError: the path is missing, unreadable or of an unknown kind.
    """
    file = expand(path)
    hub = re.fullmatch(r"(?P<name>[^:@]+)(:(?P<configuration>[\w.-]+))?(@(?P<revision>[\w./-]+))?", path)
    if file.is_dir():
        raise DataError(f"{path} is a directory; name one file ending in {', '.join(SOURCES)}")
    if file.is_file():
        if file.suffix not in SOURCES:
            raise DataError(f"{file} has the unknown suffix {file.suffix!r}; expected one of {', '.join(SOURCES)}")
        return SOURCES[file.suffix](file)
    if hub is None or not is_hub_id(hub["name"]):
        raise DataError(f"data file {path} does not exist")
    return _open_hub(path, **hub.groupdict(), split=split)


class _TextFile:
    """A file of text whose rows begin at known bytes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        has_mark = self.more(0, 3) == codecs.BOM_UTF8  # that some editors leave
        self._first_byte = 3 if has_mark else 0

    def more(self, place: int, size: int) -> bytes:
        """So many bytes at a place (-1: all there are)."""
        with self._opened() as stream:
            stream.seek(place)
            return stream.read(size)

    def no_text(self, place: int) -> DataError:
        """What is wrong with a file that is not UTF-8 there."""
        return DataError(f"{self.file} is not UTF-8 text (byte {place}); convert it first")

    def _lines(self, place: int) -> Iterator[tuple[int, str]]:
        """The lines from a place on, each with its own."""
        with self._opened() as stream:
            stream.seek(place)
            while line := stream.readline():
                yield place, self._decoded(line, place)
                place += len(line)

    def _decoded(self, data: bytes, place: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.no_text(place + error.start) from error

    def _opened(self) -> BinaryIO:
        try:
            return self.file.open("rb")
        except OSError as error:
            raise DataError(f"cannot read {self.file}: {error.strerror or error}") from error


class _JsonLines(_TextFile):
    """One object a line."""

    def scan(self) -> Iterator[FoundRow]:
        for number, (place, line) in enumerate(self._lines(self._first_byte), start=1):
            if line.strip():
                yield FoundRow(number, place, _from_json(line))

    def read(self, place: int) -> object:
        _, line = next(self._lines(place))
        return _from_json(line)


csv.field_size_limit(2**31 - 1)  # else a cell of more than 131,072 characters is an error


class _CsvFile(_TextFile):
    """A header, and one row a record, which may go over several lines."""

    def scan(self) -> Iterator[FoundRow]:
        begins = [0]  # where the lines of the next record do

        def lines() -> Iterator[str]:
            for place, line in self._lines(self._first_byte):
                begins.append(place)
                yield line

        try:
            reader = csv.DictReader(lines())
            self._header = reader.fieldnames or []
            for name, count in Counter(self._header).items():
                if count > 1:
                    raise DataError(f"{self.file}: {count} columns are named {name!r}; rename or remove all but one")
            begins.clear()
            for number, row in enumerate(reader, start=1):
                yield FoundRow(number, begins[0], row.get(None, row))  # under None: cells beyond the header: a bad row
                begins.clear()
        except csv.Error as error:  # a NUL byte, a cell without end
            raise DataError(f"{self.file} is not readable as CSV: {error}") from error

    def read(self, place: int) -> object:
        row = next(csv.DictReader((line for _, line in self._lines(place)), self._header))
        return row.get(None, row)


class _JsonArray(_TextFile):
    """One array of objects, read in pieces: as a whole it would take several times its size."""

    def scan(self) -> Iterator[FoundRow]:
        window = _Window(self, self._first_byte)
        if not window.skip("["):
            self._refuse()
        number = 0
        while number or not window.skip("]"):
            place, content = self._element(window)
            number += 1
            yield FoundRow(number, place, content)
            if window.skip("]"):
                break
            if not window.skip(","):
                self._refuse()
        if not window.is_at_end():
            self._refuse()

    def read(self, place: int) -> object:
        return self._element(_Window(self, place))[1]

    def _element(self, window: _Window) -> tuple[int, object]:
        found = window.take_value()
        if found is None:
            self._refuse()
            raise AssertionError("the parser found nothing wrong with the file")
        return found

    def _refuse(self) -> None:
        """Say what is wrong with the file, which the parser knows once it sees all of it."""
        text = self._decoded(self.more(self._first_byte, -1), self._first_byte)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{self.file} is not valid JSON ({error}); a file of one object per line is named .jsonl"
            ) from error
        raise DataError(f"{self.file} holds a JSON {type(content).__name__}; expected an array of row objects")


class _Window:
    """Text of a JSON file from some byte on, as much of it as is needed."""

    def __init__(self, file: _JsonArray, place: int) -> None:
        self._file, self._read_to = file, place
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._index, self._place = "", 0, place  # the byte `place` stands at `index` of the text

    def skip(self, character: str) -> bool:
        """Go past spaces and this character; False: another one stands there."""
        self._skip_spaces()
        if not self._text.startswith(character, self._index):
            return False
        self._go_to(self._index + 1)
        return True

    def take_value(self) -> tuple[int, object] | None:
        """The next value and its place; None: there is no whole one."""
        self._skip_spaces()
        place, scan = self._place, json.JSONDecoder().raw_decode
        while True:
            try:
                value, end = scan(self._text, self._index)
            except (ValueError, RecursionError):
                value, end = None, len(self._text)
            if end < len(self._text):  # what touches the end of the text may go on behind it
                self._go_to(end)
                return place, value
            if not self._extend():
                return None

    def is_at_end(self) -> bool:
        """Whether nothing but spaces is left."""
        self._skip_spaces()
        return self._index == len(self._text)

    def _skip_spaces(self) -> None:
        while True:
            end = _SPACE.match(self._text, self._index).end()  # type: ignore[union-attr]
            self._go_to(end)
            if end < len(self._text) or not self._extend():
                return

    def _go_to(self, index: int) -> None:
        passed = self._text[self._index : index]
        self._place += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogatepass"))
        self._index = index

    def _extend(self) -> bool:
        """Read on, more each time so that a long value is not begun too often; False: the file ends."""
        data = self._file.more(self._read_to, max(PIECE, len(self._text) - self._index))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise self._file.no_text(self._read_to + error.start) from error
        self._read_to += len(data)
        self._text, self._index = self._text[self._index :] + text, 0
        return bool(data)


class _ParquetFile:
    """A file whose rows can only be unpacked by the thousands: they are laid down in a temporary file, by the hundred.

    The file has no name and is gone with the process.
    """

    def __init__(self, file: Path) -> None:
        from pyarrow import parquet

        self.file = file
        self._spool: BinaryIO | None = None
        self._reader: Any = None  # of the spool
        with self._damage_named():
            parquet.ParquetFile(file).close()

    def scan(self) -> Iterator[FoundRow]:
        from pyarrow import ipc, parquet

        self._spool = spool = TemporaryFile()  # noqa: SIM115 - it stays
        self._reader = None
        options = ipc.IpcWriteOptions(compression="lz4")
        with self._damage_named(), parquet.ParquetFile(self.file, pre_buffer=False, buffer_size=1 << 16) as source:
            batches = source.iter_batches(BATCH_ROWS, use_threads=False)
            with ipc.new_file(spool, source.schema_arrow, options=options) as sink:
                number = 0
                for index, batch in enumerate(batches):
                    sink.write_batch(batch)
                    for place, row in enumerate(batch.to_pylist(), start=index * BATCH_ROWS):
                        number += 1
                        yield FoundRow(number, place, row)

    def read(self, place: int) -> object:
        from pyarrow import ipc

        self._reader = self._reader or ipc.open_file(self._spool)
        batch = self._reader.get_batch(place // BATCH_ROWS)
        return batch.slice(place % BATCH_ROWS, 1).to_pylist()[0]

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except (ArrowException, OSError) as error:
            raise DataError(f"{self.file} is not a readable parquet file: {one_line(error, 200)}") from error


def _from_json(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # also a number of more digits than Python reads
        return NotJson(line.strip())  # refused or counted as a bad row


def _open_hub(path: str, name: str, configuration: str | None, revision: str | None, *, split: str) -> RowSource:
    from datasets import load_dataset

    try:
        return ListedRows(load_dataset(name, configuration, split=split, revision=revision))
    except (OSError, ValueError) as error:
        reason = one_line(error, 200)
        raise DataError(f"{path} is no local file, and loading it from the hub failed: {reason}") from error


SOURCES: dict[str, Callable[[Path], RowSource]] = {
    ".json": _JsonArray,
    ".jsonl": _JsonLines,
    ".parquet": _ParquetFile,
    ".csv": _CsvFile,
}
