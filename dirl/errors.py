"""What a person can put right, as opposed to a bug: the command line shows the former as one line."""

from __future__ import annotations


class UserError(ValueError):
    """One line for people: the key, file or row, its value, and the remedy."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or directory that was named does not exist."""
