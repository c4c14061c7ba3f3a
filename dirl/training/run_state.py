"""What a run is and where it stands -> checkpoint directories that are complete or invisible, and run.json.

A checkpoint is written beside its final name, described by a manifest (files, sizes, digests), forced to disk, and
renamed; a kill or a full disk at any moment leaves the previous checkpoint as it was. Resuming takes the newest that is
whole.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar

import torch

from dirl.config import PATH, Config, bounded
from dirl.errors import UserError
from dirl.files import force_to_disk, publish, write_json, write_whole, writing
from dirl.show.metric_table import TABLE
from dirl.training.metrics import check_tracker_names

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WAY_ON = "make room, or lower save_total_limit, and the same command continues from the checkpoint before"
CHECKPOINT_NAME = re.compile(r"step_(\d+)(?:\.old)?")  # .old: being replaced when a kill came
ANY_STATE_NAME = re.compile(r"step_\d+(\.old|\.tmp)?")
SECRET_NAME = re.compile(r"(^|[._-])(api[_-]?key|password|secret|(hf|auth|access)_token)$|^-*token$", re.IGNORECASE)
SECRET_VALUE = re.compile(r"\b(hf_|sk-)[A-Za-z0-9_-]{16,}|(?<=://)[^/\s@]+(?=@)")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """Where a run writes and how it can be repeated and continued."""

    FIXED: ClassVar[tuple[str, ...]] = ("seed",)  # keys and sections with one value from a run's first step to its last

    output_dir: str = field(metadata=PATH)
    seed: int = bounded(0, least=0, below=2**32)  # of all that is drawn; the range is numpy's
    save_steps: int = bounded(0, least=0)  # optimizer steps between checkpoints; 0: only at the end
    save_total_limit: int = bounded(2, least=0)  # checkpoints kept; 0: all
    # "auto": newest complete one in output_dir; "none"; or a checkpoint directory
    resume_from_checkpoint: str = field(default="auto", metadata=PATH)
    report_to: list[str] = field(default_factory=list)  # wandb, tensorboard; metrics.jsonl is always written
    metric_for_best_model: str = ""  # such as eval/accuracy: its best checkpoint is kept beside the newest; empty: none
    greater_is_better: bool = True  # what best means for metric_for_best_model; false for a loss
    # seconds a phase of a step (rollout, train, ...) may take before the run ends
    phase_timeout: int = bounded(7200, least=0)
    run_name: str = ""  # what trackers show; empty: they invent one
    logging_steps: int = bounded(1, least=1)  # optimizer steps between lines of metrics.jsonl
    push_to_hub: str = ""  # hub id owner/name that final/ is uploaded to at the end; a failure is a warning

    def check(self) -> None:
        if not self.output_dir:
            raise UserError("output_dir must name a directory, got ''")
        if Path(self.output_dir).is_file():
            raise UserError(f"output_dir={self.output_dir} is a file; name a directory")
        if not self.resume_from_checkpoint:
            raise UserError("resume_from_checkpoint must be 'auto', 'none' or a checkpoint directory, got ''")
        check_tracker_names(self.report_to)
        if self.metric_for_best_model and TABLE.row(self.metric_for_best_model) is None:
            known = ", ".join(row.name for row in TABLE.rows if row.name.startswith("eval/"))
            raise UserError(f"metric_for_best_model={self.metric_for_best_model} is no metric; of evaluations: {known}")
        if self.push_to_hub and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.push_to_hub):
            raise ValueError(f"push_to_hub must be a hub id such as owner/name, got {self.push_to_hub!r}")


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    write: Callable[[Path], None],
    *,
    limit: int,
    is_main: bool,
    barrier: Callable[[], None],
    kept_steps: Collection[int] = (),
) -> Path:
    """Write a checkpoint that exists completely or not at all; returns its directory.

    Args:
        write: fills the directory it is given; called on every rank, which must not write the same file.
        limit: checkpoints to keep, this one included; 0 keeps all.
        barrier: returns when every rank has called it.
        kept_steps: checkpoints that are kept whatever their age.
    """
    final = Path(output_dir) / "checkpoints" / f"step_{step:06d}"
    temporary = final.with_name(final.name + ".tmp")
    if is_main:
        with writing(final, WAY_ON):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    barrier()
    try:
        with writing(final, WAY_ON):
            write(temporary)
        barrier()
        if is_main:
            with writing(final, WAY_ON):
                seal(temporary, step)
                publish(temporary, final)
    finally:
        if is_main:  # gone once it is published; after a failure, give a full disk its space back
            shutil.rmtree(temporary, ignore_errors=True)
    if is_main:
        prune(final, limit, kept_steps)
    barrier()
    return final


def seal(directory: Path, step: int) -> None:
    """Describe the directory's files in a manifest and force all of it to disk."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = [path.relative_to(directory).as_posix() for path in files]
    described = {name: [(directory / name).stat().st_size, digest] for name, digest in digests_of(directory, names)}
    write_json(directory / MANIFEST, {"step": step, "files": described})
    folders = [path for path in directory.rglob("*") if path.is_dir()]
    for path in [*files, *folders, directory]:
        force_to_disk(path)


