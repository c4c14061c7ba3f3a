"""Documents that fit, in a shuffled stream: what is too long gives way, texts are cut, and both resume exactly."""

from __future__ import annotations

import json
import logging
from typing import cast

import pytest

from dirl.data.conversations import Document
from dirl.data.document_source import DocumentSource, ListedDocuments
from dirl.data.document_stream import DocumentStream, Fit
from dirl.data.prompt_stream import PromptStream
from dirl.data.rows import DataError
from dirl.errors import UserError

FIT = Fit(max_length=10, multiple=4)


def long_and_short(num: int = 12) -> list[Document]:
    """Every third one does not fit."""
    return [Document([n], [100 + n] * (12 if n % 3 == 0 else 5)) for n in range(num)]


def texts_and_prompts() -> list[Document]:
    return [Document([], list(range(1000 * n, 1000 * n + 3 + 7 * n))) for n in range(1, 6)] + long_and_short()


def test_what_fits_comes_in_the_order_of_the_shuffle(caplog: pytest.LogCaptureFixture) -> None:
    documents = long_and_short()
    indices = [3, 1, 2, 5, 7, 0, 6, 11]
    order = [indices[i] for i in PromptStream(8, 4, ListedDocuments(documents).fingerprint).take(16)]
    stream = DocumentStream(ListedDocuments(documents), indices, seed=4)
    with caplog.at_level(logging.WARNING):
        drawn = stream.take(10, FIT)
    assert drawn.indices == [i for i in order if i % 3][:10]
    assert drawn.documents == [documents[i] for i in drawn.indices]
    passed = order[: [n for n, i in enumerate(order) if i % 3][9]]
    assert (drawn.num_too_long, drawn.num_bad) == (sum(i % 3 == 0 for i in passed), 0)
    assert caplog.text.count("left out a document of 13 tokens, longer than data.max_length=10") == 1


def test_a_text_is_cut_at_block_borders_and_nothing_is_lost() -> None:
    text = list(FIT.pieces(Document([], list(range(27)))))
    assert [len(piece) for piece in text] == [8, 8, 8, 3]
    assert [token for piece in text for token in piece.completion_ids] == list(range(27))
    assert [len(piece) for piece in FIT.pieces(Document([], list(range(18))))] == [8, 10]
    assert [len(piece) for piece in FIT.pieces(Document([5], [1] * 9))] == [10]
    assert list(FIT.pieces(Document([5], [1] * 10))) == []
    with pytest.raises(UserError, match=r"a block of 4 tokens is longer than data\.max_length=3; raise it"):
        list(Fit(3, 4).pieces(Document([], [1] * 4)))


def test_views_need_room_too(caplog: pytest.LogCaptureFixture) -> None:
    fit = Fit(10, 4, budget=13, packed_tokens=lambda prompt, completion: prompt + 2 * completion)
    assert [len(piece) for piece in fit.pieces(Document([], list(range(15))))] == [4, 4, 4, 3]
    documents = [Document([1], [2] * 6), Document([1], [2] * 7)]
    with caplog.at_level(logging.WARNING):
        drawn = DocumentStream(ListedDocuments(documents), [0, 1], seed=0).take(3, fit)
    assert drawn.indices == [0, 0, 0] and drawn.num_too_long > 0
    assert "left out a document of 8 tokens, with its views 15, over max_tokens_per_micro_batch=13" in caplog.text


def test_an_epoch_has_every_token_of_every_text() -> None:
    documents = texts_and_prompts()
    stream = DocumentStream(ListedDocuments(documents), range(len(documents)), seed=0)
    expected = sorted(t for d in documents if not d.prompt_ids for t in d.completion_ids)
    num_pieces = sum(len(list(FIT.pieces(d))) for d in documents)
    drawn = [stream.take(1, FIT).documents[0] for _ in range(num_pieces)]
    assert sorted(t for d in drawn if not d.prompt_ids for t in d.completion_ids) == expected


@pytest.mark.parametrize("stop", range(1, 30))
def test_a_stream_goes_on_from_any_place(stop: int) -> None:
    """Also in the middle of a text, with another limit from there on."""
    documents = texts_and_prompts()
    longer = Fit(max_length=16, multiple=8)
    whole = DocumentStream(ListedDocuments(documents), range(len(documents)), seed=1)
    whole.take(stop, FIT)
    state = json.loads(json.dumps(whole.state_dict()))
    rest = whole.take(25, longer)
    resumed = DocumentStream(ListedDocuments(documents), range(len(documents)), seed=1)
    resumed.load_state_dict(state)
    assert resumed.take(25, longer) == rest
    assert resumed.state_dict() == whole.state_dict()


class Watched:
    """A source that says what is drawn of it, with a bad document."""

    name, fingerprint = "watched", ""

    def __init__(self, documents: list[Document], bad: int = -1) -> None:
        self.documents, self.bad = documents, bad
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document | None:
        self.drawn.append(index)
        return None if index == self.bad else self.documents[index]


def test_nothing_is_drawn_twice_and_resuming_draws_nothing() -> None:
    source = Watched(texts_and_prompts(), bad=8)
    stream = DocumentStream(cast(DocumentSource, source), range(17), seed=1)
    drawn = stream.take(20, FIT)
    assert len(source.drawn) == len(set(source.drawn)) == len(set(drawn.indices)) + drawn.num_too_long + drawn.num_bad
    again = Watched(texts_and_prompts(), bad=8)
    resumed = DocumentStream(cast(DocumentSource, again), range(17), seed=1)
    resumed.load_state_dict(stream.state_dict())
    assert again.drawn == []
    assert 8 not in stream.take(60, FIT).indices


def test_nothing_short_enough_is_one_line() -> None:
    stream = DocumentStream(ListedDocuments(long_and_short()), range(0, 12, 3), seed=0)
    with pytest.raises(DataError, match=r"the list of documents: all 4 documents are longer than data\.max_length=10"):
        stream.take(1, FIT)
