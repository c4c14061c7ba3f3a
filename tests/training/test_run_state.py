"""Checkpoints are complete or invisible, whatever interrupts them; run.json says what ran and keeps secrets out."""

from __future__ import annotations

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dirl.errors import UserError
from dirl.training import run_state
from dirl.training.run_state import (
    RunConfig,
    checkpoint_step,
    git_state,
    newest_checkpoint,
    resolve_resume,
    save_checkpoint,
    write_run_json,
)


def writer(text: str) -> Callable[[Path], None]:
    """Fills a checkpoint with two files, one of them in a folder."""

    def write(folder: Path) -> None:
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "weights").write_text(text * 100)
        (folder / "state").write_text(text)

    return write


def save(output_dir: Path, step: int, write: Callable[[Path], None] | None = None, limit: int = 2) -> Path:
    return save_checkpoint(
        output_dir, step, write or writer(str(step)), limit=limit, is_main=True, barrier=lambda: None
    )


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def test_checkpoint_lists_its_files_with_their_sizes(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    assert path == tmp_path / "checkpoints/step_000010"
    assert checkpoint_step(path) == 10
    manifest = json.loads((path / "manifest.json").read_text())
    files = {"model/weights": [200, f"{zlib.crc32(b'10' * 100):08x}"], "state": [2, f"{zlib.crc32(b'10'):08x}"]}
    assert manifest == {"step": 10, "files": files}
    assert newest_checkpoint(tmp_path) == path


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    for step in (9, 10, 11, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step_000011", "step_000100"]
    for step in (200, 300):
        save(tmp_path, step, limit=0)
    assert names(tmp_path) == ["step_000011", "step_000100", "step_000200", "step_000300"]
    save(tmp_path, 1_000_000, limit=1)
    assert names(tmp_path) == ["step_1000000"]


def test_steps_of_a_run_that_was_given_up_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 50)
    save(tmp_path, 100)
    new = save(tmp_path, 10)  # a fresh run in the same directory
    assert newest_checkpoint(tmp_path) == new
    assert names(tmp_path) == ["step_000010"]


def test_prune_counts_complete_checkpoints_and_leaves_foreign_files(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (save(tmp_path, 20) / "state").write_text("longer than before")
    (tmp_path / "checkpoints/step_000005.backup").mkdir()
    save(tmp_path, 30)
    assert names(tmp_path) == ["step_000005.backup", "step_000010", "step_000030"]


def test_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 10, writer("a"))
    path = save(tmp_path, 10, writer("b"))
    assert (path / "state").read_text() == "b"
    assert names(tmp_path) == ["step_000010"]


def test_failed_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    previous = save(tmp_path, 10, limit=1)

    def disk_full(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"step_000020 cannot be written: .*No space left.*; make room"):
        save(tmp_path, 20, disk_full, limit=1)
    assert newest_checkpoint(tmp_path) == previous
    assert names(tmp_path) == ["step_000010"]  # and the disk has its space back


@pytest.mark.parametrize("stage", ["seal", "publish"])
def test_failure_after_the_write_leaves_the_previous_checkpoint(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    previous = save(tmp_path, 10, limit=1)

    def disk_full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_state, stage, disk_full)
    with pytest.raises(UserError, match=r"step_000020 cannot be written: .*No space left.*; make room"):
        save(tmp_path, 20, limit=1)
    assert newest_checkpoint(tmp_path) == previous
    assert names(tmp_path) == ["step_000010"]


KILLED = """
import os, sys
from pathlib import Path
from dirl.training import run_state

def die(*_):
    os._exit(9)

def write(folder):
    (folder / "state").write_text("new")

owner, name = {"write": (None, ""), "manifest": (run_state, "seal"), "rename": (run_state, "publish"),
               "replace": (Path, "rename"), "prune": (run_state, "prune")}[sys.argv[2]]
if sys.argv[2] == "write":
    write = die
elif sys.argv[2] == "replace":
    real = Path.rename
    Path.rename = lambda path, target: die() if path.name.endswith(".tmp") else real(path, target)
else:
    setattr(owner, name, die)
run_state.save_checkpoint(sys.argv[1], int(sys.argv[3]), write, limit=1, is_main=True, barrier=lambda: None)
"""


@pytest.mark.parametrize(
    ("moment", "step", "survivor"),
    [
        ("write", 20, "step_000010"),
        ("manifest", 20, "step_000010"),
        ("rename", 20, "step_000010"),
        ("replace", 10, "step_000010.old"),
        ("prune", 20, "step_000020"),
    ],
)
def test_kill_at_any_moment_leaves_a_complete_checkpoint(
    moment: str, step: int, survivor: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 10, writer("old"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), moment, str(step)])
    assert killed.returncode == 9
    with caplog.at_level(logging.WARNING):
        newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "checkpoints" / survivor
    assert (newest / "state").read_text() == ("new" if survivor == "step_000020" else "old")
    leftovers = [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert len(caplog.messages) == len(leftovers) <= 1
    # The next save cleans up.
    save(tmp_path, 30, limit=1)
    assert names(tmp_path) == ["step_000030"]


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_checkpoint_of_before_there_were_digests_is_taken(tmp_path: Path) -> None:
    manifest = save(tmp_path, 10) / "manifest.json"
    manifest.write_text(json.dumps({"step": 10, "files": {"model/weights": 200, "state": 2}}))
    assert newest_checkpoint(tmp_path) == manifest.parent


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "missing", "no manifest", "manifest cut short", "manifest of a list"]
)
def test_damaged_checkpoint_is_passed_over_with_one_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = save(tmp_path, 9)
    bad = save(tmp_path, 10)
    manifest = bad / "manifest.json"
    if damage == "truncated":
        os.truncate(bad / "model/weights", 100)
    elif damage == "flipped":
        flip_bit(bad / "model/weights")
    elif damage == "missing":
        (bad / "state").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "manifest cut short":
        os.truncate(manifest, manifest.stat().st_size - 3)
    else:
        manifest.write_text("[]")
    (tmp_path / "checkpoints/step_000011.tmp").mkdir()
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == good
    (message,) = caplog.messages
    assert "step_000010" in message
    assert "step_000011.tmp" in message


