"""What a run shows in a terminal: a bar over all steps, one over the phase that runs, a small table per step.

Bars and tables need a terminal; elsewhere each step is one line of the log. Setting the logger "dirl" to WARNING
(`--quiet` on the command line) silences all of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from dirl.errors import visible
from dirl.show.metric import MetricTable
from dirl.show.metric_table import TABLE

logger = logging.getLogger(__name__)

_MASKED = "░"


def is_quiet() -> bool:
    """Whether people asked for silence: the level was set on the logger `dirl` itself."""
    return logging.getLogger("dirl").level >= logging.WARNING


class Terminal:
    """The screen of one run. Every call is cheap and does nothing where nothing is to be shown."""

    def __init__(self, *, is_main: bool, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.speaks = is_main and not is_quiet()
        self.is_live = self.speaks and self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.fields[name]:<10}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            disable=not self.is_live,
            transient=True,
        )
        self._steps: TaskID | None = None
        self._phase: TaskID | None = None
        self._tokens = 0
        self._since = 0.0

    def open(self) -> None:
        """Show bars from now on."""
        self._progress.start()

    def start(self, total: int, completed: int) -> None:
        """Show the bar over all optimizer steps."""
        self.open()
        self._steps = self._progress.add_task("", total=total, completed=completed, name="steps")

    def stop(self) -> None:
        """Take the bars away."""
        self.end()
        self._progress.stop()

    def begin(self, name: str, total: int) -> None:
        """A phase of so many items begins: completions of a rollout, micro-batches of a training step."""
        self.end()
        if self.is_live:
            self._phase = self._progress.add_task("", total=total, name=name)
        self._tokens, self._since = 0, time.monotonic()

    def advance(self, tokens: int) -> None:
        """One item of the phase is done, with so many tokens."""
        self._tokens += tokens
        if self._phase is not None:
            seconds = max(time.monotonic() - self._since, 1e-9)
            self._progress.update(self._phase, advance=1, description=f"{self._tokens / seconds:.0f} tokens/s")

    def end(self) -> None:
        """The phase is over."""
        if self._phase is not None:
            self._progress.remove_task(self._phase)
            self._phase = None

    def say(self, text: str) -> None:
        """A line for people, above the bars."""
        if self.speaks:
            self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, total: int, headline: str) -> None:
        """An optimizer step is done."""
        self.end()
        if self._steps is not None:
            self._progress.update(self._steps, completed=step, total=total, description=headline)

    def report(self, step: int, total: int, metrics: Mapping[str, float], headline: str) -> None:
        """The numbers of a logging step: a table in a terminal, a line elsewhere."""
        if self.is_live:
            self.console.print(step_table(step, total, metrics))
        elif self.speaks:
            logger.info("step %d/%d  %s", step, total, headline)


def step_table(step: int, total: int, metrics: Mapping[str, float], metric_table: MetricTable = TABLE) -> Table:
    """One row under its heads, as wide as it must be; what a run does not log has no column."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    known = {row.column: metrics[name] for name, row in metric_table.choose(metrics, lambda row: row.column)}
    for head in ("step", *known):
        table.add_column(head, justify="right", header_style="dim", overflow="fold")
    table.add_row(f"{step}/{total}", *(f"{value:.4g}" for value in known.values()))
    return table


def draft_text(texts: Sequence[str], is_committed: Sequence[bool]) -> Text:
    """Committed tokens plain, drafts dim."""
    shown = Text()
    for text, done in zip(texts, is_committed, strict=True):
        shown.append(visible(text) or (_MASKED if not done else ""), style="" if done else "dim")
    return shown


@contextmanager
def live_text(console: Console | None = None) -> Iterator[Callable[[Text], None]]:
    """A place in the terminal that is written again and again; what was written last stays."""
    with Live(Text(), console=console or Console(), auto_refresh=False, vertical_overflow="visible") as live:
        yield lambda text: live.update(text, refresh=True)
