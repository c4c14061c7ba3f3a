"""Signals and clocks -> an orderly end: what asks a run to stop, and what ends one that hangs.

SIGTERM, SIGUSR1 and the first SIGINT are only noted; the loop asks between its acts, all ranks agree, and one
checkpoint is written. A second SIGINT ends the process at once. A rank that waits too long in one phase says where, and
ends; one whose launcher is gone is told SIGTERM.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_STUCK = 75  # sysexits.h, EX_TEMPFAIL: try again


class StopAsked(Exception):
    """A stage was asked to stop between two acts of a step; what it has is kept."""


class SignalWatch:
    """Notes that a signal came; a context in which the process does not die of it.

    Args:
        largest_of_ranks: a number of each rank -> the largest; collective.
    """

    def __init__(self, largest_of_ranks: Callable[[float], float] = float) -> None:
        self._largest_of_ranks = largest_of_ranks
        self.received = 0  # number of the first signal; 0: none
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        self.received = 0  # answered: a notebook may go on

    def is_stop_asked(self) -> bool:
        """Whether a signal came to any rank; collective, and so the same on every rank."""
        return self._largest_of_ranks(float(self.received > 0)) > 0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = self.received or number
        logger.warning("%s: stopping after a checkpoint", signal.Signals(number).name)


def end_with_launcher() -> None:
    """Send SIGTERM to this process once its parent is gone: a rank left alone would train on, or wait for the others.

    For ranks only: a single process may well outlive the shell that started it.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:  # as scripts/launch.sh has it for the launcher
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher watch", daemon=True).start()


class PhaseClock:
    """Ends the process when no phase of the loop began or ended for `limit` seconds (0: never).

    A collective that waits for a rank that died or hangs cannot be interrupted from Python; a thread beside it can end
    the process, after saying which rank stood where.
    """

    def __init__(self, limit: float, rank: int, standing: Callable[[], tuple[str, float]]) -> None:
        """`standing` says where the run stands, and for how many seconds it has stood there."""
        self.limit, self.rank, self.standing = limit, rank, standing
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="phase clock", daemon=True)

    def __enter__(self) -> PhaseClock:
        if self.limit:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.limit / 4)):
            where, seconds = self.standing()
            if seconds > self.limit:
                print(
                    f"dirl: error: rank {self.rank} has been {where} for {seconds:.0f} s (phase_timeout="
                    f"{self.limit:g}): another rank is stuck or gone, or the phase needs longer; raise phase_timeout "
                    "or look at the other ranks' logs. The newest checkpoint is complete; the same command continues",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                os._exit(EXIT_STUCK)
