"""Rollouts for the steps to come, decoded and scored while the trainer trains: one thread, one round after another.

The weights it decodes with change between two rounds and never within one: whoever changes them, or decodes in its
place, waits for the round that is going on (`paused`). With one round ahead that costs nothing, since the next step
needs that very round; and which weights sampled what does not depend on who was faster.

Source: AReaL (arXiv 2505.24298) for groups of bounded age; one-step-off rollouts as in VeRL.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Condition

from dirl.rl.rollout_group import RolloutGroup
from dirl.rl.rollouts import Rollouts, TakenPrompt
from dirl.training.metrics import Timings


@dataclass(frozen=True)
class Round:
    """What some prompts of this rank became."""

    groups: list[RolloutGroup]
    counters: dict[str, int]  # of the graders
    seconds: dict[str, float]  # of decoding and scoring, as metrics


class RolloutsAhead:
    """Rounds in flight, the earliest first."""

    def __init__(self) -> None:
        self.weights_step = 0  # optimizer steps that the engine's weights have taken
        self._rounds: deque[tuple[Sequence[TakenPrompt], Future[Round]]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._turn = Condition()
        self._is_decoding = self._is_paused = False

    def __len__(self) -> int:
        return len(self._rounds)

    @property
    def taken(self) -> list[Sequence[TakenPrompt]]:
        """The prompts of each round in flight."""
        return [taken for taken, _ in self._rounds]

    def submit(self, rollouts: Rollouts, taken: Sequence[TakenPrompt]) -> None:
        """Have a round rolled out after those in flight."""
        self._rounds.append((taken, self._thread.submit(self._roll_out, rollouts, taken)))

    def next(self) -> Round:
        """The earliest round; waits for it, and raises what its thread did."""
        _, future = self._rounds.popleft()
        return future.result()

    def withdraw(self) -> list[Sequence[TakenPrompt]]:
        """Give the rounds in flight up; their prompts."""
        taken = self.taken
        for _, future in self._rounds:
            future.cancel()
        self._rounds.clear()
        with self.paused():  # one may still be going on
            return taken

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No round is decoded inside: the engine is the caller's."""
        with self._turn:
            self._is_paused = True
            self._turn.wait_for(lambda: not self._is_decoding)
        try:
            yield
        finally:
            with self._turn:
                self._is_paused = False
                self._turn.notify_all()

    def _roll_out(self, rollouts: Rollouts, taken: Sequence[TakenPrompt]) -> Round:
        own, timings = copy.copy(rollouts), Timings()
        own.timings = timings  # the trainer's are open in its own phase
        with self._turn:
            self._turn.wait_for(lambda: not self._is_paused)
            self._is_decoding = True
        try:
            groups, counters = own.roll_out(taken, self.weights_step)
            return Round(groups, counters, timings.drain())
        finally:
            with self._turn:
                self._is_decoding = False
                self._turn.notify_all()
