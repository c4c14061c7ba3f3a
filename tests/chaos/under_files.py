"""The layer of faults.c under this process's files, and forks in which it acts."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from dirl.errors import UserError
from dirl.model.checkpoint import load
from dirl.training.run_state import newest_checkpoint
from tests.launching import ROOT
from tests.parity.test_interruption import critic_trainer, numbers, rl_trainer, sft_trainer

COUNT, DIE, FULL, READ_ONLY, BROKEN, SLOW = range(6)
MAKE = {"sft": sft_trainer, "rl": rl_trainer, "critic": critic_trainer}
REFUSED = 3  # exit code of a fork that met an error of the machine, and said so


@cache
def layer() -> str:
    """The library, compiled."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    library = Path(tempfile.mkdtemp(prefix="dirl_chaos_")) / "faults.so"
    source = str(Path(__file__).with_name("faults.c"))
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
    return str(library)


def run_under(script: str, *arguments: str, timeout: float = 1700) -> None:
    """A test file as a program above the layer; its errors are the test's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LD_PRELOAD": layer()}
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def arm(folder: Path, how: int, number: int = 0) -> None:
    """From now on this process's changes under the folder are counted, and one of them meets a fault."""
    ctypes.CDLL(None).arm(os.fsencode(folder.resolve()), how, number)


def fork(act: Callable[[], object], folder: Path | None = None, *, seconds: float | None = None) -> int:
    """Exit code of a fork that did it (in a folder of its own), -9 if it was killed; REFUSED: it met a full disk.

    Args:
        seconds: after which it is killed.
    """
    child = os.fork()
    if child:
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)  # it is there until it is waited for
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        if folder is not None:
            folder.mkdir(exist_ok=True)
            os.chdir(folder)
        act()
        code = 0
    except (UserError, OSError):
        code = REFUSED
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def train(kind: str) -> None:
    """Four steps, saved at 2 and 4, in ./run."""
    MAKE[kind](Path("run"), save_steps=2).train()


@cache
def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a run that nothing happened to, which many are compared with."""
    return load(str(folder / "final"))[0].state_dict()


def difference(folder: Path, whole: Path) -> str:
    """How a run that came to its end differs from one that nothing happened to; empty: in no bit of it, in no file."""
    if numbers(folder) != numbers(whole):
        return f"{folder}: other lines in metrics.jsonl"
    ours, theirs = load(str(folder / "final"))[0].state_dict(), final_weights(whole)
    if any(not torch.equal(ours[name], theirs[name]) for name in theirs):
        return f"{folder}: other weights"
    left, expected = ({str(path.relative_to(run)) for path in run.rglob("*")} for run in (folder, whole))
    if left != expected:
        return f"{folder}: other files: {sorted(left ^ expected)}"
    newest = newest_checkpoint(folder)
    is_last = newest is not None and newest.name == max(path.name for path in (whole / "checkpoints").iterdir())
    return "" if is_last else f"{folder}: {newest} is its newest checkpoint"
