"""A source of data -> documents that are tokenised when they are asked for.

The start goes through all rows once: it checks their form, counts their documents (a conversation has one for each
assistant turn) and notes where each row begins. Nothing is tokenised or kept but a few numbers a row. What only
tokenising shows (a chat template that refuses a conversation, text behind the token that ends a turn) is found when
the document is drawn.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from dirl.data.conversations import Document, count_documents, document_of, is_text, question_of
from dirl.data.data_config import DataSource
from dirl.data.prompt_stream import fingerprint
from dirl.data.questions import question_key
from dirl.data.row_source import ListedRows, RowSource, open_rows
from dirl.data.rows import DataError, bad_row, convert_rows, row_columns
from dirl.data.tasks import find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class DocumentSource(Protocol):
    """Documents by number: all of them are known, none need be there before it is asked for."""

    name: str  # in messages
    fingerprint: str  # of what the documents are made of
    has_texts: bool  # some may be cut

    @property
    def question_keys(self) -> Sequence[int]:
        """Of each row, as `dirl.data.questions` makes them; a row has one document or more."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document | None:
        """A document; None: it turns out to be bad, and such are left out."""
        ...

    def row_of(self, index: int) -> int:
        """The row, from 0, that a document is made of."""
        ...

    def question(self, row: int) -> str:
        """What a row asks."""
        ...

    def questions(self) -> Iterator[tuple[int, str]]:
        """What people call each row, and what it asks; goes through all rows again."""
        ...


class ListedDocuments:
    """Documents that are there."""

    name = "the list of documents"

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self.fingerprint = fingerprint((d.prompt_ids, d.completion_ids) for d in documents)
        self.has_texts = not all(document.prompt_ids for document in documents)
        self.question_keys = [question_key(question) for _, question in self.questions()]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]

    def row_of(self, index: int) -> int:
        return index

    def question(self, row: int) -> str:
        """Token ids are words too."""
        document = self._documents[row]
        return " ".join(map(str, document.prompt_ids or document.completion_ids))

    def questions(self) -> Iterator[tuple[int, str]]:
        return ((row + 1, self.question(row)) for row in range(len(self)))


class RowDocuments:
    """Documents of the rows of a source.

    Raises:
        DataError: one line naming the source, the row, and what is wrong with it.
    """

    def __init__(
        self,
        rows: RowSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        source: DataSource,
        skip_bad_rows: bool,
        system_prompt: str,
    ) -> None:
        self.name, self._rows, self._tokenizer = source.path, rows, tokenizer
        self._columns, self._skip_bad_rows, self._system_prompt = source.columns, skip_bad_rows, system_prompt
        # One number a good row: where it stands, what people call it, and how many documents there are before it.
        self._places, self._numbers, self._firsts = array("q"), array("q"), array("q")
        self._length, self.has_texts, self.question_keys = 0, False, array("Q")
        digest = hashlib.sha256(repr((_identity(tokenizer), system_prompt, *self._columns.items())).encode())
        good = convert_rows(
            self.name,
            rows.scan(),
            lambda row: (count_documents(row), question_key(question_of(row)), is_text(row)),
            columns=self._columns,
            limit=source.limit,
            skip_bad_rows=skip_bad_rows,
        )
        for row, (num_documents, key, is_cut) in good:
            self.has_texts |= is_cut
            self.question_keys.append(key)
            self._places.append(row.place)
            self._numbers.append(row.number)
            self._firsts.append(self._length)
            self._length += num_documents
            digest.update(repr(row.content).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Document | None:
        """The document of this number, tokenised now.

        Raises:
            DataError: it cannot be learned from, and bad rows are not left out.
        """
        row = self.row_of(index)
        content = self._rows.read(self._places[row])
        try:
            if not isinstance(content, dict):
                raise DataError("is not what it was at the start: the file has changed")
            number, columns = index - self._firsts[row], row_columns(content, self._columns)
            return document_of(columns, number, self._tokenizer, system_prompt=self._system_prompt)
        except ValueError as error:
            if not self._skip_bad_rows:
                raise bad_row(self.name, self._numbers[row], error) from error
            logger.warning("%s row %d %s: left out", self.name, self._numbers[row], error)
            return None

    def row_of(self, index: int) -> int:
        return bisect_right(self._firsts, index) - 1

    def question(self, row: int) -> str:
        return question_of(row_columns(self._rows.read(self._places[row]), self._columns))

    def questions(self) -> Iterator[tuple[int, str]]:
        wanted = zip(self._places, self._numbers, strict=True)
        place, number = next(wanted)
        for row in self._rows.scan():
            if row.place == place:
                yield number, question_of(row_columns(row.content, self._columns))
                place, number = next(wanted, (-1, 0))
                if place < 0:
                    return


class JoinedDocuments:
    """The documents of several sources, one source after another; so are their rows."""

    def __init__(self, sources: Sequence[DocumentSource]) -> None:
        self.sources = sources
        self.name = " + ".join(source.name for source in sources)
        self.question_keys = [key for source in sources for key in source.question_keys]
        self.firsts = list(itertools.accumulate(map(len, sources), initial=0))  # numbers of each one's first document
        self._first_rows = list(itertools.accumulate((len(s.question_keys) for s in sources), initial=0))

    def __len__(self) -> int:
        return self.firsts[-1]

    def __getitem__(self, index: int) -> Document | None:
        source = bisect_right(self.firsts, index) - 1
        return self.sources[source][index - self.firsts[source]]

    def row_of(self, index: int) -> int:
        source = bisect_right(self.firsts, index) - 1
        return self._first_rows[source] + self.sources[source].row_of(index - self.firsts[source])

    def question(self, row: int) -> str:
        source = bisect_right(self._first_rows, row) - 1
        return self.sources[source].question(row - self._first_rows[source])

    def questions(self) -> Iterator[tuple[str, int, str]]:
        """The source's name, what people call the row, and what it asks."""
        for source in self.sources:
            for number, question in source.questions():
                yield source.name, number, question


def open_documents(
    source: DataSource,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    skip_bad_rows: bool = False,
    system_prompt: str = "",
) -> RowDocuments:
    """The documents of one source.

    Args:
        seed: draws the rows of a task.
    Raises:
        DataError: one line naming the file, the row, and what is wrong with it.
    """
    rows: RowSource
    if source.path.startswith("task:"):
        task = find_task(source.path)
        rows = ListedRows(task.demonstrations(source.limit or task.num_train, seed))
    else:
        rows = open_rows(source.path, split=source.split)
    return RowDocuments(rows, tokenizer, source=source, skip_bad_rows=skip_bad_rows, system_prompt=system_prompt)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes the same text the same tokens."""
    return fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
