"""SIGKILL in every phase, at random moments, of one process and of one of two; two runs on one folder.

This file is also a script: `test_kills.py OUT phases KIND`, `moments` and `together` fork runs and kill some of them;
`test_kills.py OUT train KIND FOLDER...` trains in each folder, and kills itself where the environment says.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from dirl.errors import UserError
from dirl.training.metrics import Timings
from tests.chaos.conftest import Tally
from tests.chaos.under_files import difference, fork, train
from tests.drawing import draw_once
from tests.launching import ROOT, launch_script

KILL = "DIRL_TEST_KILL"  # rank:number of the phase's beginning or end at which it dies
SEED = 20261126
KINDS = ("rl", "critic")
DELAYS = (0.0, 0.1, 0.3)


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


def phases(kind: str) -> None:
    """Fork after fork: killed at a phase, then resumed."""

    def train_and_die(number: int) -> None:
        die_at_phase(number)
        train(kind)

    warm_up(kind)
    for number in count(1):
        folder = Path(f"phase_{number:03d}")
        code = fork(partial(train_and_die, number), folder)
        if code == 0:
            return
        assert code == -signal.SIGKILL
        assert fork(partial(train, kind), folder) == 0


def moments() -> None:
    """Fork after fork: killed three times, anywhere in the seconds of a run, then resumed."""
    chance, seconds = random.Random(SEED), {}
    for kind in KINDS:
        warm_up(kind)
        start = time.monotonic()
        assert fork(partial(train, kind), Path(f"again_{kind}")) == 0
        seconds[kind] = time.monotonic() - start
    for number, kind in enumerate(KINDS * 4):
        for _ in range(3):
            moment = chance.uniform(0, seconds[kind])
            assert fork(partial(train, kind), Path(str(number)), seconds=moment) in (0, -signal.SIGKILL)
        assert fork(partial(train, kind), Path(str(number))) == 0


def together() -> None:
    """Forks that train in one folder, the second and third so much later; what they said, and their exit codes."""

    def take_part(number: int) -> None:
        try:
            train("sft")
        except UserError as error:
            Path(f"said_{number}").write_text(str(error))
            sys.exit(1)

    warm_up("sft")
    here, forks = os.getcwd(), multiprocessing.get_context("fork")
    for delay in DELAYS:
        os.mkdir(str(delay))
        os.chdir(str(delay))
        runs = [forks.Process(target=take_part, args=(number,)) for number in range(3)]
        runs[0].start()
        time.sleep(delay)
        runs[1].start()
        runs[2].start()
        if delay:
            time.sleep(delay / 2)
            runs[2].kill()
        for number, run in enumerate(runs):
            run.join()
            Path(f"code_{number}").write_text(str(run.exitcode))
        os.chdir(here)


def warm_up(kind: str) -> None:
    """A run that nothing happens to, after which forks find imports done and pictures drawn."""
    lose_no_time()
    train_in(f"whole_{kind}", kind)


def lose_no_time() -> None:
    """Pictures are drawn once, and nobody waits for the disk: whoever is killed has the kernel write on."""
    draw_once()
    os.fsync = lambda fd: None


def train_in(folder: str, kind: str) -> None:
    """A run in a folder below this one."""
    here = os.getcwd()
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    train(kind)
    os.chdir(here)


def run_script(*arguments: str) -> None:
    """This file, whose errors are the test's."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr[-4000:].decode(errors="replace")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_every_phase(kind: str, tmp_path: Path, tally: Tally) -> None:
    tally.what = f"SIGKILL at the beginning and end of every phase of a run ({kind})"
    run_script(str(tmp_path), "phases", kind)
    *killed, _ = sorted(tmp_path.glob("phase_*"))
    assert len(killed) > 10
    for folder in killed:
        wrong = difference(folder / "run", tmp_path / f"whole_{kind}/run")
        tally.count(not wrong, wrong)


@pytest.mark.timeout(900)
def test_random_moments(tmp_path: Path, tally: Tally) -> None:
    tally.what = f"SIGKILL at random moments, again and again until a run ends (rl, critic; seed {SEED})"
    run_script(str(tmp_path), "moments")
    for number, kind in enumerate(KINDS * 4):
        wrong = difference(tmp_path / str(number) / "run", tmp_path / f"whole_{kind}/run")
        tally.count(not wrong, wrong)


@pytest.mark.timeout(1500)
def test_one_of_two_processes(tmp_path: Path, tally: Tally) -> None:
    tally.what = "SIGKILL of one of two processes at a phase (rl, DDP)"

    def launch(*folders: str) -> subprocess.CompletedProcess[str]:
        given = [str(tmp_path), "train", "rl", *folders]
        return launch_script(__file__, *given, backend="ddp", num_processes=2, timeout=300)

    moments = ("0:9", "1:9", "0:22", "1:23", "1:40")
    for where in moments:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(KILL, where)
            assert launch(where.replace(":", "_")).returncode != 0, where
    folders = [where.replace(":", "_") for where in moments]
    done = launch("whole", *folders)
    assert done.returncode == 0, done.stderr[-4000:]
    for where, folder in zip(moments, folders, strict=True):
        wrong = difference(tmp_path / folder / "run", tmp_path / "whole/run")
        tally.count(not wrong, f"{where}: {wrong}")


def test_two_runs_on_one_folder(tmp_path: Path, tally: Tally) -> None:
    tally.what = "a second run, and its SIGKILL, on the folder of one that goes on (sft)"
    run_script(str(tmp_path), "together")
    for delay in DELAYS:
        folder = tmp_path / str(delay)
        codes = [int((folder / f"code_{number}").read_text()) for number in range(3)]
        said = {number: path.read_text() for number in range(3) if (path := folder / f"said_{number}").exists()}
        wrong = difference(folder / "run", tmp_path / "whole_sft/run")
        is_well = all("is another run's" in words and codes[number] for number, words in said.items()) and 0 in codes
        is_well &= all(code in (0, -signal.SIGKILL) or number in said for number, code in enumerate(codes))
        tally.count(not wrong and is_well, wrong or (codes, said))


if __name__ == "__main__":
    out, task, *rest = sys.argv[1:]
    os.chdir(out)
    if task == "phases":
        phases(*rest)
    elif task == "moments":
        moments()
    elif task == "together":
        together()
    else:
        rank, _, moment = os.environ.get(KILL, "-1:0").partition(":")
        if rank == os.environ.get("RANK"):
            die_at_phase(int(moment))
        lose_no_time()
        for folder in rest[1:]:
            train_in(folder, rest[0])
