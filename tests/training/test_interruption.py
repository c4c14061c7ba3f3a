"""Signals and clocks: what ends a process that does not listen."""

from __future__ import annotations

import signal
import subprocess
import sys


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
