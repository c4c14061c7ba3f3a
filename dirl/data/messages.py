"""Conversations and tools as rows hold them -> messages and tools as chat templates read them.

A message has a role and a content: a text, or a list of text parts, which is the text they make together. A null is
what a table writes for a key that a row does not have, and is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dirl.data.rows import check_text, shorten
from dirl.errors import UserError

Message = dict[str, Any]
Tool = dict[str, Any]  # the JSON schema of a function


def text_of_content(content: object) -> str:
    """The content of a message as one text.

    Raises:
        UserError: it is no text and no list of text parts.
    """
    if isinstance(content, list):
        content = "".join(map(_text_of_part, content))
    if not isinstance(content, str):
        raise UserError(f"has the content {shorten(content)}; expected a text, or a list of text parts")
    check_text(content)
    return content


def _text_of_part(part: object) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise UserError(f'has the content part {shorten(part)}; expected {{"type": "text", "text": "..."}}')
    return str(part["text"])


def read_messages(key: str, value: object) -> list[Message]:
    """The messages of a column, each with its content as one text.

    Raises:
        UserError: naming the column or the message.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"has {key}={shorten(value)}; expected a non-empty list")
    return [_read_message(message) for message in value]


def read_prompt(key: str, value: object) -> list[Message]:
    """As `read_messages`, of a conversation that waits for an answer: the last message is the user's."""
    messages = read_messages(key, value)
    last = messages[-1]
    if last["role"] != "user" or not last["content"].strip():
        raise UserError(f"has a {key} that ends with {shorten(last)}; expected a question, of role user")
    return messages


def read_tools(value: object) -> list[Tool] | None:
    """The tools of a row: JSON schemas, or JSON text of a list of them; None: there are none.

    Raises:
        UserError: it is something else.
    """
    tools = value or None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) or None
        except ValueError:
            tools = value
    else:
        tools = _without_nulls(tools)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"has tools={shorten(value)}; expected a list of JSON schemas; rename a column of another kind")
    return tools


def _read_message(message: object) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise UserError(f"has the message {shorten(message)}; expected a role and a text content")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""  # a call of tools says nothing else
    return {**_without_nulls(dict(message)), "content": text_of_content(content)}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
