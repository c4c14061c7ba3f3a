"""A fault at every change of a file that the last save of a run and its end make; the same command then goes on.

This file is also the script, above the layer of faults.c: `test_save.py OUT KIND FAULT EVERY` trains to the second
save, forks there for each number of a change, and resumes each in a fork of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from dirl.training import run as run_module
from tests.chaos.conftest import Tally
from tests.chaos.under_files import (
    BROKEN,
    DIE,
    FULL,
    READ_ONLY,
    REFUSED,
    arm,
    difference,
    draw_once,
    fork,
    run_under,
    train,
)

FAULTS = {"SIGKILL": DIE, "full disk": FULL, "read-only disk": READ_ONLY, "I/O error": BROKEN}
CASES = [
    ("sft", "SIGKILL", 1),
    ("critic", "SIGKILL", 7),
    ("sft", "full disk", 4),
    ("sft", "read-only disk", 11),
    ("sft", "I/O error", 3),
]


def fork_at_each_change(output_dir: Path, kind: str, fault: str, every: int) -> None:
    """Inside the second save: forks, each of which goes on from there and meets the fault at its change of a file."""
    save, saves, codes = run_module.save_checkpoint, count(1), {}

    def forking(*given: Any, **named: Any) -> Any:
        if next(saves) == 2:
            for number in count(1, every):
                folder = output_dir / f"at_{number:04d}"
                shutil.copytree("run", folder / "run")
                if not (child := os.fork()):
                    os.chdir(folder)
                    arm(folder / "run", FAULTS[fault], number)
                    break
                code = codes[folder.name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                if code == 0:  # it makes fewer changes
                    break
        return save(*given, **named)

    run_module.save_checkpoint = forking
    train(kind)
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


if __name__ == "__main__":
    out, *what = Path(sys.argv[1]), *sys.argv[2:]
    (out / "whole").mkdir()
    os.chdir(out / "whole")
    draw_once()
    train(what[0])  # what the others are compared with; forks find imports done
    assert fork(lambda: fork_at_each_change(out, what[0], what[1], int(what[2])), out / "forked") == 0
    resume(out, what[0])
