"""Streams of several sources -> one stream of which each has its share, continued exactly.

Whose turn it is is a matter of counting, not of chance: the source that is furthest behind its share gives the next
item. Every window of the stream then has the shares of the whole, and a place in it is a place in each source.

Source: Webster's method of apportionment; between two sources the error is never more than half an item.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

from dirl.data.document_source import DocumentSource
from dirl.data.document_stream import DocumentStream, Drawn, Fit
from dirl.data.prompt_stream import PromptStream
from dirl.errors import UserError


class _Stream(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


StreamT = TypeVar("StreamT", bound=_Stream)


class Mixture(Generic[StreamT]):
    """What is given comes from several streams.

    Args:
        weights: of each stream, above 0.
    """

    is_amid = False  # its whole state is a position

    def __init__(self, streams: Sequence[StreamT], weights: Sequence[float]) -> None:
        self._streams, self._weights = list(streams), list(weights)
        self.given = [0] * len(streams)  # items of each stream, since it has its weight

    def next_stream(self) -> tuple[int, StreamT]:
        """The stream that the next item comes from, and its number."""
        index = min(range(len(self.given)), key=lambda i: (self.given[i] + 0.5) / self._weights[i])
        self.given[index] += 1
        return index, self._streams[index]

    def state_dict(self) -> dict[str, Any]:
        streams = [stream.state_dict() for stream in self._streams]
        return {"streams": streams, "weights": self._weights, "given": list(self.given)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; other weights hold from there on.

        Raises:
            UserError: the state belongs to other sources, or another seed.
        """
        saved = state.get("streams", [state])  # one source's is its stream's own
        if len(saved) != len(self._streams):
            raise UserError(
                f"the checkpoint's data have {len(saved)} source(s), this run's {len(self._streams)}; resume with the "
                "same data, or set resume_from_checkpoint=none"
            )
        for stream, its_state in zip(self._streams, saved, strict=True):
            stream.load_state_dict(its_state)
        if state["weights"] == self._weights:
            self.given = list(state["given"])


class PromptMixture(Mixture[PromptStream]):
    """As a `PromptStream`, of several sources.

    Args:
        members: the indices of each source's items among all.
    """

    def __init__(self, streams: Sequence[PromptStream], weights: Sequence[float], members: Sequence[Sequence[int]]):
        super().__init__(streams, weights)
        self._members = members

    def take(self, count: int) -> list[int]:
        """The next `count` indices."""
        turns = [self.next_stream() for _ in range(count)]
        return [self._members[source][stream.take(1)[0]] for source, stream in turns]


class DocumentMixture(Mixture[DocumentStream]):
    """As a `DocumentStream`, of several sources; a document that does not fit gives way to the next of its source.

    Args:
        firsts: the number of each source's first document among all.
    """

    def __init__(self, streams: Sequence[DocumentStream], weights: Sequence[float], firsts: Sequence[int]) -> None:
        super().__init__(streams, weights)
        self._firsts = firsts

    def take(self, count: int, fit: Fit) -> Drawn:
        """The next `count` documents that fit.

        Raises:
            DataError: none of a source does.
        """
        drawn = Drawn()
        for _ in range(count):
            index, stream = self.next_stream()
            one = stream.take(1, fit)
            drawn.documents += one.documents
            drawn.indices += [self._firsts[index] + number for number in one.indices]
            drawn.num_too_long += one.num_too_long
            drawn.num_bad += one.num_bad
        return drawn


def prompt_stream(
    origins: Sequence[tuple[int, float]], seed: int, data_fingerprint: str
) -> PromptStream | PromptMixture:
    """The stream of items that come from one source, or from several.

    Args:
        origins: of each item, the number of its source and the weight of that; all 0: as many as each has items.
    """
    sources = sorted(set(origins))
    members = [[index for index, origin in enumerate(origins) if origin == source] for source in sources]
    weights = [weight for _, weight in sources]
    if len(sources) <= 1:
        return PromptStream(len(origins), seed, data_fingerprint)
    streams = [PromptStream(len(own), _seed_of(seed, i), data_fingerprint) for i, own in enumerate(members)]
    return PromptMixture(streams, _weights(weights, members), members)


def document_stream(
    sources: Sequence[DocumentSource], trained: Sequence[Sequence[int]], weights: Sequence[float], seed: int
) -> DocumentStream | DocumentMixture:
    """The stream of some documents of one source, or of several.

    Args:
        trained: which documents of each source, by their numbers in it.
        weights: of the sources; all 0: as many as each has documents.
    """
    if len(sources) == 1:
        return DocumentStream(sources[0], trained[0], seed)
    pairs = enumerate(zip(sources, trained, strict=True))
    streams = [DocumentStream(source, indices, _seed_of(seed, i)) for i, (source, indices) in pairs]
    firsts = list(itertools.accumulate(map(len, sources), initial=0))
    return DocumentMixture(streams, _weights(weights, trained), firsts)


def _weights(weights: Sequence[float], members: Sequence[Sequence[int]]) -> Sequence[float]:
    return weights if any(weights) else [len(own) for own in members]


def _seed_of(seed: int, source: int) -> int:
    """Sources of the same length are shuffled differently."""
    return random.Random(f"source {source} of seed {seed}").getrandbits(32)
