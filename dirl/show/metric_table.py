"""The metrics of a run, read from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dirl.files import read_json_lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line without its newline was cut by a kill and is left out.

    Raises:
        UserError: a complete line is not a JSON object with a step.
    """
    return list(read_json_lines(path, "a line of metrics", lambda row: row["step"] + 0))
