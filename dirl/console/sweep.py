"""`dirl sweep CONFIG key=[a,b,c] seed=[0,1,2]`: every combination a run of its own, several at a time.

A run is `dirl sft|rl|eval` in a process of its own, in a session of its own: Ctrl-C reaches the sweep, which asks each
run for one checkpoint and waits. What is finished is not run again, what was interrupted goes on, and what fails is
listed at the end.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dirl.config import CONFIGS, Config, load_config
from dirl.console.combinations import Axis, Combination, axes_of, chosen_index, combinations_of, stage_of
from dirl.console.list_runs import RunLine, evaluation_line, line_of, print_lines
from dirl.console.report_runs import report_groups
from dirl.errors import UserError, visible
from dirl.training.interruption import SignalWatch

LOG = "output.log"  # in a run's folder: all that its attempts printed
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # Linux has it
_LAUNCHER = CONFIGS.parent / "scripts/launch.sh"
_FINISHED = {"eval": "report.md", "sft": "final/README.md", "rl": "final/README.md"}  # the last file that a run writes


def sweep(
    config_path: str,
    words: Sequence[str],
    schemas: Mapping[str, type[Config]],
    *,
    jobs: int | None,
    index: int | None,
    prints: bool,
    console: Console,
) -> int:
    """The command; its exit code: 128 and the signal that ended it, or 1 where a run failed or was stopped.

    Args:
        schemas: the configuration of each stage.
        jobs: runs at a time; None: as many as there is room for.
        index: of the only combination to run; None: that of a Slurm array's task, else all.
        prints: say what would be run, and run nothing.
    """
    stage = stage_of(config_path, schemas)
    axes = axes_of(schemas[stage], words)
    combinations = combinations_of(schemas[stage], config_path, words, axes)
    index = chosen_index(index, len(combinations))
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if prints:
        say(described(combinations, index))
        return 0
    if index is not None:
        if jobs is not None:
            raise UserError(f"--jobs {jobs} is of several runs, and combination {index} is one; leave it out")
        run_one(stage, config_path, combinations[index], say)
        return 0
    places = Places.on_this_machine(jobs, len(combinations))
    outcomes, received = run_sweep(stage, config_path, combinations, places, say)
    if page := conclude(outcomes, axes, stage, console):
        say(f"report: {page}")
    return exit_code(outcomes, received)


@dataclass(frozen=True)
class Places:
    """Where runs of a sweep go on at the same time: one entry a run, its environment."""

    environments: tuple[Mapping[str, str], ...]

    @staticmethod
    def on_this_machine(wanted: int | None, count: int) -> Places:
        """As many as are asked for (None: as the machine has room for), at most `count`.

        A run has NUM_PROCESSES GPUs of its own; without GPUs the runs share the cores.

        Raises:
            UserError: more than there are GPUs for.
        """
        if wanted is not None and wanted < 1:
            raise UserError(f"--jobs {wanted}: at least 1")
        if os.environ.get("NUM_MACHINES", "1") != "1":
            raise UserError("NUM_MACHINES is of one run: give each machine --index, as examples/slurm.sbatch does")
        named = os.environ.get("NUM_PROCESSES") or "1"
        if not named.isdecimal() or int(named) < 1:
            raise UserError(f"NUM_PROCESSES={named}: must be a whole number, at least 1: the processes of a run")
        gpus, processes = _visible_gpus(), int(named)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        room = (len(gpus) or cores) // processes
        if gpus and (wanted or 1) > room:
            raise UserError(
                f"--jobs {wanted or 1} with NUM_PROCESSES={processes} takes {(wanted or 1) * processes} GPUs, and "
                f"{len(gpus)} are visible; a run has its GPUs for itself"
            )
        jobs = min(wanted or max(room, 1), count)
        if gpus:
            shares = [gpus[place * processes : (place + 1) * processes] for place in range(jobs)]
            return Places(tuple({"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares))
        threads = str(max(cores // (jobs * processes), 1))
        return Places(({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)},) * jobs)


@dataclass
class Outcome:
    """How a run of the sweep stands."""

    combination: Combination
    state: str = "waiting"  # running, finished, failed, stopped
    trouble: str = ""  # the last line of a run that failed
    seconds: float = 0.0


@dataclass
class _Running:
    """A process that is a run, and the place it has."""

    outcome: Outcome
    process: subprocess.Popen[bytes]
    place: int
    log: Path
    log_start: int  # bytes of earlier attempts
    start: float = field(default_factory=time.monotonic)


def run_sweep(
    stage: str,
    config_path: str,
    combinations: Sequence[Combination],
    places: Places,
    say: Callable[[str], None],
) -> tuple[list[Outcome], int]:
    """Run what is not finished; how every combination stands, and the signal that ended the sweep (0: none)."""
    outcomes = [Outcome(one, "finished" if is_finished(stage, one) else "waiting") for one in combinations]
    waiting = [outcome for outcome in outcomes if outcome.state == "waiting"]
    done = len(outcomes) - len(waiting)
    say(f"{len(outcomes)} runs, {done} finished already, {len(places.environments)} at a time: {_root(combinations)}")
    running: list[_Running] = []
    asked = 0
    with SignalWatch() as watch:
        while running or (waiting and not watch.received):
            free = [p for p in range(len(places.environments)) if p not in {one.place for one in running}]
            while free and waiting and not watch.received:
                place = free.pop(0)
                running.append(_start(stage, config_path, waiting.pop(0), place, places.environments[place]))
            if watch.received and not asked:
                asked = watch.received
                for one in running:
                    one.process.terminate()
            time.sleep(0.1)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _note_end(stage, one, was_asked=bool(asked))
                done += 1
                name, outcome = one.outcome.combination.name, one.outcome
                say(f"[{done}/{len(outcomes)}] {name}: {outcome.state} after {outcome.seconds:.0f} s")
        return outcomes, watch.received


def run_one(stage: str, config_path: str, combination: Combination, say: Callable[[str], None]) -> None:
    """This process becomes the run, unless it is finished: signals, output and exit code are its own."""
    if is_finished(stage, combination):
        say(f"{combination.name}: finished already, in {combination.folder}")
        return
    say(f"{combination.name}: {combination.folder}")
    command = command_of(stage, config_path, combination)
    os.execvpe(command[0], command, {**os.environ, **_python_first()})


def described(combinations: Sequence[Combination], index: int | None) -> str:
    """A line a combination: its number and what it is told; of a single one a line a word, for scripts."""
    if index is not None:
        return "\n".join(combinations[index].overrides)
    return "\n".join(f"{number} {shlex.join(one.overrides)}" for number, one in enumerate(combinations))


def exit_code(outcomes: Sequence[Outcome], received: int) -> int:
    """As a shell says it: 128 and the signal that ended the sweep; 1: a run failed, or was stopped."""
    if received:
        return 128 + received
    return int(any(outcome.state != "finished" for outcome in outcomes))


def command_of(stage: str, config_path: str, combination: Combination) -> list[str]:
    """The run as a command; more than one process goes through the launcher of the checkout.

    Raises:
        UserError: there is no checkout.
    """
    arguments = ["-m", "dirl.cli", stage, config_path, *combination.overrides]
    if os.environ.get("NUM_PROCESSES", "1") == "1" and not os.environ.get("ACCELERATE_CONFIG"):
        return [sys.executable, *arguments]
    if not _LAUNCHER.is_file():
        raise UserError(
            "NUM_PROCESSES and ACCELERATE_CONFIG need a checkout of dirl: its scripts/launch.sh starts them"
        )
    arguments[3] = str(Path(config_path).absolute())  # the launcher goes to the root of the checkout
    arguments[-1] = f"output_dir={combination.folder.absolute()}"
    return ["bash", "-c", 'source "$0"; launch "$@"', str(_LAUNCHER), *arguments]


def is_finished(stage: str, combination: Combination) -> bool:
    """Whether the run is done, with the configuration that is asked for: one that differs goes on, or is refused."""
    saved = combination.folder / "config.yaml"
    if not (combination.folder / _FINISHED[stage]).is_file() or not saved.is_file():
        return False
    wanted: Any = combination.config
    try:
        found: Any = load_config(type(combination.config), saved)
    except UserError:
        return False  # of another version
    return bool(replace(found, output_dir=wanted.output_dir) == wanted)


def conclude(outcomes: Sequence[Outcome], axes: Sequence[Axis], stage: str, console: Console) -> Path | None:
    """Print the summary; the grouped report of what there is (None: of nothing)."""
    lines = []
    for outcome in outcomes:
        folder, name = outcome.combination.folder, outcome.combination.name
        known = evaluation_line(folder, name) if stage == "eval" else line_of(folder, name)
        line = known or RunLine(run=name)
        lines.append(replace(line, state=outcome.state, trouble=outcome.trouble))
    print_lines(lines, console)
    begun = [outcome.combination.folder for outcome in outcomes if _has_numbers(outcome.combination.folder)]
    keys = [axis.key for axis in axes if axis.key != "seed"] or ["seed"]
    page = _root([outcome.combination for outcome in outcomes]) / "report.html"
    return report_groups(begun, page, ",".join(keys)) if begun else None


def _has_numbers(folder: Path) -> bool:
    files = (folder / name for name in ("metrics.jsonl", "results.json"))
    return any(file.is_file() and file.stat().st_size for file in files)


def _root(combinations: Sequence[Combination]) -> Path:
    return combinations[0].folder.parent


def _visible_gpus() -> list[str]:
    """The names by which CUDA_VISIBLE_DEVICES knows those that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(index) for index in range(64)])[: torch.cuda.device_count()]


