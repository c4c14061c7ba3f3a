"""SFT rows -> tokenised documents: a prompt, and the completion that is imitated.

Four forms of row are read: {"messages"}, {"prompt", "response"} (DiRL), {"prompt", "completion"} and {"text"}; a prompt
or completion may be a list of messages. A conversation of several assistant turns becomes one document a turn, with
everything before it as the prompt: that is the situation a decoder is in, and a later turn must not be seen by the
block an earlier one ends in. A text is a document without a prompt: all of it is learned. `tools` of a row are handed
to the chat template.

`count_documents` looks at the form of a row and at nothing that needs a tokenizer; `document_of` tokenises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirl.data.chat import (
    MASK_TOKEN,
    decode,
    mask_token_id,
    render_messages,
    render_prompt,
    stop_token_ids,
    with_system_prompt,
)
from dirl.data.messages import Message, Tool, read_messages, read_tools
from dirl.data.rows import column_names, shorten
from dirl.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COMPLETION_KEYS = ("completion", "response")
_HAS_MASK = "has the mask token in its completion, which a model never writes; remove it"


@dataclass(frozen=True)
class Document:
    """What is read and what is learned to be written."""

    prompt_ids: list[int]  # empty: a text, which may be cut
    completion_ids: list[int]  # ends with an EOS

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def count_documents(row: Mapping[str, object]) -> int:
    """How many documents a row becomes: its assistant turns. Raises: ValueError saying what is wrong with its form."""
    read_tools(row.get("tools"))
    if (conversation := _conversation(row)) is not None:
        return len(_learned_turns(*conversation))
    for key in _text_keys(row):
        _prompt(row, key)
    _check_learned(str(row[_text_keys(row)[-1]]))
    return 1


def is_text(row: Mapping[str, object]) -> bool:
    """Whether a row that `count_documents` has found good is a text, which may be cut."""
    return row.get("messages") is None and len(_text_keys(row)) == 1


def question_of(row: Mapping[str, object]) -> str:
    """What such a row asks: all that its user says, or its prompt; a text is one question."""
    messages = row.get("messages")
    if isinstance(messages, list):
        return "\n".join(str(m["content"]) for m in messages if m["role"] not in ("system", "assistant"))
    return str(row[_text_keys(row)[0]])


def document_of(
    row: Mapping[str, object], number: int, tokenizer: PreTrainedTokenizerBase, *, system_prompt: str
) -> Document:
    """The document of this number (from 0) of a row that `count_documents` has found good.

    Raises:
        ValueError: the chat template or the tokenizer makes something of the row that cannot be learned from.
    """
    tools = read_tools(row.get("tools"))
    if (conversation := _conversation(row)) is not None:
        upto = _learned_turns(*conversation)[number] + 1
        messages = with_system_prompt(conversation[0][:upto], system_prompt=system_prompt)
        return _assistant_turn(messages, tools, tokenizer)
    *others, learned = _text_keys(row)
    ids = tokenizer.encode(str(row[learned]), add_special_tokens=False)
    if not others:
        return Document([], _ended_text(ids, tokenizer))
    prompt_ids = render_prompt(tokenizer, _prompt(row, others[0]), system_prompt=system_prompt, tools=tools)
    return Document(prompt_ids, _ended(ids, tokenizer))


def _conversation(row: Mapping[str, object]) -> tuple[list[Message], int] | None:
    """All messages of a row, and how many of them are its prompt alone; None: what is learned is no message."""
    if row.get("messages") is not None:
        return read_messages("messages", row["messages"]), 0
    keys = _text_keys(row)
    if not isinstance(row[keys[-1]], list) or len(keys) == 1:
        return None
    prompt = _prompt(row, keys[0])
    given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*given, *read_messages(keys[1], row[keys[1]])], len(given)


def _learned_turns(messages: Sequence[Message], num_given: int) -> list[int]:
    """Which messages are learned."""
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= num_given]
    for index in turns:
        _check_learned(messages[index]["content"])
    if not turns:
        raise UserError("has no assistant message to learn from")
    return turns


def _prompt(row: Mapping[str, object], key: str) -> str | list[Message]:
    """A column that is no completion of messages: a text, or the conversation that is a prompt."""
    value = row[key]
    if key == "prompt" and isinstance(value, list):
        return read_messages(key, value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"has {key}={shorten(value)}; expected a non-empty string")
    return value


def _text_keys(row: Mapping[str, object]) -> tuple[str, ...]:
    """The columns of a row that is no conversation; the last one is learned."""
    key = next((key for key in COMPLETION_KEYS if row.get(key) is not None), None)  # a null hides no column beside it
    if key is not None and row.get("prompt") is not None:
        return ("prompt", key)
    if row.get("text") is not None:
        return ("text",)
    raise UserError(
        f"has the columns {column_names(row)}; expected messages, or prompt and completion, "
        "or prompt and response, or text"
    )


def _check_learned(text: str) -> None:
    if MASK_TOKEN in text:
        raise UserError(_HAS_MASK)


def _check_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    if mask_token_id(tokenizer) in ids:
        raise UserError(_HAS_MASK)


def _assistant_turn(
    messages: Sequence[Message], tools: Sequence[Tool] | None, tokenizer: PreTrainedTokenizerBase
) -> Document:
    """The last message as completion, all before it as prompt."""
    prompt_ids = render_messages(tokenizer, messages[:-1], tools=tools, add_generation_prompt=True)
    whole_ids = render_messages(tokenizer, messages, tools=tools, add_generation_prompt=False)
    if whole_ids[: len(prompt_ids)] != prompt_ids:
        raise UserError(
            "renders differently as a prompt and as a whole: the chat template rewrites earlier turns; "
            "give the row as prompt and completion"
        )
    return Document(prompt_ids, _ended(whole_ids[len(prompt_ids) :], tokenizer))


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids up to and including the token that ends a turn, which is added where it is missing."""
    _check_ids(ids, tokenizer)
    stops = stop_token_ids(tokenizer)
    first_stop = next((i for i, token in enumerate(ids) if token in stops), None)
    if first_stop is not None:
        rest = decode(tokenizer, ids[first_stop + 1 :]).strip()  # the newline of a template, which no decoder gets to
        if rest:
            raise UserError(f"has text after the token that ends a turn: {shorten(rest)}")
        return ids[: first_stop + 1]
    return [*ids, turn_end_id(tokenizer)]


def _ended_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A text and the token that ends one; it may hold others, of conversations that somebody has rendered."""
    _check_ids(ids, tokenizer)
    stops = stop_token_ids(tokenizer)
    return ids if ids and ids[-1] in stops else [*ids, stops[0]]


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token the chat template ends a turn with; SDAR's eos_token is another one."""
    turn = render_messages(
        tokenizer,
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        add_generation_prompt=False,
    )
    stops = stop_token_ids(tokenizer)
    return next((token for token in reversed(turn) if token in stops), stops[0])
