"""A body of OpenAI's /v1/completions or /v1/chat/completions -> what is to be decoded, or what is wrong with it.

The fields of `SamplingConfig` may stand beside OpenAI's own; null stands for absent. What would change an answer and is
not done here is refused, not ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl.config import bounded, with_changes
from dirl.data.chat import decode, encode, render_messages
from dirl.data.messages import read_messages
from dirl.errors import UserError
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.server.walls import Refused

_TOKENIZERS_IDS = 1 << 32  # a tokenizer cannot be asked for others, whatever its vocabulary
# OpenAI's names -> ours.
_RENAMED = {"max_tokens": "max_completion_length", "max_completion_tokens": "max_completion_length"}
# Fields that change nothing about an answer ...
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# ... and the one value of others that does not.
_NEUTRAL: dict[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "best_of": 1,
    "top_logprobs": 0,  # only those of the tokens that were drawn are recorded
    "suffix": "",
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
_MAX_STOPS, _MAX_PROMPTS, _MAX_CHOICES = 16, 2048, 4096


@dataclass(frozen=True, kw_only=True)
class _Fields(SamplingConfig):
    """Fields that both endpoints share and that have one type."""

    n: int = bounded(1, least=1, most=128)
    seed: int = bounded(-1, least=-(1 << 63), most=(1 << 63) - 129)  # room for n
    stream: bool = False
    stream_options: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _CompletionFields(_Fields):
    echo: bool = False
    # OpenAI's number of alternatives, of which none is recorded: 0 and 1 give the tokens drawn, -1 is not asked for
    logprobs: int = bounded(-1, least=-1, most=1)


@dataclass(frozen=True, kw_only=True)
class _ChatFields(_Fields):
    logprobs: bool = False


@dataclass(frozen=True)
class ApiRequest:
    """Prompts, and what to make of each."""

    prompts: list[list[int]]
    sampling: SamplingConfig
    max_tokens: int
    stops: list[str]
    seed: int | None  # None: drawn
    num_choices: int  # of each prompt
    has_logprobs: bool
    is_streamed: bool
    has_usage: bool  # in a last event of the stream
    echoed: list[str]  # what is put before the text of each prompt's choices; empty: nothing

    def echo_of(self, choice: int) -> str:
        """What is put before a choice's text."""
        return self.echoed[choice // self.num_choices] if self.echoed else ""


def read_completion(body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, default: SamplingConfig) -> ApiRequest:
    """
    Args:
        default: what holds where the body says nothing.
    Raises:
        Refused: naming the field.
    """
    read, stops = _read(body, _CompletionFields, default, "prompt")
    prompts = _prompts(body.get("prompt"))
    if read.echo and read.logprobs >= 0:
        raise Refused(
            "echo with logprobs is not supported: a diffusion model gives a text no probability token by token; "
            "leave out one of them",
            param="echo",
        )
    texts = [prompt if isinstance(prompt, str) else decode(tokenizer, prompt) for prompt in prompts]
    ids = [encode(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return _request(read, stops, ids, has_logprobs=read.logprobs >= 0, echoed=texts if read.echo else [])


def read_chat(body: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, default: SamplingConfig) -> ApiRequest:
    """As `read_completion`."""
    read, stops = _read(body, _ChatFields, default, "messages")
    try:
        said = read_messages("messages", body.get("messages"))
    except UserError as error:
        raise Refused(f"the body {error}", param="messages") from error
    try:
        ids = render_messages(tokenizer, said, add_generation_prompt=True)
    except UserError as error:
        raise Refused(str(error), param="messages") from error
    return _request(read, stops, [ids], has_logprobs=read.logprobs)


def _request(
    read: Any, stops: list[str], prompts: list[list[int]], *, has_logprobs: bool, echoed: Sequence[str] = ()
) -> ApiRequest:
    if len(prompts) * read.n > _MAX_CHOICES:
        raise Refused(f"n times the number of prompts must be at most {_MAX_CHOICES}", param="n")
    sampling = SamplingConfig(**{f.name: getattr(read, f.name) for f in fields(SamplingConfig)})
    return ApiRequest(
        prompts=prompts,
        sampling=sampling,
        max_tokens=sampling.max_completion_length,
        stops=stops,
        seed=read.seed if read.seed >= 0 else None,
        num_choices=read.n,
        has_logprobs=has_logprobs,
        is_streamed=read.stream,
        has_usage=bool(read.stream_options.get("include_usage")),
        echoed=list(echoed),
    )


def _read(
    body: Mapping[str, Any], schema: type[_Fields], default: SamplingConfig, content: str
) -> tuple[Any, list[str]]:
    """The fields of `schema`, checked, and the stop texts.

    Args:
        content: the field that is read elsewhere.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name, neutral in _NEUTRAL.items():
        if given.pop(name, neutral) != neutral:
            raise Refused(f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
    for name in ("model", content, "stop"):
        given.pop(name, None)
    renamed = {_RENAMED.get(name, name): value for name, value in given.items()}
    start = schema(**{f.name: getattr(default, f.name) for f in fields(SamplingConfig)})
    try:
        read = with_changes(start, renamed, "request")
    except (UserError, OverflowError) as error:
        reason = re.sub(r"^request: ", "", str(error))
        key = "".join(re.findall(r"^(?:unknown key ')?(\w+)", reason))
        param = next((name for name in given if _RENAMED.get(name, name) == key), None)
        raise Refused(reason.replace(key, param or key, 1), param=param) from error
    return read, _stops(body.get("stop"))


def _stops(said: Any) -> list[str]:
    stops = [said] if isinstance(said, str) else said or []
    if not isinstance(stops, list) or len(stops) > _MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise Refused(f"stop must be a text or a list of at most {_MAX_STOPS} texts", param="stop")
    return stops


def _prompts(said: Any) -> list[str | list[int]]:
    """A text, texts, the token ids of one prompt or of several -> prompts."""
    prompts = said if isinstance(said, list) and said and isinstance(said[0], str | list) else [said]
    if len(prompts) > _MAX_PROMPTS or not all(_is_prompt(prompt) for prompt in prompts):
        reason = f"prompt must be a text, a list of token ids, or a list of at most {_MAX_PROMPTS} of either"
        raise Refused(reason, param="prompt")
    return prompts


def _is_prompt(said: Any) -> bool:
    if isinstance(said, str):
        return True
    return isinstance(said, list) and said != [] and all(type(t) is int and 0 <= t < _TOKENIZERS_IDS for t in said)
