"""Completions for people: HTML, frames, tables, of anything with the fields of a row."""

from __future__ import annotations

import sys
import time
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from dirl.show.completions import completion_html, completions_table, frames, list_html, play, tokens_table

HAND_MADE = SimpleNamespace(
    prompt_ids=[1] * 6,
    token_ids=list(range(6)),
    step_map=[1, 2, 1, 1, 3, 2],
    logprobs=[-0.5] * 6,
    completion_length=5,
    finish_reason="stop",
    num_denoising_steps=5,
    block_length=4,
    tail=2,
    token_texts=["a", "b", "<c>", "d", "e", "<|im_end|>"],
)


class Texts(HTMLParser):
    """Text of HTML, and the tags that opened."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text, self.tags = "", set[str]()
        self.titles: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_completion_shows_its_tokens_and_steps() -> None:
    found = Texts(completion_html(HAND_MADE))
    assert found.text.startswith("ab<c>de<|im_end|>") and "5 tokens in 5 steps" in found.text
    assert found.tags == {"div", "span"}  # nothing of a completion becomes a tag
    assert found.titles[4] == "step 3 of its block, confidence 0.607"


def test_a_long_list_says_how_many_more_there_are() -> None:
    found = Texts(list_html([HAND_MADE] * 23)).text
    assert found.count("finish:") == 20 and found.endswith("... and 3 more")


def test_frames_replay_the_steps() -> None:
    assert [("".join(texts), "".join(".x"[done] for done in committed)) for texts, committed in frames(HAND_MADE)] == [
        ("a░", "x."),
        ("ab", "xx"),
        ("ab<c>d░░", "xxxx.."),
        ("ab<c>d░<|im_end|>", "xxxx.x"),
        ("ab<c>de<|im_end|>", "xxxxxx"),
    ]


def test_tables() -> None:
    pandas = pytest.importorskip("pandas")
    tokens = tokens_table(HAND_MADE)
    assert isinstance(tokens, pandas.DataFrame)
    assert list(tokens["block"]) == [0, 0, 1, 1, 1, 1] and list(tokens["step"]) == HAND_MADE.step_map
    assert list(tokens["is_after_end"]) == [False] * 5 + [True]
    assert tokens["confidence"].iloc[0] == pytest.approx(0.6065, abs=1e-3)
    table = completions_table([HAND_MADE, HAND_MADE])
    assert list(table["completion_length"]) == [5, 5] and list(table["tokens_per_step"]) == [1.0, 1.0]
    assert "token_texts" not in table


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        tokens_table(HAND_MADE)


def test_play_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    play([HAND_MADE])
    assert "ab<c>de<|im_end|>" in capsys.readouterr().out
