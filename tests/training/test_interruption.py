"""Signals and clocks: a run that makes progress lives, one that stands still ends and says where it stood."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time

import pytest

from dirl.training.interruption import EXIT_STUCK
from dirl.training.metrics import Timings

LIMIT = 1.0
SCRIPT = f"""
import time
from dirl.training.interruption import PhaseClock
from dirl.training.metrics import Timings

timings = Timings()

def phase(name, limits, *, within=lambda: None):
    with timings.phase(name):
        within()
        time.sleep(limits * {LIMIT})

def whole_step():
    for name in ("rollout", "reward", "train", "update_weights"):
        phase(name, 0.6)

with PhaseClock({LIMIT}, 3, timings.standing):
    phase("step", 0.6, within=whole_step)
    phase("eval", 0.6)
    print("healthy", flush=True)
"""


def run(last_act: str) -> subprocess.CompletedProcess[str]:
    """A healthy step of many limits in all, and then the last act."""
    script = SCRIPT + (f"    {last_act}\n" if last_act else "")
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("last_act", "where"),
    [
        ("phase('save', 60)", "in phase 'save'"),
        ("phase('step', 60, within=lambda: phase('rollout', 0.1))", "in phase 'step', after 'rollout'"),
        ("time.sleep(60)", "between phases, after 'eval'"),
    ],
)
def test_who_stands_still_is_ended_and_named(last_act: str, where: str) -> None:
    done = run(last_act)
    assert done.stdout == "healthy\n", done.stderr
    assert done.returncode == EXIT_STUCK
    assert re.search(rf"dirl: error: rank 3 has been {re.escape(where)} for [1-9] s \(phase_timeout=1\): ", done.stderr)


def test_any_number_of_phases_below_the_limit_is_healthy() -> None:
    started = time.monotonic()
    done = run("")
    assert (done.returncode, done.stdout, done.stderr) == (0, "healthy\n", "")
    assert time.monotonic() - started > 3 * LIMIT


def test_a_phase_that_begins_or_ends_is_progress() -> None:
    now = 0.0
    timings = Timings(clock=lambda: now)
    now = 5.0
    assert timings.standing() == ("before the first phase", 5.0)
    with timings.phase("step"):
        now = 6.0
        assert timings.standing() == ("in phase 'step'", 1.0)
        with pytest.raises(KeyError), timings.phase("train"):
            assert timings.standing() == ("in phase 'train'", 0.0)
            now = 9.0
            raise KeyError
        assert timings.standing() == ("in phase 'step', after 'train'", 0.0)
    now = 11.0
    assert timings.standing() == ("between phases, after 'step'", 2.0)


def test_a_second_interrupt_quits_at_once() -> None:
    code = (
        "import os, signal, time\nfrom dirl.training.interruption import SignalWatch\n"
        "with SignalWatch() as watch:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    assert watch.received == signal.SIGINT\n"
        "    print('noted', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("noted\n", -signal.SIGINT)
