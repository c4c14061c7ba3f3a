"""`dirl report RUN_DIR [RUN_DIR ...]`: the page of a run, or of several side by side."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from dirl.data.chat import load_tokenizer, token_texts
from dirl.show.report.samples import Decode
from dirl.show.report.write import write_report


def report_runs(run_dirs: Sequence[str], output: str | None) -> Path:
    """Write the page; returns its path."""
    return write_report(run_dirs, output, decode=_decoder(run_dirs))


def _decoder(run_dirs: Sequence[str]) -> Decode | None:
    """The tokenizer of the first run that saved one: for completions recorded without texts."""
    finals = [Path(run_dir) / "final" for run_dir in run_dirs]
    final = next((final for final in finals if (final / "tokenizer.json").is_file()), None)
    if final is None:
        return None
    tokenizer = cache(partial(load_tokenizer, final))  # takes seconds, and most runs bring their texts
    return lambda ids: token_texts(tokenizer(), [ids])[0]
