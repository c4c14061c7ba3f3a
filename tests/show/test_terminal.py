"""What a terminal shows, what a log shows, and silence."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from dirl.errors import visible
from dirl.show.terminal import Terminal, draft_text, live_text


def screen(*, is_terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=120, color_system=None)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.getLogger("dirl").setLevel(logging.WARNING)
    yield
    logging.getLogger("dirl").setLevel(logging.NOTSET)


def play(terminal: Terminal) -> None:
    terminal.start(total=5, completed=2)
    terminal.begin("rollout", 2)
    terminal.advance(10)
    terminal._progress.refresh()
    terminal.advance(10)
    terminal.say("4+3=7 (gold 7, 1) [not markup]")
    terminal.step(3, 5, "reward 0.5")
    terminal.report(3, 5, {"reward": 0.5, "grad_norm": 0.123456, "unknown/metric": 1.0}, "reward 0.5")
    terminal.stop()


def test_a_terminal_has_bars_and_a_table() -> None:
    console = screen(is_terminal=True)
    play(Terminal(is_main=True, console=console))
    text = written(console)
    assert "rollout" in text and "1/2" in text and "tokens/s" in text and "steps" in text
    assert "4+3=7 (gold 7, 1) [not markup]" in text
    head, row = (line for line in text.splitlines() if "grad norm" in line or "0.1235" in line)
    assert head.split()[-3:] == ["reward", "grad", "norm"] and row.split() == ["3/5", "0.5", "0.1235"]


def test_elsewhere_each_step_is_a_line(caplog: pytest.LogCaptureFixture) -> None:
    console = screen(is_terminal=False)
    with caplog.at_level(logging.INFO, logger="dirl.show.terminal"):
        play(Terminal(is_main=True, console=console))
    assert caplog.messages == ["step 3/5  reward 0.5"]
    assert written(console) == "4+3=7 (gold 7, 1) [not markup]\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_quiet_and_other_ranks_say_nothing(is_terminal: bool, quiet: None, caplog: pytest.LogCaptureFixture) -> None:
    console = screen(is_terminal=is_terminal)
    play(Terminal(is_main=True, console=console))
    assert written(console) == "" and caplog.messages == []


def test_other_ranks_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    console = screen(is_terminal=True)
    with caplog.at_level(logging.INFO):
        play(Terminal(is_main=False, console=console))
    assert written(console) == "" and caplog.messages == []


def test_drafts_are_dim() -> None:
    text = draft_text(["4", "+", "3", ""], [True, False, True, False])
    assert text.plain == "4+3░"
    assert [(span.start, span.end, span.style) for span in text.spans if span.style] == [(1, 2, "dim"), (3, 4, "dim")]


def test_what_was_written_last_stays() -> None:
    console = screen(is_terminal=True)
    with live_text(console) as show:
        show(draft_text(["first"], [False]))
        show(draft_text(["last"], [True]))
    assert written(console).endswith("last\n\x1b[?25h")


def test_bars_can_be_opened_again_for_each_chunk() -> None:
    console = screen(is_terminal=True)
    terminal = Terminal(is_main=True, console=console)
    for _ in range(2):
        terminal.open()
        terminal.begin("evaluation", 3)
        terminal.advance(5)
        terminal._progress.refresh()
        terminal.stop()
    assert written(console).count("evaluation") >= 2


def test_foreign_text_commands_no_terminal() -> None:
    """Clear the screen, set the title, write the clipboard, overwrite the line, turn the direction of writing."""
    hostile = "a\x1b[2J\x1b]0;t\x07\x9b31mb\rc\u202ed\x7f\te\n"
    seen = "a\u241b[2J\u241b]0;t\u2407\\x9b31mb\u240dc\\u202ed\\x7f\te\n"
    assert visible(hostile) == seen and visible(seen) == seen
    console = screen(is_terminal=True)
    Terminal(is_main=True, console=console).say(hostile)
    assert written(console).split() == seen.split()
    assert draft_text([hostile], [True]).plain == seen
