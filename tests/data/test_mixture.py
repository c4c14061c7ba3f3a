"""Several sources -> one stream: realised shares, an epoch, and exact resume at any place."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest

from dirl.data.conversations import Document
from dirl.data.document_source import JoinedDocuments, ListedDocuments
from dirl.data.document_stream import DocumentStream, Fit
from dirl.data.mixture import DocumentMixture, PromptMixture, document_stream, prompt_stream
from dirl.data.prompt_stream import PromptStream
from dirl.errors import UserError

FIT = Fit(max_length=10, multiple=4)


def origins(*sizes_and_weights: tuple[int, float]) -> list[tuple[int, float]]:
    return [(source, weight) for source, (size, weight) in enumerate(sizes_and_weights) for _ in range(size)]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (5, 3, 2, 1), (1, 1, 98)])
def test_each_source_has_its_share_of_every_window(weights: tuple[float, ...]) -> None:
    told = origins(*((7, weight) for weight in weights))
    drawn = [told[index][0] for index in prompt_stream(told, 0, "").take(1000)]
    for start, end in pairwise(range(0, 1001, 50)):
        counts = Counter(drawn[start:end])
        for source, weight in enumerate(weights):
            assert abs(counts[source] - 50 * weight / sum(weights)) <= 2, (start, source)
    for source, weight in enumerate(weights):
        assert abs(drawn.count(source) - 1000 * weight / sum(weights)) <= 1


@pytest.mark.parametrize("batch", [1, 4, 31])
def test_without_weights_an_epoch_has_every_item_once(batch: int) -> None:
    told = origins((13, 0), (5, 0), (2, 0), (60, 0))
    stream = prompt_stream(told, 3, "")
    drawn = [index for _ in range(-(-160 // batch)) for index in stream.take(batch)]
    assert sorted(drawn[:80]) == sorted(drawn[80:160]) == list(range(80))
    assert drawn[:80] != drawn[80:160]


def test_one_source_is_the_plain_stream() -> None:
    assert type(prompt_stream(origins((9, 3.0)), 5, "x")) is PromptStream
    assert prompt_stream(origins((9, 0)), 5, "x").take(30) == PromptStream(9, 5, "x").take(30)
    source = ListedDocuments([Document([1], [2])])
    assert type(document_stream([source], [[0]], [2.0], 5)) is DocumentStream


def test_sources_of_one_length_are_shuffled_differently() -> None:
    drawn = prompt_stream(origins((50, 0), (50, 0)), 0, "").take(100)
    first, second = ([i for i in drawn if i // 50 == source] for source in (0, 1))
    assert first != [i - 50 for i in second]


def documents() -> list[ListedDocuments]:
    """Prompts, some of which are too long, and texts that are cut."""
    prompts = [Document([n], [100 + n] * (12 if n % 3 == 0 else 5)) for n in range(12)]
    texts = [Document([], list(range(1000 * n, 1000 * n + 3 + 7 * n))) for n in range(1, 6)]
    return [ListedDocuments(prompts), ListedDocuments(texts)]


def mixture(weights: tuple[float, ...] = (3.0, 1.0)) -> DocumentMixture:
    stream = document_stream(documents(), [range(12), range(5)], weights, 1)
    assert isinstance(stream, DocumentMixture)
    return stream


def test_what_does_not_fit_costs_its_source_no_share() -> None:
    drawn = mixture().take(200, FIT)
    assert [index < 12 for index in drawn.indices].count(True) == 150
    assert drawn.num_too_long > 0
    joined = JoinedDocuments(documents())
    for index, piece in zip(drawn.indices, drawn.documents, strict=True):
        whole = joined[index]
        assert whole is not None and set(piece.completion_ids) <= set(whole.completion_ids)


@pytest.mark.parametrize("stop", range(1, 40))
def test_a_mixture_goes_on_from_any_place(stop: int) -> None:
    """Also in the middle of an epoch and of a text."""
    whole = mixture()
    whole.take(stop, FIT)
    state = json.loads(json.dumps(whole.state_dict()))
    rest = whole.take(25, FIT)
    resumed = mixture()
    resumed.load_state_dict(state)
    assert resumed.take(25, FIT) == rest
    assert resumed.state_dict() == whole.state_dict()


def test_other_weights_hold_from_there_on_and_other_sources_are_refused() -> None:
    before = mixture()
    before.take(100, FIT)
    after = mixture((1.0, 1.0))
    after.load_state_dict(before.state_dict())
    assert [index < 12 for index in after.take(20, FIT).indices].count(True) == 10
    three = prompt_stream(origins((3, 0), (3, 0), (3, 0)), 0, "")
    two = prompt_stream(origins((3, 0), (3, 0)), 0, "")
    assert isinstance(two, PromptMixture)
    for state, count in ((three.state_dict(), 3), (PromptStream(6, 0).state_dict(), 1)):
        with pytest.raises(UserError, match=rf"data have {count} source\(s\), this run's 2; resume with the same"):
            two.load_state_dict(state)
