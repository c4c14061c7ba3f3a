"""Judged completions <-> samples.jsonl, so that a killed evaluation continues where it stopped.

samples_header.json beside it says what the samples depend on. Samples of another dependence are never mixed in; more
data sets, modes or samples a problem may be added at any time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dirl.errors import ConfigError
from dirl.eval.results import Sample
from dirl.files import append_json_lines, cut_torn_line, read_json_lines, write_json
from dirl.rollout.engine import Completion

Which = tuple[int, int]  # problem index, sample index

SAMPLES = "samples.jsonl"
HEADER = "samples_header.json"
_SAMPLE_FIELDS = tuple(field.name for field in dataclasses.fields(Sample))
_ROW_FIELDS = ("dataset", "mode", *(name for name in _SAMPLE_FIELDS if name != "marks"))  # else a line is no sample


class SampleStore:
    """The samples of one output directory.

    Args:
        settings: everything a sample depends on, by dotted key; JSON values.
        overwrite: drop samples that depend on something else, rather than refuse.
    Raises:
        ConfigError: such samples are there.
    """

    def __init__(self, directory: Path, settings: Mapping[str, object], *, overwrite: bool = False) -> None:
        self.path, self._header_path = directory / SAMPLES, directory / HEADER
        directory.mkdir(parents=True, exist_ok=True)
        known = read_header(directory) if self._header_path.exists() else None
        difference = _difference(known, settings)
        if known is None and self.path.exists():
            difference = f"there is no {HEADER} to tell which"
        if difference and not overwrite:
            raise ConfigError(
                f"{self.path} holds samples of another configuration ({difference}); "
                "choose another output_dir, or drop them with overwrite=true"
            )
        if difference:
            self.path.unlink(missing_ok=True)
            known = None
        # Before the first sample: a kill in between leaves a header alone, which is harmless.
        write_json(self._header_path, {**(known or {}), **settings})
        if self.path.exists():
            cut_torn_line(self.path)
        self._found = read_samples(self.path) if self.path.exists() else {}

    def load(self, dataset: str, mode: str) -> dict[Which, Sample]:
        """What there is of one data set in one mode."""
        return dict(self._found.get((dataset, mode), {}))

    def append(self, dataset: str, mode: str, judged: Sequence[tuple[Sample, Completion]]) -> None:
        """Write a chunk; the tokens go to disk only, there can be gigabytes of them."""
        rows = [
            {
                "dataset": dataset,
                "mode": mode,
                **vars(sample),
                "text": completion.text,
                "token_ids": completion.token_ids,
                "step_map": completion.step_map,
            }
            for sample, completion in judged
        ]
        append_json_lines(self.path, rows)
        self._found.setdefault((dataset, mode), {}).update({(s.problem, s.sample): s for s, _ in judged})


def read_header(directory: Path) -> dict[str, object]:
    """What the samples of an output directory depend on."""
    # Samples of a header that names no cache are exact.
    return {
        "engine.approximate_cache": "none",
        **json.loads((directory / HEADER).read_text(encoding="utf-8")),
    }


def read_samples(path: Path) -> dict[tuple[str, str], dict[Which, Sample]]:
    """The samples of a samples.jsonl by (data set, mode), then by (problem, sample).

    Raises:
        UserError: a complete line that is no sample.
    """
    found: dict[tuple[str, str], dict[Which, Sample]] = {}
    for row in read_json_lines(path, "a sample", lambda row: [row[name] for name in _ROW_FIELDS]):
        sample = Sample(**{name: row[name] for name in _SAMPLE_FIELDS if name in row})
        found.setdefault((row["dataset"], row["mode"]), {})[sample.problem, sample.sample] = sample
    return found


def _difference(known: Mapping[str, object] | None, settings: Mapping[str, object]) -> str:
    """The first key that both have with different values, in words; "" when there is none."""
    stored, wanted = (json.loads(json.dumps(one or {})) for one in (known, settings))
    for key in wanted:
        if key in stored and stored[key] != wanted[key]:
            return f"{key}: {stored[key]!r} there, {wanted[key]!r} here"
    return ""
