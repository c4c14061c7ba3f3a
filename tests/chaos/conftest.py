"""The table of the chaos suite: every test here says what it did, how often, and how often something was lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest drops what -m leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("chaos")


class Tally:
    """A row of the table: what is done, how often it was, and what was lost or wrong."""

    def __init__(self) -> None:
        self.what, self.times = "", 0
        self.lost: list[str] = []

    def count(self, is_well: bool, otherwise: object) -> None:
        """One more time; `otherwise` says what was lost."""
        self.times += 1
        if not is_well:
            self.lost.append(str(otherwise))


@pytest.fixture
def tally(record_property: pytest.FixtureRequest) -> Iterator[Tally]:
    """Fails its test at the end, where all that was lost is told together."""
    mine = Tally()
    yield mine
    record_property("chaos", [mine.what, mine.times, len(mine.lost)])  # type: ignore[operator]
    assert mine.what and mine.times, "nothing was done"
    assert not mine.lost, "\n".join(mine.lost)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, as it stands in docs/reliability.md; a test that failed otherwise is a loss too."""
    reports = [report for group in terminalreporter.stats.values() for report in group if hasattr(report, "when")]
    rows = [value for r in reports if r.when == "teardown" for name, value in r.user_properties if name == "chaos"]
    rows += [[r.nodeid, 1, 1] for r in reports if r.failed and r.when != "teardown" and "tests/chaos/" in r.nodeid]
    if not rows:
        return
    terminalreporter.section("chaos")
    terminalreporter.line("| what | how often | lost or wrong |\n|---|---|---|")
    for what, times, lost in sorted(rows):
        terminalreporter.line(f"| {what} | {times} | {lost} |")
    terminalreporter.line(f"| all | {sum(row[1] for row in rows)} | {sum(row[2] for row in rows)} |")
