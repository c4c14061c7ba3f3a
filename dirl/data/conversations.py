"""SFT rows -> tokenised documents: a prompt, and the completion that is imitated.

Three forms of row are read: {"messages"}, {"prompt", "response"} (DiRL) and {"prompt", "completion"}. A conversation of
several assistant turns becomes one document a turn, with everything before it as the prompt: that is the situation a
decoder is in, and a later turn must not be seen by the block an earlier one ends in.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirl.data.chat import decode, mask_token_id, render_messages, render_prompt, stop_token_ids, with_system_prompt
from dirl.data.rows import DataError, check_text, convert_rows, read_rows, shorten
from dirl.data.tasks import find_task
from dirl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

COMPLETION_KEYS = ("completion", "response")


@dataclass(frozen=True)
class Document:
    """What is read and what is learned to be written."""

    prompt_ids: list[int]
    completion_ids: list[int]  # ends with an EOS

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def load_documents(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    limit: int = 0,
    seed: int = 0,
    skip_bad_rows: bool = False,
    system_prompt: str = "",
) -> list[Document]:
    """Documents of at most `max_length` tokens; longer ones are left out and counted, never cut.

    Args:
        path: .json, .jsonl, .parquet or .csv file, hub id, or `task:NAME`.
        limit: rows read at most; 0: all.
        seed: draws the rows of a task.
    Raises:
        DataError: one line naming the file, the row, and what is wrong with it.
    """

    def convert(row: dict[str, object]) -> list[Document]:
        return documents_from_row(row, tokenizer, system_prompt=system_prompt)

    if path.startswith("task:"):
        task = find_task(path)
        demonstrations = task.demonstrations(limit or task.num_train, seed)
        rows = iter(enumerate([dict[str, object](row) for row in demonstrations], start=1))
    else:
        rows = read_rows(path, split="train")  # type: ignore[assignment]
    converted, _ = convert_rows(path, rows, convert, limit=limit, skip_bad_rows=skip_bad_rows)
    documents = [document for row_documents in converted for document in row_documents]
    kept = [document for document in documents if len(document) <= max_length]
    if len(kept) < len(documents):
        logger.warning("%s: left out %d documents over max_length=%d", path, len(documents) - len(kept), max_length)
    if not kept:
        raise DataError(f"{path}: all {len(documents)} documents are longer than max_length={max_length}; raise it")
    return kept


def documents_from_row(
    row: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, *, system_prompt: str
) -> list[Document]:
    """The documents of one row. Raises: ValueError saying what is wrong with it."""
    if "messages" in row:
        messages = with_system_prompt(_checked_messages(row["messages"]), system_prompt=system_prompt)
        return [
            _assistant_turn(messages[: index + 1], tokenizer)
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    key = next((key for key in COMPLETION_KEYS if key in row), None)
    if "prompt" not in row or key is None:
        raise UserError(
            f"has the columns {', '.join(map(str, row)) or '(none)'}; expected messages, or prompt and completion, "
            "or prompt and response"
        )
    prompt, completion = _text(row, "prompt"), _text(row, key)
    prompt_ids = render_prompt(tokenizer, prompt, system_prompt=system_prompt)
    return [Document(prompt_ids, _ended(tokenizer.encode(completion, add_special_tokens=False), tokenizer))]


def _checked_messages(messages: object) -> list[Mapping[str, object]]:
    if not isinstance(messages, list) or not messages:
        raise UserError(f"has messages={shorten(messages)}; expected a non-empty list")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise UserError(f"has the message {shorten(message)}; expected a role and a text content")
        check_text(message["content"])
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("has no assistant message to learn from")
    return messages


def _assistant_turn(messages: Sequence[Mapping[str, object]], tokenizer: PreTrainedTokenizerBase) -> Document:
    """The last message as completion, all before it as prompt."""
    prompt_ids = render_messages(tokenizer, messages[:-1], add_generation_prompt=True)
    whole_ids = render_messages(tokenizer, messages, add_generation_prompt=False)
    if whole_ids[: len(prompt_ids)] != prompt_ids:
        raise UserError(
            "renders differently as a prompt and as a whole: the chat template rewrites earlier turns; "
            "give the row as prompt and completion"
        )
    return Document(prompt_ids, _ended(whole_ids[len(prompt_ids) :], tokenizer))


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids up to and including the token that ends a turn, which is added where it is missing."""
    if mask_token_id(tokenizer) in ids:
        raise UserError("has the mask token in its completion, which a model never writes; remove it")
    stops = stop_token_ids(tokenizer)
    first_stop = next((i for i, token in enumerate(ids) if token in stops), None)
    if first_stop is not None:
        rest = decode(tokenizer, ids[first_stop + 1 :]).strip()  # the newline of a template, which no decoder gets to
        if rest:
            raise UserError(f"has text after the token that ends a turn: {shorten(rest)}")
        return ids[: first_stop + 1]
    return [*ids, turn_end_id(tokenizer)]


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token the chat template ends a turn with; SDAR's eos_token is another one."""
    turn = render_messages(
        tokenizer,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        add_generation_prompt=False,
    )
    stops = stop_token_ids(tokenizer)
    return next((token for token in reversed(turn) if token in stops), stops[0])


def _text(row: Mapping[str, object], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"has {key}={shorten(value)}; expected a non-empty string")
    return value
