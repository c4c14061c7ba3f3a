"""Completions for people: HTML, frames, tables; and what an observer of the engine sees."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

import dirl
from dirl.data.chat import token_texts
from dirl.model.tiny import tiny
from dirl.rollout.completions import Completions, frames, with_texts
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.rollout.plots import plot_trajectory, state_grid

SAMPLING = SamplingConfig(max_completion_length=24)


@pytest.fixture(scope="module")
def completions() -> Completions:
    model, tokenizer = tiny()
    return dirl.generate(model, tokenizer, ["1+1=", "2+22="], max_completion_length=24)


HAND_MADE = Completion(
    prompt_ids=[1] * 6,
    token_ids=list(range(6)),
    step_map=[1, 2, 1, 1, 3, 2],
    logprobs=[-0.5] * 6,
    completion_length=5,
    finish_reason="stop",
    num_denoising_steps=5,
    text="ab<c>e",
    block_length=4,
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
    found = Texts(HAND_MADE._repr_html_())
    assert found.text.startswith("ab<c>de<|im_end|>") and "5 tokens in 5 steps" in found.text
    assert found.tags == {"div", "span"}  # nothing of a completion becomes a tag
    assert found.titles[4] == "step 3 of its block, confidence 0.607"
    bare = Texts(replace(HAND_MADE, token_texts=None)._repr_html_())
    assert bare.text.startswith("ab<c>e")


def test_generated_completions_know_their_texts(completions: Completions) -> None:
    _, tokenizer = tiny()
    for completion in completions:
        assert completion.block_length == 4 and len(completion.token_texts or []) == len(completion.token_ids)
        plain = "".join(text for text in completion.token_texts or [] if "\ufffd" not in text)
        assert all(character in plain for character in completion.text if character != "\ufffd")
    assert Texts(completions._repr_html_()).text.count("finish:") == 2
    again = with_texts([replace(completions[0], token_texts=None)], tokenizer, 4)
    assert again[0] == completions[0]


def test_a_character_of_several_tokens_stands_at_the_last() -> None:
    _, tokenizer = tiny()
    ids = tokenizer.encode("aé→b😀")
    texts = token_texts(tokenizer, [ids])[0]
    assert texts == ["a", "", "é", "", "", "→", "b", "", "", "", "😀"]
    assert token_texts(tokenizer, [ids[:2]])[0] == ["a", "\ufffd"]


def test_frames_replay_the_steps() -> None:
    assert [("".join(texts), "".join(".x"[done] for done in committed)) for texts, committed in frames(HAND_MADE)] == [
        ("a░", "x."),
        ("ab", "xx"),
        ("ab<c>d░░", "xxxx.."),
        ("ab<c>d░<|im_end|>", "xxxx.x"),
        ("ab<c>de<|im_end|>", "xxxxxx"),
    ]


def test_the_picture_of_a_trajectory() -> None:
    assert state_grid(HAND_MADE) == [
        [2, 1, 0, 0, 0, 0],
        [3, 2, 0, 0, 0, 0],
        [3, 3, 2, 2, 1, 1],
        [3, 3, 3, 3, 1, 2],
        [3, 3, 3, 3, 2, 3],
    ]
    picture = plot_trajectory(HAND_MADE)._repr_png_()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5_000
    with pytest.raises(ValueError, match="needs the block length"):
        plot_trajectory(replace(HAND_MADE, block_length=0))


def test_tables(completions: Completions) -> None:
    pandas = pytest.importorskip("pandas")
    tokens = HAND_MADE.to_pandas()
    assert isinstance(tokens, pandas.DataFrame)
    assert list(tokens["block"]) == [0, 0, 1, 1, 1, 1] and list(tokens["step"]) == HAND_MADE.step_map
    assert list(tokens["is_after_end"]) == [False] * 5 + [True]
    assert tokens["confidence"].iloc[0] == pytest.approx(0.6065, abs=1e-3)
    table = completions.to_pandas()
    assert list(table["text"]) == [completion.text for completion in completions]
    assert table["tokens_per_step"].iloc[1] == completions[1].tokens_per_step


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        HAND_MADE.to_pandas()


def test_show_plays_in_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    HAND_MADE.show()
    assert "ab<c>de<|im_end|>" in capsys.readouterr().out
    with pytest.raises(ValueError, match="with_texts"):
        replace(HAND_MADE, token_texts=None).show()


def test_pictures_show_in_a_notebook(tmp_path: Any) -> None:
    from dirl.show.pictures import Pictures

    file = tmp_path / "a.png"
    plot_trajectory(HAND_MADE, file)
    source = Pictures([file])._repr_html_()
    assert base64.b64encode(file.read_bytes()).decode() in source


def test_the_face_offers_pictures() -> None:
    code = "import dirl, sys; dirl.plot_run, dirl.write_report; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]  # pictures of a run need no torch
    assert dirl.plot_trajectory is plot_trajectory and io is not None
