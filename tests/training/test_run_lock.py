"""A directory has one run at a time, and what would keep a run from writing is one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dirl.errors import UserError
from dirl.eval.eval_config import EvalConfig
from dirl.eval.evaluate import run_evaluation
from dirl.sft.train import SFTConfig, SFTTrainer
from dirl.training.distributed import Distributed
from dirl.training.run_lock import check_free, hold

HOLDER = """
import sys
from dirl.training.distributed import Distributed
from dirl.training.run_lock import hold
with hold(sys.argv[1], Distributed()):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_refused_until_the_holder_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        words = rf"output_dir={tmp_path}/run is another run's \(process {holder.pid}\)"
        with pytest.raises(UserError, match=words), hold(tmp_path / "run", Distributed()):
            pass
        with pytest.raises(UserError, match=words):
            check_free(tmp_path / "run", Distributed(), foreign=[])
        for start in (
            lambda: SFTTrainer(SFTConfig(output_dir=str(tmp_path / "run"))),
            lambda: run_evaluation(EvalConfig(output_dir=str(tmp_path / "run"))),
        ):
            with pytest.raises(UserError, match=words):  # and not that there is no model: this is found first
                start()
        holder.kill()
    with hold(tmp_path / "run", Distributed()):
        check_free(tmp_path / "run", Distributed(), foreign=[])


def test_looking_makes_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / "a/b/c", Distributed(), foreign=[])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = rf"output_dir={tmp_path}/file/run cannot be written.*; name another directory"
    with pytest.raises(UserError, match=words):
        check_free(tmp_path / "file/run", Distributed(), foreign=[])
    with pytest.raises(UserError, match=words), hold(tmp_path / "file/run", Distributed()):
        pass


def test_a_disk_that_is_read_only_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, whom no permission stops: the system says it where the directory is made or its lock is opened."""

    def refused(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    words = r"output_dir=.*run cannot be written \(Read-only file system\); name another directory"
    for method in ("mkdir", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refused)
            with pytest.raises(UserError, match=words), hold(tmp_path / "run", Distributed()):
                pass


def test_training_and_evaluation_do_not_write_into_each_other(tmp_path: Path) -> None:
    for name, start in (
        ("metrics.jsonl", lambda: run_evaluation(EvalConfig(output_dir=str(tmp_path / "sft")))),
        ("results.json", lambda: SFTTrainer(SFTConfig(output_dir=str(tmp_path / "eval")))),
    ):
        folder = tmp_path / ("sft" if name == "metrics.jsonl" else "eval")
        folder.mkdir()
        (folder / name).write_text("")
        with pytest.raises(UserError, match=rf"{folder} holds {name}, of another kind of run"):
            start()
        assert [path.name for path in folder.iterdir()] == [name]
