"""What a run learns from, as it is told: one path, or several sources with weights; and what it is kept apart from."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from dirl.config import PATH, Config, bounded, with_changes
from dirl.errors import UserError
from dirl.files import expand

EMBEDDED = "task:noisy_sums"


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Config):
    """Rows of one place."""

    # .json, .jsonl, .parquet or .csv file, hub id owner/name[:config][@revision], or task:NAME
    path: str = field(default="", metadata=PATH)
    split: str = "train"  # of a hub data set
    limit: int = bounded(0, least=0)  # rows read; 0: all
    columns: dict[str, str] = field(default_factory=dict)  # {name that dirl or a reward reads: name in the data}

    def check(self) -> None:
        is_task = self.path.startswith("task:")
        if self.columns and is_task:
            raise UserError(f"columns={self.columns}: {self.path} makes its columns itself; take columns out")
        if self.split != type(self).split and (is_task or expand(self.path).exists()):
            raise UserError(f"split={self.split} is of hub data sets, and {self.path} is none; take split out")


@dataclass(frozen=True, kw_only=True)
class DataSource(RowsConfig):
    """One of `data.sources`."""

    weight: float = bounded(0.0, least=0)  # its share of what is drawn, over the sum of all; 0 in all: by their rows


@dataclass(frozen=True, kw_only=True)
class DataConfig(RowsConfig):
    """What a run learns from."""

    path: str = field(default=EMBEDDED, metadata=PATH)
    # in place of path: [{path, weight, split, limit, columns}, ...]; see docs/data.md
    sources: list[dict[str, object]] = field(default_factory=list)
    # rows kept apart by a hash of their question, to evaluate on: below 1 a share, else a number; 0: none
    heldout: float = bounded(0.0, least=0)
    # training rows that share 13 words in a row with the evaluation data: say which, or leave them out
    decontaminate: Literal["report", "drop", "off"] = "report"
    system_prompt: str = ""
    skip_bad_rows: bool = False

    def check(self) -> None:
        if self.heldout > 1 and self.heldout % 1:
            raise UserError(f"heldout={self.heldout} must be a share below 1 or a whole number of rows")
        self.all_sources()

    def all_sources(self) -> list[DataSource]:
        """The sources; `path` is the only one where none are listed.

        Raises:
            UserError: one line: both are given, or neither, or a source is not what it should be.
        """
        if not self.sources:
            if not self.path:
                raise UserError("path is empty; name a file, a hub data set or a task, or list sources")
            here = {each.name: getattr(self, each.name) for each in fields(RowsConfig)}
            return [DataSource(**here)]
        of_path = {"path": ("", EMBEDDED), "split": ("train",), "limit": (0,), "columns": ({},)}
        for name, unset in of_path.items():
            if (value := getattr(self, name)) not in unset:
                raise UserError(
                    f"{name}={value} and sources are both given; set data.{name}={unset[0]}, or say it of each"
                )
        found = [with_changes(DataSource(), entry, f"sources[{i}]") for i, entry in enumerate(self.sources)]
        for index, source in enumerate(found):
            if not source.path:
                raise UserError(f"sources[{index}].path is missing; name a file, a hub data set or a task")
        if len({source.weight > 0 for source in found}) > 1:
            raise UserError(
                f"sources have the weights {[source.weight for source in found]}; give each one above 0, or none any"
            )
        return found
