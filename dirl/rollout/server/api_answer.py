"""Completions -> what OpenAI's endpoints answer: choices, usage, and the events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from dirl.data.chat import decode, stop_token_ids, token_texts
from dirl.rollout.engine import Completion
from dirl.rollout.server.api_request import ApiRequest

FinishReason = Literal["stop", "length"]
_UNFINISHED = "\ufffd"  # what the first bytes of a character read

END_OF_STREAM = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Choice:
    """One completion as its client sees it."""

    text: str
    finish_reason: FinishReason
    num_tokens: int
    token_texts: list[str]
    logprobs: list[float]  # nats, as many; of the tokens that were drawn


class Cutter:
    """Where a completion ends for its client: at a stop token or text, or at its number of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, asked: ApiRequest) -> None:
        self._tokenizer, self._asked, self._stop_ids = tokenizer, asked, set(stop_token_ids(tokenizer))

    def so_far(self, token_ids: Sequence[int]) -> tuple[str, FinishReason | None]:
        """What may be shown of a completion's first tokens whatever follows, and why it ends with them, if it does."""
        text, reason, _ = self._cut(token_ids)
        if reason:
            return text, reason
        text = text.rstrip(_UNFINISHED)
        held = max((_overlap(text, stop) for stop in self._asked.stops), default=0)
        return text[: len(text) - held], None

    def choice(self, completion: Completion) -> Choice:
        text, reason, by_text = self._cut(completion.token_ids)
        ids = completion.token_ids[: min(completion.completion_length, self._asked.max_tokens)]
        if by_text:  # as many tokens as hold the text
            ids = ids[: bisect_left(range(len(ids)), len(text), key=lambda num: len(self._decode(ids[:num])))]
        texts = token_texts(self._tokenizer, [ids])[0] if self._asked.has_logprobs else []
        return Choice(text, reason or "length", len(ids), texts, (completion.logprobs or [])[: len(texts)])

    def _cut(self, token_ids: Sequence[int]) -> tuple[str, FinishReason | None, bool]:
        """The text, why it ends, and whether a stop text is why."""
        ids = token_ids[: self._asked.max_tokens]
        end = next((i for i, token in enumerate(ids) if token in self._stop_ids), None)
        text = self._decode(ids[:end])
        found = [at for stop in self._asked.stops if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], "stop", True
        if end is not None:
            return text, "stop", False
        return text, "length" if len(ids) == self._asked.max_tokens else None, False

    def _decode(self, ids: Sequence[int]) -> str:
        return decode(self._tokenizer, ids)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Answer:
    """One answer, whole or in events."""

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], asked: ApiRequest) -> dict[str, Any]:
        rows = [self._whole(index, choice, asked) for index, choice in enumerate(choices)]
        return {**self._head(is_whole=True), "choices": rows, "usage": usage(choices, asked)}

    def first_events(self, asked: ApiRequest) -> list[bytes]:
        """What stands before each choice's own text."""
        indices = range(len(asked.prompts) * asked.num_choices)
        if self.is_chat:
            return [self._event(index, {"delta": {"role": "assistant", "content": ""}}) for index in indices]
        return [self.text_event(index, echoed) for index in indices if (echoed := asked.echo_of(index))]

    def text_event(self, index: int, text: str) -> bytes:
        return self._event(index, {"delta": {"content": text}} if self.is_chat else {"text": text})

    def last_event(self, index: int, choice: Choice, asked: ApiRequest) -> bytes:
        """The end of a choice, with the logprobs of all its tokens."""
        nothing: dict[str, Any] = {"delta": {}} if self.is_chat else {"text": ""}
        logprobs = self._logprobs(choice, asked)
        return self._event(index, {**nothing, "finish_reason": choice.finish_reason, "logprobs": logprobs})

    def usage_event(self, choices: Sequence[Choice], asked: ApiRequest) -> bytes:
        return event({**self._head(is_whole=False), "choices": [], "usage": usage(choices, asked)})

    def _event(self, index: int, said: dict[str, Any]) -> bytes:
        row = {"index": index, "finish_reason": None, "logprobs": None, **said}
        return event({**self._head(is_whole=False), "choices": [row]})

    def _head(self, *, is_whole: bool) -> dict[str, Any]:
        kind, prefix = "text_completion", "cmpl"
        if self.is_chat:
            kind, prefix = "chat.completion" if is_whole else "chat.completion.chunk", "chatcmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _whole(self, index: int, choice: Choice, asked: ApiRequest) -> dict[str, Any]:
        row = {"index": index, "finish_reason": choice.finish_reason, "logprobs": self._logprobs(choice, asked)}
        if self.is_chat:
            return {**row, "message": {"role": "assistant", "content": choice.text, "refusal": None}}
        return {**row, "text": asked.echo_of(index) + choice.text}

    def _logprobs(self, choice: Choice, asked: ApiRequest) -> dict[str, Any] | None:
        if not asked.has_logprobs:
            return None
        texts, logprobs = choice.token_texts, choice.logprobs
        if self.is_chat:
            rows = [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in zip(texts, logprobs, strict=True)
            ]
            return {"content": rows, "refusal": None}
        offsets = [0, *accumulate(map(len, texts))][:-1]
        return {"tokens": texts, "token_logprobs": logprobs, "text_offset": offsets, "top_logprobs": None}


def usage(choices: Sequence[Choice], asked: ApiRequest) -> dict[str, int]:
    read, written = sum(map(len, asked.prompts)), sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"