def test_ranks_write_between_the_same_barriers(tmp_path: Path) -> None:
    """The directory exists before any rank writes, and the manifest sees the files of all."""

    gate = threading.Barrier(2, timeout=10)

    def barrier() -> None:
        gate.wait()

    def rank(index: int) -> None:
        def write(folder: Path) -> None:
            (folder / f"rank{index}").write_text("x" * index)

        save_checkpoint(tmp_path, 5, write, limit=2, is_main=index == 0, barrier=barrier)
        seen[index] = newest_checkpoint(tmp_path)

    seen: dict[int, Path | None] = {}
    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = tmp_path / "checkpoints/step_000005"
    assert seen == {0: path, 1: path}
    assert json.loads((path / "manifest.json").read_text())["files"] == {
        "rank0": [0, "00000000"],
        "rank1": [1, f"{zlib.crc32(b'x'):08x}"],
    }


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"files": {"state": []}}', '{"files": {"state": [5]}}', "[]", "\0"]
)
def test_a_manifest_of_another_form_is_damaged(content: str, tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    (second / "manifest.json").write_text(content)
    assert newest_checkpoint(tmp_path) == first


def test_resolve_resume(tmp_path: Path) -> None:
    def config(choice: str) -> RunConfig:
        return RunConfig(output_dir=str(tmp_path), resume_from_checkpoint=choice)

    assert resolve_resume(config("auto")) is None
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    assert resolve_resume(config("auto")) == second
    assert resolve_resume(config("none")) is None
    assert resolve_resume(config(str(first))) == first
    flip_bit(first / "state")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint=.*step_000001: not a whole .*: state is damaged"):
        resolve_resume(config(str(first)))
    moved = second.rename(tmp_path / "copy")
    with pytest.raises(ValueError, match="step_<number>"):
        resolve_resume(config(str(moved)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("output_dir", ""),
        ("seed", -1),
        ("seed", 2**32),
        ("save_steps", -1),
        ("save_total_limit", -1),
        ("logging_steps", 0),
        ("resume_from_checkpoint", ""),
        ("report_to", ["mlflow"]),
        ("metric_for_best_model", "eval_loss"),
    ],
)
def test_config_names_the_bad_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key}\b"):
        RunConfig(**{"output_dir": "out", key: value})


def test_run_json_says_what_ran_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["abc-secret-1", "abc-secret-2", "hf_" + "a" * 30, "user:pass", "abc-secret-3"]
    argv = ["dirl", "rl", f"hub.hf_token={secrets[0]}", "--api-key", secrets[1], f"note={secrets[2]}"]
    argv += [f"url=https://{secrets[3]}@mirror/x", "model.mask_token_id=7", "--fast", "max_tokens=3"]
    monkeypatch.setattr(sys, "argv", argv)
    config = {"hub": {"password": secrets[4], "mask_token": "<|MASK|>"}, "list": [secrets[2]], "seed": 1}
    path = write_run_json(tmp_path / "run", config, {"parameters": 5})
    text = path.read_text()
    assert [secret for secret in secrets if secret in text] == []
    record = json.loads(text)
    assert record["argv"][:2] == ["dirl", "rl"]
    assert {"model.mask_token_id=7", "--fast", "max_tokens=3", "url=https://***@mirror/x"} <= set(record["argv"])
    assert record["config"] == {"hub": {"password": "***", "mask_token": "<|MASK|>"}, "list": ["***"], "seed": 1}
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["cpu_cores"] == os.cpu_count()
    assert record["hardware"]["threads_per_process"] == torch.get_num_threads() and record["model"] == {"parameters": 5}
    assert os.uname().nodename not in text.replace(str(tmp_path), "")
    assert path.name == "run.json"
    assert [other.name for other in path.parent.iterdir()] == ["run.json"]


def test_git_state_is_of_the_own_checkout_only(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    nothing = {"git_commit": None, "git_dirty": None}
    assert git_state(tmp_path) == nothing
    git("init")
    assert git_state(tmp_path) == nothing  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    assert git_state(tmp_path) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": False}
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path)["git_dirty"] is True
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") == nothing
