"""A fault at every change of a file that the last save of a run and its end make; the same command then goes on.

This file is also the script, above the layer of faults.c: `test_save.py OUT KIND FAULT EVERY` trains to the second
save, forks there for each number of a change, and resumes each in a fork of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dirl.errors import RunInterrupted
from dirl.training import run as run_module
from tests.chaos.conftest import Tally
from tests.chaos.under_files import (
    BROKEN,
    DIE,
    FULL,
    READ_ONLY,
    REFUSED,
    SLOW,
    arm,
    difference,
    fork,
    run_under,
    train,
)
from tests.drawing import draw_once

STOPPED = 4  # exit code of a fork that was told to stop, and did


class Fault(NamedTuple):
    """What a fork meets."""

    how: int
    number: int  # of the change that meets it; of a slow disk the milliseconds of an fsync
    signal: int = 0  # that it is sent after so many seconds
    seconds: float = 0.0


FAULTS = {"SIGKILL": DIE, "full disk": FULL, "read-only disk": READ_ONLY, "I/O error": BROKEN}
CASES = [
    ("sft", "SIGKILL", 1),
    ("critic", "SIGKILL", 7),
    ("sft", "full disk", 4),
    ("sft", "read-only disk", 11),
    ("sft", "I/O error", 3),
]

SLOWLY = [
    Fault(SLOW, 100),
    *(Fault(SLOW, 100, sent, seconds) for sent in (signal.SIGTERM, signal.SIGKILL) for seconds in (0.3, 1.0, 2.0)),
]


def go_on_from_the_second_save(output_dir: Path, kind: str, faults: Iterable[Fault]) -> None:
    """Inside the second save: forks, each of which goes on from there and meets its fault; as many as end badly."""
    save, saves, codes = run_module.save_checkpoint, count(1), {}

    def forking(*given: Any, **named: Any) -> Any:
        if next(saves) == 2:
            for fault in faults:
                folder = output_dir / f"at_{len(codes):04d}"
                shutil.copytree("run", folder / "run")
                if not (child := os.fork()):
                    os.chdir(folder)
                    arm(folder / "run", fault.how, fault.number)
                    break
                if fault.signal:
                    time.sleep(fault.seconds)
                    os.kill(child, fault.signal)
                code = codes[folder.name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if code == 0 and fault.how != SLOW:  # it makes fewer changes
                    break
        return save(*given, **named)

    run_module.save_checkpoint = forking
    try:
        train(kind)
    except RunInterrupted:
        os._exit(STOPPED)
    (output_dir / "codes.json").write_text(json.dumps(codes))


def resume(output_dir: Path, kind: str) -> None:
    """Each in a fork: its exit code, and how it differs from the run that nothing happened to."""
    resumed = {}
    for name in json.loads((output_dir / "codes.json").read_text()):
        code = fork(partial(train, kind), output_dir / name)
        wrong = difference(output_dir / name / "run", output_dir / "whole/run") if code == 0 else "no end"
        resumed[name] = code, wrong
        if not wrong:
            shutil.rmtree(output_dir / name)  # a folder of 20 MB
    (output_dir / "resumed.json").write_text(json.dumps(resumed))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "fault", "every"), CASES)
def test_a_save(kind: str, fault: str, every: int, tmp_path: Path, tally: Tally) -> None:
    tally.what = f"{fault} at {'every' if every == 1 else f'one in {every}'} change of a file at a save ({kind})"
    run_under(__file__, str(tmp_path), kind, fault, str(every))
    *met, (last, end) = json.loads((tmp_path / "codes.json").read_text()).items()
    resumed = json.loads((tmp_path / "resumed.json").read_text())
    assert end == 0 and len(met) * every > 40, last
    for name, code in met:
        tally.count(code == (-9 if fault == "SIGKILL" else REFUSED), f"{name}: ended with {code}")
    for name, (code, wrong) in resumed.items():
        tally.count(code == 0 and not wrong, f"{name}: resumed with {code}; {wrong}")


@pytest.mark.timeout(600)
def test_a_slow_disk(tmp_path: Path, tally: Tally) -> None:
    tally.what = "save on a slow disk: to its end, or with SIGTERM or SIGKILL amid it (sft)"
    run_under(__file__, str(tmp_path), "sft", "slow disk", "0")
    codes = list(json.loads((tmp_path / "codes.json").read_text()).values())
    resumed = list(json.loads((tmp_path / "resumed.json").read_text()).values())
    allowed = {0: (0,), signal.SIGTERM: (0, STOPPED), signal.SIGKILL: (-9,)}
    for fault, met, (code, wrong) in zip(SLOWLY, codes, resumed, strict=True):
        is_well = met in allowed[fault.signal] and code == 0 and not wrong
        tally.count(is_well, f"{fault}: ended with {met}, resumed with {code}; {wrong}")
    assert -9 in codes


if __name__ == "__main__":
    out, *what = Path(sys.argv[1]), *sys.argv[2:]
    (out / "whole").mkdir()
    os.chdir(out / "whole")
    draw_once()
    train(what[0])  # what the others are compared with; forks find imports done
    faults = SLOWLY if what[1] == "slow disk" else (Fault(FAULTS[what[1]], at) for at in count(1, int(what[2])))
    assert fork(lambda: go_on_from_the_second_save(out, what[0], faults), out / "forked") == 0
    resume(out, what[0])
