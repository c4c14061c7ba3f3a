"""What a person can put right, as opposed to a bug: the command line shows the former as one line."""

from __future__ import annotations

import signal
from collections.abc import Iterable


class UserError(ValueError):
    """One line for people: the key, file or row, its value, and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that was named does not exist."""


class RunInterrupted(Exception):
    """The run was asked to stop, has saved what it had, and can be continued by the same command."""

    def __init__(self, signal_number: int, step: int) -> None:
        self.signal_number = signal_number
        name = signal.Signals(signal_number).name if signal_number else "a signal on another rank"
        super().__init__(f"stopped by {name} at step {step}, checkpoint written; the same command continues")


def visible(text: str) -> str:
    """Foreign text as it may be written to a terminal: what would command it, or turn the writing round, is seen.

    Line breaks and tabs stay.
    """
    return text.translate(_PICTURES)


def _escapes(codes: Iterable[int]) -> dict[int, str]:
    return {code: chr(code).encode("unicode_escape").decode() for code in codes}


_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}  # ESC as U+241B
_PICTURES |= _escapes([0x7F, *range(0x80, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def one_line(error: BaseException, limit: int | None = None) -> str:
    """An exception as one line of a log: its class and its text, at most `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


class ConfigError(UserError):
    """A configuration that cannot be used: one line naming the key or file, the value and the remedy."""
