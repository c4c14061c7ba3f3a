"""IFEval's checks through the library that ships them; without it, one line says what to install."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dirl.reward.instructions import _library, followed, instructions, read_checks
from tests.published_rows import IFEVAL


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm_eval's checks, with nltk's model of sentences as one that has seen no text."""
    nltk: Any = pytest.importorskip("nltk", reason="pip install 'dirl[ifeval]'")
    for name in ("lm_eval", "langdetect", "immutabledict"):
        pytest.importorskip(name, reason="pip install 'dirl[ifeval]'")
    folder = tmp_path / "tokenizers/punkt_tab/english"
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (folder / name).write_text("")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    _library.cache_clear()
    yield
    _library.cache_clear()


def row(*named: tuple[str, dict[str, Any]], question: str = "Q") -> dict[str, Any]:
    return {"question": question, "instruction_id_list": [n for n, _ in named], "kwargs": [k for _, k in named]}


def test_strict_and_loose(library: None) -> None:
    asked = {"question": IFEVAL["prompt"], **IFEVAL}
    assert followed(asked, "Rain is wet") == {"strict": [True, True], "loose": [True, True]}
    assert followed(asked, "Well, hello\nRain is really wet") == {"strict": [False, True], "loose": [True, True]}
    assert followed(asked, "Rain") == {"strict": [True, False], "loose": [True, False]}
    assert followed(asked, "") == {"strict": [False, False], "loose": [False, False]}
    quoted = row(("startend:quotation", {}))
    assert followed(quoted, '**"So it is"**') == {"strict": [False], "loose": [True]}


def test_every_kind_of_parameter(library: None) -> None:
    repeat = row(("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}))
    assert followed(repeat, "Say it. It.")["strict"] == [True]
    sentences = row(("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}))
    assert followed(sentences, "One is here. Two is there.")["strict"] == [True]
    assert followed(sentences, "One is here")["loose"] == [False]
    german = row(("language:response_language", {"language": "de"}))
    assert followed(german, "Der Regen ist nass und das Wetter bleibt schlecht.")["strict"] == [True]
    json_format = row(("detectable_format:json_format", {}))
    assert followed(json_format, '{"a": 1}')["strict"] == [True]
    assert followed(json_format, "[" * 100_000)["strict"] == [False]


def test_rewards(library: None) -> None:
    columns = {key: [IFEVAL[key], None] for key in ("instruction_id_list", "kwargs")} | {"question": ["Q", "Q"]}
    assert instructions(["", ""], ["Rain is wet", "7"], **columns) == [1.0, None]
    assert instructions([""], ["Rain, wet"], **{key: values[:1] for key, values in columns.items()}) == [0.0]
    assert instructions([""], ["7"], question=["Q"]) == [None]


def test_what_cannot_be_checked_is_said(library: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names 'no:such'; lm_eval knows keywords:existence, "):
        read_checks(row(("no:such", {})))
    with pytest.raises(ValueError, match=r"kwargs of punctuation:no_comma are \{'x': 1\}"):
        read_checks(row(("punctuation:no_comma", {"x": 1})))
    _library.cache_clear()
    monkeypatch.setattr(sys.modules["nltk"].data, "path", [str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match=r"need data of nltk: python -m nltk\.downloader punkt_tab"):
        read_checks(row(("punctuation:no_comma", {})))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    _library.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ValueError, match=r"IFEval's checks are not installed .*pip install 'dirl\[ifeval\]'"):
        read_checks(row(("punctuation:no_comma", {})))
