"""Files that are there whole or not at all, JSON lines, and what a path means: the only code of its kind."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dirl.errors import UserError, one_line


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """The whole content under this name or, whatever happens in between, what stood there before.

    Written beside its name, forced to disk, renamed; missing folders are made.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)  # give a full disk its space back
        raise


def write_json(path: str | Path, value: Any) -> Path:
    """A JSON document, whole; NaN is an error."""
    return write_whole(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """What stands inside writes there.

    Raises:
        UserError: the disk would not, in whatever class a library says so; tokenizers have none of their own.
    """
    try:
        yield
    except Exception as error:
        is_of_disk = isinstance(error, OSError | RuntimeError) or "(os error " in str(error)
        if isinstance(error, UserError) or not is_of_disk:
            raise
        raise UserError(f"{path} cannot be written: {one_line(error, 200)}; {remedy}") from error


@contextmanager
def whole_folder(target: Path, remedy: str, *, is_lasting: bool = True) -> Iterator[Path]:
    """A folder to write into, which takes the target's place once all of it is there: complete or absent.

    Args:
        is_lasting: forced to disk first; False: soon deleted, and nobody waits for the disk.
    Raises:
        UserError: as `writing`.
    """
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(target, remedy):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for written in temporary.rglob("*") if is_lasting else ():
                force_to_disk(written)
            publish(temporary, target)
    finally:  # gone once it has its name; after a failure, give a full disk its space back
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Give a folder that is all on disk its final name, in place of what stood there."""
    replaced = final.with_name(final.name + ".old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    force_to_disk(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def force_to_disk(path: Path) -> None:
    """fsync of a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_json_lines(path: str | Path, rows: Iterable[Any]) -> None:
    """One line a row at the end of a file, which is made where it is missing. Never NaN."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with target.open("a", encoding="utf-8") as file:
        file.write(text)


def read_json_lines(path: str | Path, what: str, check: Callable[[Any], object] = lambda row: row) -> Iterator[Any]:
    """The rows of a file of JSON lines; a last line without its end was cut by a kill and is left out.

    Args:
        what: a line holds, for the message, such as "a line of metrics".
        check: raises ValueError, KeyError or TypeError for a row that is none.
    Raises:
        UserError: naming the line that is no JSON or is refused.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                check(row)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                shown = line[:80].decode("utf-8", errors="replace").rstrip("\n")
                raise UserError(f"{path}, line {number}: not {what}: {shown!r}; remove it") from error
            yield row


def cut_torn_line(path: str | Path) -> None:
    """Take a last line that a kill cut short off a file, so that the next append starts clean."""
    with Path(path).open("r+b") as file:
        end = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(end)


def expand(path: str | Path) -> Path:
    """A path as a person writes it: `~` is their home, `~name` somebody else's if there is such a person."""
    return Path(os.path.expanduser(path))


def is_hub_id(path: str) -> bool:
    """Whether this names something on the Hugging Face Hub, `owner/name`, and nothing that is here.

    Whatever exists, is absolute, begins with `.` or `~`, or ends like a data file is a path.
    """
    if expand(path).exists():
        return False
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path) is not None and Path(path).suffix not in _DATA_SUFFIXES


_DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".py", ".yaml", ".yml")
