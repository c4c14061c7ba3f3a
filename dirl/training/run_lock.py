"""A directory and who writes it: one run at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dirl.errors import UserError
from dirl.training.distributed import Distributed

logger = logging.getLogger(__name__)


@contextmanager
def hold(output_dir: str | Path, distributed: Distributed) -> Iterator[None]:
    """The directory is made, can be written, and is no other process's meanwhile; collective.

    The main rank holds a lock that the system takes back when the process ends, however it ends. A process may hold a
    directory twice, and lets go of it with the first of the two.

    Raises:
        UserError: on every rank.
    """
    with ExitStack() as held:
        _agree(_take(Path(output_dir), held) if distributed.is_main else "", output_dir, distributed)
        yield


def check_free(output_dir: str | Path, distributed: Distributed, *, foreign: Sequence[str]) -> None:
    """Whether `hold` could have the directory now; nothing is made. Collective.

    Args:
        foreign: names in it that only another kind of run writes.
    Raises:
        UserError: on every rank.
    """
    with ExitStack() as trial:
        obstacle = _obstacle(Path(output_dir).absolute(), foreign, trial) if distributed.is_main else ""
    _agree(obstacle, output_dir, distributed)


def _agree(refusal: str, output_dir: str | Path, distributed: Distributed) -> None:
    if refusal := distributed.from_main(refusal):
        raise UserError(f"output_dir={output_dir} {refusal}; name another directory")


def _obstacle(directory: Path, foreign: Sequence[str], trial: ExitStack) -> str:
    """Why a run cannot be there, or nothing."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return f"cannot be written: {existing} is a file, or not yours to write"
    if existing != directory:
        return ""
    found = [name for name in foreign if (directory / name).exists()]
    return f"holds {found[0]}, of another kind of run" if found else _take(directory, trial)


def _take(directory: Path, held: ExitStack) -> str:
    """Lock the directory, and leave the number of this process there; why that cannot be, or nothing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = held.enter_context((directory / ".lock").open("a+", encoding="utf-8"))
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            return f"is another run's (process {file.read().strip()}): wait for its end"
        logger.warning("%s: no locks on this file system (%s); start no second run there", directory, error.strerror)
    try:  # unbuffered: what a full disk refused would be tried again as the file is closed
        file.truncate(0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""
