"""What the chaos suite did, how often, and what was lost or wrong: a table at the end of its run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# (what was done, how often, how often something was lost or wrong)
Tally = Callable[[str, int, int], None]
PROPERTY = "chaos"  # travels with a test's report, from other processes too


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("chaos")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Adds a row to the table; the test fails at its end where anything was lost or wrong, or nothing was told."""
    rows: list[tuple[str, int, int]] = []
    yield lambda what, times, wrong: rows.append((what, times, wrong))
    request.node.user_properties.extend((PROPERTY, row) for row in rows)
    assert rows and not [row for row in rows if row[2]]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group]
    rows = dict.fromkeys(
        tuple(row) for report in reports for name, row in getattr(report, "user_properties", ()) if name == PROPERTY
    )
    if rows:
        lines = [f"| {what} | {times} | {wrong} |" for what, times, wrong in sorted(rows)]
        terminalreporter.write_line(
            "\n".join(["", "| what was done | times | lost or wrong |", "|---|---|---|", *lines, ""])
        )
