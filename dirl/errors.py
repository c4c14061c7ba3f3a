"""What a person can put right, as opposed to a bug: the command line shows the former as one line."""

from __future__ import annotations

import signal


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


def one_line(error: BaseException, limit: int | None = None) -> str:
    """An exception as one line of a log: its class and its text, at most `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


class ConfigError(UserError):
    """A configuration that cannot be used: one line naming the key or file, the value and the remedy."""
