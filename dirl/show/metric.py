"""What is known of a metric, and which of them a view shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from dirl.show.charts import PANELS, PICTURES, Panel, Picture


@dataclass(frozen=True)
class Metric:
    """One number of metrics.jsonl, or a family of them."""

    name: str  # {word} stands for any text: such a row is a family
    unit: str
    meaning: str
    panel: str = ""  # title of its chart in the report; "": none
    picture: str = ""  # file name of its picture in plots/; "": none
    column: str = ""  # its head in the terminal's table of a step; "": not there
    tile: str = ""  # its name in the tiles of the report, if it has a `headline`; "": not there
    headline: int = 0  # place among the numbers a run is judged by, which the model card lists; 0: not among them
    error: str = ""  # the metric that is its standard error
    part: str = ""  # a metric that is a part of it: where that is logged, only parts are plotted

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches its names, whole."""
        return re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(self.name)))


@dataclass(frozen=True)
class MetricTable:
    """Rows, and the charts they name.

    Raises:
        ValueError: a row names a chart that is not there.
    """

    rows: tuple[Metric, ...]
    panels: tuple[Panel, ...] = PANELS
    pictures: tuple[Picture, ...] = PICTURES

    def __post_init__(self) -> None:
        titles = {"", *(panel.title for panel in self.panels)}
        files = {"", *(picture.file_name for picture in self.pictures)}
        for row in self.rows:
            if row.panel not in titles or row.picture not in files:
                raise ValueError(
                    f"{row.name}: no chart {row.panel!r} or no picture {row.picture!r}; see show/charts.py"
                )

    def row(self, name: str) -> Metric | None:
        """What is known of a metric: the first row that has its name."""
        return next((row for row in self.rows if row.pattern.fullmatch(name)), None)

    def choose(self, names: Collection[str], is_wanted: Callable[[Metric], object]) -> Iterator[tuple[str, Metric]]:
        """Those of some names whose row is wanted, each with its row, in the order of the rows."""
        known = {name: self.row(name) for name in names}
        for row in filter(is_wanted, self.rows):
            yield from ((name, row) for name, found in known.items() if found is row)

    def plotted(self, names: Collection[str], is_wanted: Callable[[Metric], object]) -> list[tuple[str, Metric]]:
        """The same, without sums whose parts are there too."""
        known = set(names)
        return [(name, row) for name, row in self.choose(names, is_wanted) if row.part not in known]

    def headlines(self) -> list[Metric]:
        """The numbers a run is judged by."""
        return sorted((row for row in self.rows if row.headline), key=lambda row: row.headline)
