"""Documents of any length -> an endless stream of documents that fit, which can be saved and continued exactly.

A document with a prompt that is longer than the limit is left out, and the next one of the stream takes its place. A
text (a document without a prompt) is cut instead: its pieces follow one another in the stream. Both happen when the
document is drawn, so that nothing is tokenised that is not trained on; every rank draws the same.
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dirl.data.conversations import Document
from dirl.data.document_source import DocumentSource
from dirl.data.prompt_stream import PromptStream
from dirl.data.rows import DataError
from dirl.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """Which documents fit.

    Attributes:
        max_length: tokens of the longest.
        multiple: texts are cut at multiples of so many tokens: what comes before the cut ends at a block border, and
            needs no fill.
        budget: packed tokens that there is room for; 0: any number.
        packed_tokens: tokens of a prompt and of its completion -> those they take with all views.
    """

    max_length: int
    multiple: int
    budget: int = 0
    packed_tokens: Callable[[int, int], int] = operator.add

    def excess(self, prompt_length: int, completion_length: int) -> str:
        """What such a document is too long for, in words; empty: it fits."""
        if prompt_length + completion_length > self.max_length:
            return f"longer than data.max_length={self.max_length}"
        packed = self.packed_tokens(prompt_length, completion_length)
        return (
            f"with its views {packed}, over max_tokens_per_micro_batch={self.budget}"
            if 0 < self.budget < packed
            else ""
        )

    @functools.cached_property
    def window(self) -> int:
        """Tokens of a text up to where it is cut; 0: not even a block fits."""
        longest = self.max_length - self.max_length % self.multiple
        return next((length for length in range(longest, 0, -self.multiple) if not self.excess(0, length)), 0)

    def first_piece(self, document: Document, start: int = 0) -> tuple[Document | None, int]:
        """What there is of a document from a token on, and where the rest begins, 0 where there is none.

        None: the document is too long, and has a prompt, without which its completion means nothing.
        """
        if document.prompt_ids:
            return (None if self.excess(len(document.prompt_ids), len(document.completion_ids)) else document), 0
        rest = document.completion_ids[start:]
        if not self.excess(0, len(rest)):
            return Document([], rest), 0
        if self.window == 0:
            raise UserError(f"a block of {self.multiple} tokens is {self.excess(0, self.multiple)}; raise it")
        return Document([], rest[: self.window]), start + self.window

    def pieces(self, document: Document) -> Iterator[Document]:
        """All that there is of a document; nothing where it is too long."""
        piece, start = self.first_piece(document)
        while piece is not None:
            yield piece
            if not start:
                return
            piece, start = self.first_piece(document, start)


@dataclass
class Drawn:
    """Documents of the stream, in order, and what was passed over on the way."""

    documents: list[Document] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  # of each in its source
    num_too_long: int = 0
    num_bad: int = 0


class DocumentStream:
    """A shuffled stream of some documents of a source; its state is three numbers.

    Args:
        indices: which documents of the source.
    """

    is_amid = False  # its whole state is a position

    def __init__(self, source: DocumentSource, indices: Sequence[int], seed: int) -> None:
        self._source, self._indices = source, indices
        self._stream = PromptStream(len(indices), seed, source.fingerprint)
        self._start = 0  # tokens of the last drawn text that were given; 0: it is done
        self._text: Document | None = None  # the rest of which is still to be given, unless the run was resumed there
        self._has_warned = False

    def take(self, count: int, fit: Fit) -> Drawn:
        """The next `count` documents that fit.

        Raises:
            DataError: none of them does.
        """
        drawn, num_fruitless = Drawn(), 0
        while len(drawn.documents) < count:
            index, document = self._next()
            piece, self._start = fit.first_piece(document, self._start) if document is not None else (None, 0)
            self._text = document if self._start else None
            if piece is not None:
                drawn.documents.append(piece)
                drawn.indices.append(index)
                num_fruitless = 0
                continue
            num_fruitless += 1
            drawn.num_bad += document is None
            drawn.num_too_long += document is not None
            if num_fruitless == 2 * self._stream.num_items:  # one pass after another, each in an order of its own
                raise none_fits(self._source.name, self._stream.num_items, fit)
            self._warn_once(document, fit)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {**self._stream.state_dict(), "start": self._start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: the state belongs to other data or another seed.
        """
        self._stream.load_state_dict(state)
        self._start, self._text = state["start"], None

    def _next(self) -> tuple[int, Document | None]:
        """The text of which there is more, else the next document."""
        if self._start:
            index = self._indices[self._stream.last]
            return index, self._text or self._source[index]
        index = self._indices[self._stream.take(1)[0]]
        return index, self._source[index]

    def _warn_once(self, document: Document | None, fit: Fit) -> None:
        if document is not None and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s: left out a document of %d tokens, %s; the metric documents/too_long counts such",
                *(self._source.name, len(document), fit.excess(len(document.prompt_ids), len(document.completion_ids))),
            )


def none_fits(name: str, count: int, fit: Fit) -> DataError:
    """No document of so many can be used."""
    return DataError(
        f"{name}: all {count} documents are longer than data.max_length={fit.max_length}, or their views than "
        f"max_tokens_per_micro_batch={fit.budget} (or bad rows); raise it"
    )
