"""A data path -> documents that are tokenised when they are asked for.

The start goes through all rows once: it checks their form, counts their documents (a conversation has one for each
assistant turn) and notes where each row begins. Nothing is tokenised or kept but a few numbers a row. What only
tokenising shows (a chat template that refuses a conversation, text behind the token that ends a turn) is found when
the document is drawn.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from dirl.data.conversations import Document, count_documents, document_of
from dirl.data.prompt_stream import fingerprint
from dirl.data.row_source import ListedRows, RowSource, open_rows
from dirl.data.rows import DataError, bad_row, convert_rows
from dirl.data.tasks import find_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class DocumentSource(Protocol):
    """Documents by number: all of them are known, none need be there before it is asked for."""

    name: str  # in messages
    fingerprint: str  # of what the documents are made of

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document | None:
        """A document; None: it turns out to be bad, and such are left out."""
        ...


class ListedDocuments:
    """Documents that are there."""

    name = "the list of documents"

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = documents
        self.fingerprint = fingerprint((d.prompt_ids, d.completion_ids) for d in documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Document:
        return self._documents[index]


class RowDocuments:
    """Documents of the rows of a source.

    Raises:
        DataError: one line naming the source, the row, and what is wrong with it.
    """

    def __init__(
        self,
        name: str,
        rows: RowSource,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int,
        skip_bad_rows: bool,
        system_prompt: str,
    ) -> None:
        self.name, self._rows, self._tokenizer = name, rows, tokenizer
        self._skip_bad_rows, self._system_prompt = skip_bad_rows, system_prompt
        # One number a good row: where it stands, what people call it, and how many documents there are before it.
        self._places, self._numbers, self._firsts = array("q"), array("q"), array("q")
        self._length = 0
        digest = hashlib.sha256(repr((_identity(tokenizer), system_prompt)).encode())
        good = convert_rows(name, rows.scan(), count_documents, limit=limit, skip_bad_rows=skip_bad_rows)
        for row, num_documents in good:
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
        row = bisect_right(self._firsts, index) - 1
        content = self._rows.read(self._places[row])
        try:
            if not isinstance(content, dict):
                raise DataError("is not what it was at the start: the file has changed")
            number = index - self._firsts[row]
            return document_of(content, number, self._tokenizer, system_prompt=self._system_prompt)
        except ValueError as error:
            if not self._skip_bad_rows:
                raise bad_row(self.name, self._numbers[row], error) from error
            logger.warning("%s row %d %s: left out", self.name, self._numbers[row], error)
            return None


def open_documents(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int = 0,
    seed: int = 0,
    skip_bad_rows: bool = False,
    system_prompt: str = "",
) -> RowDocuments:
    """The documents that a data path names.

    Args:
        path: .json, .jsonl, .parquet or .csv file, hub id, or `task:NAME`.
        limit: rows read at most; 0: all.
        seed: draws the rows of a task.
    Raises:
        DataError: one line naming the file, the row, and what is wrong with it.
    """
    rows: RowSource
    if path.startswith("task:"):
        task = find_task(path)
        rows = ListedRows(task.demonstrations(limit or task.num_train, seed))
    else:
        rows = open_rows(path, split="train")
    return RowDocuments(path, rows, tokenizer, limit=limit, skip_bad_rows=skip_bad_rows, system_prompt=system_prompt)


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes the same text the same tokens."""
    return fingerprint([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
