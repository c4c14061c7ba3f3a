"""Snapshots of a run -> their evaluations: by a process of its own each, one after another, while training goes on.

A step that is due becomes a directory evaluations/step_000010, the whole model as Hugging Face's form has it, beside
what the trainer was told. It stays until its numbers are in metrics.jsonl, so that a run which goes on after a kill
evaluates what it finds there. One is evaluated, a few may wait; what comes while these wait is left out, and said.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from dirl.config import Config, bounded, load_config, save_config
from dirl.errors import UserError
from dirl.files import write_whole
from dirl.training.interruption import end_with_launcher

logger = logging.getLogger(__name__)

MAX_WAITING = 2  # snapshots beside the one that is evaluated: the disk must hold them
_RESULT, _TOLD, _LOG = "evaluation.json", ".yaml", ".log"
_NICENESS = 10
_PROGRAM = "from dirl.training.background import main; main()"
# What tells a process that it is one of several.
_LAUNCHERS = re.compile(r"(LOCAL_)?(RANK|WORLD_SIZE)|(MASTER|GROUP|ROLE|ACCELERATE|TORCHELASTIC|FSDP)_\w+")


@dataclass(frozen=True, kw_only=True)
class BackgroundConfig(Config):
    """Whether training waits for its evaluations."""

    background: bool = False  # evaluate a snapshot in a process of its own, and train on meanwhile
    device: str = "cpu"  # of that process: cpu, or the number (nvidia-smi's) of a GPU that the run leaves free
    num_threads: int = bounded(1, least=1)  # of that process

    def check(self) -> None:
        if self.device != "cpu" and not self.device.isdecimal():
            raise UserError(f"device must be cpu or the number of a GPU, got {self.device!r}")
        for key, default in (("device", "cpu"), ("num_threads", 1)):
            if not self.background and getattr(self, key) != default:
                raise UserError(f"{key}={getattr(self, key)} is of the process that background=true starts: set it too")


class BackgroundEvaluations:
    """The evaluations of a run that are under way; leaving the context ends their process, and keeps the snapshots.

    Args:
        trainer: the class whose `evaluate_snapshot` the process calls.
        limit_seconds: that an evaluation may take; 0: as long as it likes.
        is_main: on other ranks nothing is done, and nothing is under way.
    Raises:
        UserError: a GPU is asked for where there is none.
    """

    def __init__(
        self, output_dir: str, config: BackgroundConfig, trainer: type[Any], *, limit_seconds: float, is_main: bool
    ) -> None:
        if config.device != "cpu" and not torch.cuda.is_available():
            raise UserError(f"eval.device={config.device}: there is no CUDA device; use cpu")
        self.folder, self.config, self.trainer = Path(output_dir, "evaluations"), config, trainer
        self.limit_seconds, self.is_main = limit_seconds, is_main
        self.steps: list[int] = []  # the first is evaluated
        self._process: subprocess.Popen[bytes] | None = None
        self._since = 0.0

    def __enter__(self) -> BackgroundEvaluations:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    @property
    def is_full(self) -> bool:
        return len(self.steps) > MAX_WAITING

    def place(self, step: int) -> Path:
        """Where the snapshot of a step is."""
        return self.folder / f"step_{step:06d}"

    def restore(self, now: int, done: Collection[int]) -> None:
        """Take on the snapshots that an earlier process left; delete those of steps that are done, or not reached."""
        for path in sorted(self.folder.glob("step_*")) if self.is_main else ():
            step = int(path.stem.partition("_")[2])
            is_left = step <= now and step not in done and self.place(step).is_dir()
            is_left &= path.suffix in ("", _TOLD) and self.place(step).with_suffix(_TOLD).is_file()
            if is_left and path.is_dir():
                self.steps.append(step)
            elif not is_left and path.suffix != _LOG:
                _remove(path)

    def prepare(self, step: int, config: Config) -> Path:
        """Note what the trainer is told at this step; where its snapshot is to be written."""
        if self.is_main:
            save_config(config, self.place(step).with_suffix(_TOLD))
        return self.place(step)

    def add(self, step: int) -> None:
        """The snapshot of this step is there."""
        if self.is_main:
            self.steps.append(step)

    def collect(self, record: Callable[[int, dict[str, float]], None]) -> None:
        """Hand the numbers of an evaluation that has ended to `record`, and begin the next; never waits."""
        if self._process is not None:
            code: int | str | None = self._process.poll()
            if code is None and 0 < self.limit_seconds < time.monotonic() - self._since:
                self._end()
                code = "it took too long"
            if code is None:
                return
            self._process = None
            self._conclude(self.steps[0], code, record)
        if self.steps and self.is_main:
            self._begin(self.place(self.steps[0]))

    def _conclude(self, step: int, code: int | str, record: Callable[[int, dict[str, float]], None]) -> None:
        place = self.place(step)
        if code in (-signal.SIGTERM, -signal.SIGINT):  # somebody ends the whole job: it is begun again
            return
        if code == 0:
            numbers = json.loads((place / _RESULT).read_text(encoding="utf-8"))
            record(step, numbers)
            place.with_suffix(_LOG).unlink(missing_ok=True)
        else:
            said = place.with_suffix(_LOG).read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            logger.warning(
                "step %d has no evaluation, its process failed (%s): %s; see %s",
                *(step, code, said[:300], place.with_suffix(_LOG)),
            )
        self.steps.remove(step)
        _remove(place)
        _remove(place.with_suffix(_TOLD))

    def _begin(self, place: Path) -> None:
        trainer = f"{self.trainer.__module__}:{self.trainer.__qualname__}"
        root = str(Path(__file__).resolve().parents[2])
        environment = {name: value for name, value in os.environ.items() if not _LAUNCHERS.fullmatch(name)}
        environment |= {
            "OMP_NUM_THREADS": str(self.config.num_threads),
            "CUDA_VISIBLE_DEVICES": "" if self.config.device == "cpu" else self.config.device,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
        }
        with place.with_suffix(_LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, trainer, str(place)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the run, which ends it
            )
        self._since = time.monotonic()

    def _end(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main() -> None:
    """The process: TRAINER SNAPSHOT, the trainer as module:class; writes what it found into the snapshot."""
    end_with_launcher()
    os.nice(_NICENESS)
    logging.basicConfig(level=logging.WARNING)
    module, _, name = sys.argv[1].partition(":")
    trainer, place = getattr(import_module(module), name), Path(sys.argv[2])
    config = load_config(trainer.CONFIG, place.with_suffix(_TOLD))
    write_whole(place / _RESULT, json.dumps(trainer.evaluate_snapshot(config, place)))
