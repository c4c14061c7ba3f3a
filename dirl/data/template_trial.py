"""A checkpoint's chat template -> whether it is bounded: in time, in memory and in what it makes of a conversation.

Templates are programs of strangers. transformers runs them in this process, in Jinja's sandbox, which bounds nothing:
one may loop for years, or ask for a text of a terabyte. So each is tried once, in a process that can be killed, before
it is rendered here; and what it renders here may not be out of proportion to the conversation.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from dirl.data.messages import Message, Tool

_PROGRAM = Path(__file__).with_name("template_child.py")
_SECONDS = 5  # of processor, for all probes; honest templates take a twentieth of one
_BYTES = 1 << 30
_SLACK, _GROWTH = 100_000, 20  # characters that any text may have, and those for each of a conversation's
_TOOL: Tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
_ADVICE = "it is broken or hostile: look at it, and give the tokenizer another one"


class Trial:
    """A template over a few conversations, in a process of its own that begins at once.

    Args:
        variables: that it may read besides, such as bos_token.
    """

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        self._request = {"template": template, "variables": variables, "seconds": _SECONDS, "bytes": _BYTES}
        self._begin()

    def _begin(self) -> None:
        self._owner = os.getpid()
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self._child = subprocess.Popen([sys.executable, "-c", _PROGRAM.read_text(encoding="utf-8")], **pipes)  # type: ignore[call-overload]
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({**self._request, "probes": _probes()}, default=str).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:  # it has ended already; how, it says itself
            pass

    @cached_property
    def fault(self) -> str:
        """What is wrong with the template; empty: nothing. Waits for the end of the trial."""
        if os.getpid() != self._owner:  # this process was forked meanwhile: the pipes are its parent's
            self._begin()
        said, errors = self._child.communicate()
        if (code := self._child.returncode) == -signal.SIGXCPU:
            return f"takes more than {_SECONDS} s of processor for a few short conversations; {_ADVICE}"
        if code == 0 and (word := said.decode().strip()) != "memory":
            return "" if word == "ok" else f"makes too long a text of a short conversation; {_ADVICE}"
        last = errors.decode(errors="replace").strip().rpartition("\n")[2][:200]
        if code == 0 or code < 0 or "MemoryError" in last:
            return f"takes more than {_BYTES >> 20} MiB of memory for a few short conversations; {_ADVICE}"
        return f"could not be tried: {last}"


@lru_cache(maxsize=64)
def trial_of(template: str, variables: str) -> Trial:
    """The trial of a template, begun the first time it is asked for; `variables` are JSON."""
    return Trial(template, json.loads(variables))


def longest_text(messages: Sequence[Message], tools: Sequence[Tool] | None) -> int:
    """Characters that a template may make of a conversation."""
    return _SLACK + _GROWTH * (sum(len(str(message)) for message in messages) + len(str(tools or "")))


def _probes() -> list[dict[str, Any]]:
    """What each probe hands to the template, and how long its text may be."""
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    long = [{**message, "content": "word " * 400} for message in [user, answer] * 8]
    system = {"role": "system", "content": "s"}
    asked: list[tuple[list[Message], list[Tool] | None]] = [
        ([user], None),
        ([system, user, answer, user], None),
        ([*long, user], None),
        ([system, user, call, {"role": "tool", "content": "c"}, answer, user], [_TOOL]),
    ]
    return [
        {
            "variables": {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": is_open},
            "most": longest_text(messages, tools),
        }
        for messages, tools in asked
        for is_open in (True, False)
    ]
