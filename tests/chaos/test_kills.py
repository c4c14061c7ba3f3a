"""SIGKILL in every phase, at random moments, of one process and of one of two; two runs on one folder.

This file is also the script of the ranks: `test_kills.py OUT KIND`, which kills itself where the environment says.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest

from dirl.training.metrics import Timings
from tests.chaos.conftest import Tally
from tests.chaos.under_files import MAKE, difference, fork, train
from tests.launching import ROOT, launch_script

KILL = "DIRL_TEST_KILL"  # rank:number of the phase's beginning or end at which it dies
SEED = 20261126


def die_at_phase(number: int) -> None:
    """This process ends when so many phases have begun or ended."""
    phase, passed = Timings.phase, count(1)

    def pass_one() -> None:
        if next(passed) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def counted(self: Timings, name: str) -> Iterator[None]:
        pass_one()
        with phase(self, name):
            yield
        pass_one()

    Timings.phase = counted  # type: ignore[method-assign, assignment]


def phases(output_dir: Path, kind: str) -> None:
    """Fork after fork: killed at a phase, then resumed."""
    for number in count(1):
        folder = output_dir / f"phase_{number:03d}"
        code = fork(lambda n=number: (die_at_phase(n), train(kind)), folder)  # type: ignore[misc]
        if code == 0:
            return
        assert code == -signal.SIGKILL
        assert fork(lambda: train(kind), folder) == 0


def script(*arguments: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in MAKE:
        assert fork(lambda k=kind: train(k), folder / kind) == 0  # type: ignore[misc]
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_every_phase(kind: str, whole: Path, tmp_path: Path, tally: Tally) -> None:
    tally.what = f"SIGKILL at the beginning and end of every phase of a run ({kind})"
    process = script(str(tmp_path), "phases", kind)
    assert process.wait() == 0, process.communicate()[1][-4000:]
    *killed, _ = sorted(tmp_path.glob("phase_*"))
    assert len(killed) > 10
    for folder in killed:
        wrong = difference(folder / "run", whole / kind / "run")
        tally.count(not wrong, wrong)


@pytest.mark.timeout(900)
def test_random_moments(whole: Path, tmp_path: Path, tally: Tally) -> None:
    tally.what = f"SIGKILL at random moments, again and again until a run ends (rl, critic; seed {SEED})"
    chance = random.Random(SEED)
    for number in range(8):
        kind = ("rl", "critic")[number % 2]
        folder = tmp_path / str(number)
        for _ in range(3):
            folder.mkdir(exist_ok=True)
            process = script(str(folder), "train", kind)
            try:
                process.wait(chance.uniform(3, 9))
            except subprocess.TimeoutExpired:
                process.kill()
            process.communicate()
        assert fork(lambda k=kind: train(k), folder) == 0  # type: ignore[misc]
        wrong = difference(folder / "run", whole / kind / "run")
        tally.count(not wrong, wrong)


@pytest.mark.timeout(1500)
def test_one_of_two_processes(tmp_path: Path, tally: Tally) -> None:
    tally.what = "SIGKILL of one of two processes at a phase (rl, DDP)"

    def launch(folder: Path) -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        return launch_script(__file__, str(folder), "train", "rl", backend="ddp", num_processes=2, timeout=300)

    assert launch(tmp_path / "whole").returncode == 0
    for where in ("0:9", "1:9", "0:22", "1:23", "1:40"):
        folder = tmp_path / where.replace(":", "_")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(KILL, where)
            assert launch(folder).returncode != 0, where
        done = launch(folder)
        wrong = difference(folder / "run", tmp_path / "whole/run") if done.returncode == 0 else done.stderr[-2000:]
        tally.count(not wrong, f"{where}: {wrong}")


def test_two_runs_on_one_folder(whole: Path, tmp_path: Path, tally: Tally) -> None:
    tally.what = "a second run, and its SIGKILL, on the folder of one that goes on (sft)"
    for delay in (0.0, 1.0, 3.0):
        folder = tmp_path / str(delay)
        folder.mkdir()
        runs = [script(str(folder), "train", "sft")]
        time.sleep(delay)
        runs += [script(str(folder), "train", "sft") for _ in range(2)]
        runs[2].send_signal(signal.SIGKILL) if delay else None
        said = [process.communicate()[1].decode() for process in runs]
        refused = [process.returncode for process, words in zip(runs, said, strict=True) if "is another run's" in words]
        wrong = difference(folder / "run", whole / "sft/run")
        tally.count(not wrong and all(refused) and any(process.returncode == 0 for process in runs), wrong or said)


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    if sys.argv[2] == "phases":
        phases(Path(), sys.argv[3])
        sys.exit()
    rank, _, moment = os.environ.get(KILL, "-1:0").partition(":")
    if rank == os.environ.get("RANK"):
        die_at_phase(int(moment))
    train(sys.argv[3])