def _start(stage: str, config_path: str, outcome: Outcome, place: int, environment: Mapping[str, str]) -> _Running:
    combination = outcome.combination
    combination.folder.mkdir(parents=True, exist_ok=True)
    outcome.state, log = "running", combination.folder / LOG
    with log.open("ab") as file:
        log_start = file.tell()
        process = subprocess.Popen(
            command_of(stage, config_path, combination),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_python_first(), **environment},
            start_new_session=True,
            preexec_fn=_end_with_sweep,
        )
        return _Running(outcome, process, place, log, log_start)


def _end_with_sweep() -> None:
    """In a run's process, before it is one: SIGTERM, and so a checkpoint, should the sweep die without a word."""
    if _PRCTL is not None:
        _PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _python_first() -> dict[str, str]:
    """For the launcher, which calls python3: this one."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", "NO_VENV": "1"}


def _note_end(stage: str, one: _Running, *, was_asked: bool) -> None:
    outcome, code = one.outcome, one.process.returncode
    outcome.seconds = time.monotonic() - one.start
    if code == 0 and is_finished(stage, outcome.combination):
        outcome.state = "finished"
    elif code in (0, 128 + signal.SIGINT) or (was_asked and code in (-signal.SIGTERM, 128 + signal.SIGTERM)):
        outcome.state = "stopped"  # with a checkpoint, or before there was anything to keep
    else:
        outcome.state, outcome.trouble = "failed", _last_line(one) or f"ended with exit code {code}"


def _last_line(one: _Running) -> str:
    """The error that a run ended with; where none is told, the last that it said."""
    with one.log.open("rb") as file:
        file.seek(max(one.log_start, one.log.stat().st_size - 20_000))
        lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("dirl: error: ")] or lines
    return visible(told[-1].removeprefix("dirl: error: "))[:300] if told else ""