def digests_of(directory: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """Names and the CRC-32 of each file, about a second per GB and thread: it tells damage, not malice."""

    def digest(name: str) -> str:
        value = 0
        with (directory / name).open("rb") as file:
            while piece := file.read(1 << 22):
                value = zlib.crc32(piece, value)
        return f"{value:08x}"

    with ThreadPoolExecutor(max_workers=8) as pool:  # zlib lets go of the interpreter
        return list(zip(names, pool.map(digest, names), strict=True))


def prune(newest: Path, limit: int, kept_steps: Collection[int] = ()) -> None:
    """Delete the oldest checkpoints beyond `limit`, what earlier kills left, and steps this run has not reached.

    A later step than the one just saved belongs to a run that was given up; "auto" would resume from it.
    """
    reached, complete = checkpoint_step(newest), sweep(newest.parent)
    kept = [complete[step] for step in sorted(complete) if step <= reached][-limit if limit else 0 :]
    kept += [complete[step] for step in kept_steps if step in complete and step <= reached]
    for path in complete.values():
        if path not in kept:
            shutil.rmtree(path)


def sweep(folder: Path) -> dict[int, Path]:
    """Delete what kills left of checkpoints; the complete ones that remain."""
    complete = {step: path for step, path in checkpoints_by_step(folder).items() if not missing_in(path)}
    for path in folder.iterdir():
        if ANY_STATE_NAME.fullmatch(path.name) and path not in complete.values():
            shutil.rmtree(path)
    return complete


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """Every directory named like a checkpoint, complete or not; step_10 goes before step_10.old."""
    paths = [path for path in sorted(folder.glob("step_*"), reverse=True) if CHECKPOINT_NAME.fullmatch(path.name)]
    return {checkpoint_step(path): path for path in paths}


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step after which the checkpoint was written."""
    match = CHECKPOINT_NAME.fullmatch(checkpoint.name)
    if match is None:
        raise UserError(f"{checkpoint}: not a checkpoint directory: its name is not step_<number>")
    return int(match[1])


def missing_in(checkpoint: Path) -> str:
    """What a checkpoint lacks, in words: its manifest, or a file of the size it lists; empty: nothing."""
    try:
        for name, (size, _) in described_in(checkpoint).items():
            if (checkpoint / name).stat().st_size != size:
                return f"{name} is cut short"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return ""


def described_in(checkpoint: Path) -> dict[str, tuple[int, str]]:
    """Size and digest (empty where an older version wrote it) of each file of a checkpoint."""
    files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: (entry, "") if isinstance(entry, int) else (entry[0], entry[1]) for name, entry in files.items()}


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty: it is what was written. Reads all of it."""
    if missing := missing_in(checkpoint):
        return missing
    written = {name: digest for name, (_, digest) in described_in(checkpoint).items() if digest}
    return next(
        (f"{name} is damaged" for name, found in digests_of(checkpoint, [*written]) if found != written[name]), ""
    )


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The whole checkpoint of the latest step; None when there is none. Warns once about what it passed over."""
    folder = Path(output_dir) / "checkpoints"
    steps = checkpoints_by_step(folder)
    passed_over = [f"{path.name} (never finished)" for path in sorted(folder.glob("step_*.tmp"))]
    found = None
    for step in sorted(steps, reverse=True):
        damage = damage_of(steps[step])
        if not damage:
            found = steps[step]
            break
        passed_over.append(f"{steps[step].name} ({damage})")
    if passed_over:
        logger.warning("%s: passing over %s", folder, ", ".join(passed_over))
    return found


def resolve_resume(config: RunConfig) -> Path | None:
    """The checkpoint to start from, or None for a fresh start."""
    choice = config.resume_from_checkpoint
    if choice == "none":
        return None
    if choice == "auto":
        return newest_checkpoint(config.output_dir)
    if damage := damage_of(Path(choice)):
        raise UserError(f"resume_from_checkpoint={choice}: not a whole checkpoint: {damage}; name another, or use auto")
    checkpoint_step(Path(choice))
    return Path(choice)


def write_run_json(output_dir: str | Path, config: Mapping[str, Any], model: Mapping[str, int] | None = None) -> Path:
    """Record what ran, on what, from which code: enough to repeat the run, no host name and no secrets.

    Args:
        model: the size of what is trained, which a run's cost is reckoned from.
    """
    record = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "argv": without_secrets(sys.argv),
        **git_state(Path(__file__).resolve().parents[2]),
        "versions": {
            "python": platform.python_version(),
            **{name: installed_version(name) for name in ("dirl", "torch", "transformers", "accelerate")},
        },
        "hardware": hardware_summary(),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        **({"model": dict(model)} if model else {}),
        "config": hide_secrets(config),
    }
    return write_whole(Path(output_dir) / "run.json", json.dumps(record, indent=2, default=str) + "\n")


def without_secrets(argv: Sequence[str]) -> list[str]:
    """Arguments with the values of secret names (`hf_token=...`, `--api-key ...`) and known token shapes replaced."""
    cleaned: list[str] = []
    for argument in argv:
        name, separator, _ = argument.partition("=")
        if cleaned and "=" not in cleaned[-1] and cleaned[-1].startswith("-") and SECRET_NAME.search(cleaned[-1]):
            cleaned.append("***")
        elif separator and SECRET_NAME.search(name):
            cleaned.append(f"{name}=***")
        else:
            cleaned.append(SECRET_VALUE.sub("***", argument))
    return cleaned


def hide_secrets(value: Any, name: str = "") -> Any:
    """A nested configuration with its secrets replaced."""
    if isinstance(value, Mapping):
        return {key: hide_secrets(item, str(key)) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_secrets(item, name) for item in value]
    if isinstance(value, str) and value:
        return "***" if SECRET_NAME.search(name) else SECRET_VALUE.sub("***", value)
    return value


def git_state(root: Path) -> dict[str, Any]:
    """Commit of the checkout dirl runs from, and whether files differ from it; None when it is not its own checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        pass  # no git, or no commit yet
    return {"git_commit": None, "git_dirty": None}


def installed_version(package: str) -> str | None:
    """Version of an installed package; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware_summary() -> dict[str, Any]:
    """Processor, cores, those that a process uses, and GPUs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores, threads = os.cpu_count(), torch.get_num_threads()
    machine = {"machine": platform.machine(), "cpu_cores": cores, "threads_per_process": threads}
    return {**machine, "gpus": gpus, "cuda": torch.version.cuda}
