"""What all clients ask of one engine: they stand in one line, and those who may be decoded together are.

A single thread works with the engine. It takes the first in the line and whoever stands right behind and is sampled
alike; while these are decoded, the next ones join them, until one comes who cannot: another sampling, or weights that
are to be written. Nobody overtakes, so nobody waits for ever. A completion depends on its prompt, its seed and its
sampling only: who shares its batch shows in nothing but the time it takes.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from dirl.rollout.engine import Completion, OpenEngine, Request, RolloutEngine, RolloutError, SamplingConfig
from dirl.rollout.watch import Frame, Observer

logger = logging.getLogger(__name__)


class Conflict(Exception):
    """The server is not in the state the request supposes, which a code of `wire` says."""

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(eq=False, kw_only=True)
class Ticket:
    """One prompt in the line. Who no longer wants its completion cancels the answer."""

    prompt_ids: list[int]
    seed: int
    end: int  # first position that may not be touched
    sampling: SamplingConfig
    threshold: float | None = None  # in the place of the sampling's
    kind: Hashable  # tickets of one kind may be decoded together
    weights: str | None = None  # that it must be decoded with; None: whatever is there
    # Told all tokens of the completion's finished blocks, after each, where the engine can be watched; says whether
    # they are enough. Called by the engine's thread.
    watch: Callable[[list[int]], bool] | None = None
    answer: Future[Completion] = field(default_factory=Future)
    has_enough: bool = False

    def is_enough(self) -> bool:
        return self.has_enough or self.answer.cancelled()


@dataclass(eq=False)
class Errand:
    """Something else to be done while the engine stands still."""

    act: Callable[[], Any]
    answer: Future[Any] = field(default_factory=Future)


class Line(Observer):
    """The line, and the one who works it off. The engine that `work` is given should have it as its observer."""

    def __init__(self) -> None:
        self._waiting: deque[Ticket | Errand] = deque()
        self._has_changed = threading.Condition()
        self._is_open = True
        # Of the decoding that runs; touched by the engine's thread alone.
        self._kind: Hashable = None
        self._queue: deque[Request] = deque()
        self._in_flight: dict[int, Ticket] = {}
        self._numbers = count()
        self._why_not: Callable[[str | None], Conflict | None] = lambda weights: None

    def join(self, comers: Sequence[Ticket | Errand]) -> None:
        """Put all of them at the end, next to each other."""
        with self._has_changed:
            if not self._is_open:
                raise RolloutError("the server is closing")
            self._waiting.extend(comers)
            self._has_changed.notify()

    def close(self) -> None:
        """Let nobody in, send those who wait away, and let `work` end."""
        with self._has_changed:
            self._is_open = False
            for comer in self._waiting:
                _settle(comer.answer, RolloutError("the server is closing"))
            self._waiting.clear()
            self._has_changed.notify()

    def work(self, engine: RolloutEngine, why_not: Callable[[str | None], Conflict | None]) -> None:
        """Serve until the line is closed: what the engine's thread does.

        Args:
            why_not: says why a ticket's weights cannot be decoded with now; None: they can.
        """
        self._why_not = why_not
        while (first := self._first()) is not None:
            if isinstance(first, Errand):
                self._run(first)
            else:
                self._decode(engine, first)

    def stepped(self, frames: Callable[[], list[Frame]]) -> None:
        """Tell what was decoded to those who watch, and let in who may join."""
        if any(ticket.watch for ticket in self._in_flight.values()):
            for frame in frames():
                ticket = self._in_flight.get(frame.index)
                if ticket and ticket.watch and all(frame.is_committed):
                    ticket.has_enough = ticket.watch(frame.token_ids)
        self._let_in()

    def _first(self) -> Ticket | Errand | None:
        """Who stands first, still in the line; None: it is closed."""
        with self._has_changed:
            self._has_changed.wait_for(lambda: self._waiting or not self._is_open)
            return self._waiting[0] if self._waiting else None

    def _run(self, errand: Errand) -> None:
        with self._has_changed:
            self._waiting.popleft()
        try:
            _settle(errand.answer, errand.act())
        except Exception as error:  # whatever it is, it is for who sent it
            _settle(errand.answer, error)

    def _decode(self, engine: RolloutEngine, first: Ticket) -> None:
        self._kind = first.kind
        self._let_in()
        error: Exception = RolloutError("the engine returned no completion")
        try:
            for index, completion in _decoded(engine, self._queue, first.sampling):
                _settle(self._in_flight.pop(index).answer, completion)
        except Exception as failure:  # whatever it is, it is for those who wait for this batch
            logger.exception("decoding failed")
            error = failure
        for ticket in self._in_flight.values():
            _settle(ticket.answer, error)
        self._in_flight.clear()
        self._queue.clear()

    def _let_in(self) -> None:
        """Move those at the head of the line who are of this decoding's kind into it."""
        with self._has_changed:
            while self._waiting and isinstance(ticket := self._waiting[0], Ticket) and ticket.kind == self._kind:
                self._waiting.popleft()
                if ticket.answer.cancelled():
                    continue
                if conflict := self._why_not(ticket.weights):
                    _settle(ticket.answer, conflict)
                    continue
                index = next(self._numbers)
                self._in_flight[index] = ticket
                self._queue.append(
                    Request(index, ticket.prompt_ids, ticket.seed, ticket.end, ticket.threshold, ticket.is_enough)
                )


def _decoded(
    engine: RolloutEngine, queue: deque[Request], sampling: SamplingConfig
) -> Iterator[tuple[int, Completion]]:
    if isinstance(engine, OpenEngine):
        yield from engine.decode(queue, sampling)
        return
    requests = list(queue)
    thresholds = [request.threshold for request in requests if request.threshold is not None]
    prompts, seeds = [request.prompt_ids for request in requests], [request.seed for request in requests]
    completions = engine.generate(prompts, sampling, seeds, thresholds or None)
    yield from zip((request.index for request in requests), completions, strict=True)


def _settle(answer: Future[Any], value: Any) -> None:
    with suppress(InvalidStateError):  # cancelled meanwhile
        answer.set_exception(value) if isinstance(value, Exception) else answer.set_result(value)
