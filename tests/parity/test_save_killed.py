"""SIGKILL after each file of a real checkpoint, a truncated file, a full disk: the run goes on bit for bit.

This file is also the script: `test_save_killed.py OUT KIND` forks a trainer for each moment of its second save.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors_torch

from dirl.errors import UserError
from dirl.model.checkpoint import load
from dirl.training.run_state import newest_checkpoint
from tests.parity.test_interruption import numbers, rl_trainer, sft_trainer

ROOT = Path(__file__).parents[2]
MAKE = {"sft": sft_trainer, "rl": rl_trainer}


def act_after_file(number: int, act: Any) -> None:
    """Call `act` when the number-th file of a checkpoint (counted from 1 over the run) has been written."""
    count = 0

    def counted(function: Any) -> Any:
        def write(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            result = function(*arguments, **named)
            count += 1
            if count == number:
                act()
            return result

        return write

    torch.save = counted(torch.save)
    safetensors_torch.save_file = counted(safetensors_torch.save_file)
    for name in ("write_text", "replace"):  # the latter ends a file that is written whole
        setattr(Path, name, counted_in_checkpoints(getattr(Path, name), counted))


def counted_in_checkpoints(function: Any, counted: Any) -> Any:
    return lambda path, *given, **named: (counted(function) if "checkpoints" in path.parts else function)(
        path, *given, **named
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_forks(output_dir: Path, kind: str) -> None:
    """Fork after fork: killed after file n of all that two saves write, then resumed in a fork of its own."""
    for number in range(1, 100):
        folder = output_dir / f"killed_{number:02d}"
        status = fork(lambda n=number, f=folder: (act_after_file(n, die), train(f, kind)))  # type: ignore[misc]
        if os.WIFEXITED(status):  # no such file: the run came to its end
            assert os.WEXITSTATUS(status) == 0 and number > 8
            (output_dir / "moments").write_text(str(number - 1))
            return
        assert fork(lambda f=folder: train(f, kind)) == 0  # type: ignore[misc]


def fork(act: Any) -> int:
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        act()
        os._exit(0)
    finally:
        os._exit(1)


def train(output_dir: Path, kind: str) -> None:
    MAKE[kind](output_dir, save_steps=2).train()


@pytest.mark.parametrize("kind", ["sft", pytest.param("rl", marks=pytest.mark.matrix)])
def test_killed_after_each_file(kind: str, tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), kind]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    moments = int((tmp_path / "moments").read_text())
    train(tmp_path / "whole", kind)
    expected = load(str(tmp_path / "whole/final"))[0].state_dict()
    for number in range(1, moments + 1):
        folder = tmp_path / f"killed_{number:02d}"
        assert numbers(folder) == numbers(tmp_path / "whole"), number
        weights = load(str(folder / "final"))[0].state_dict()
        assert all(torch.equal(weights[name], expected[name]) for name in expected), number
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def test_a_full_disk_and_a_truncated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole", "sft")
    trainer = sft_trainer(tmp_path / "full", save_steps=2)
    save_state = trainer.distributed.save_state

    def full_disk(directory: Path) -> None:
        if trainer.steps_done == 4:
            (directory / "half").write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_state(directory)

    monkeypatch.setattr(trainer.distributed, "save_state", full_disk)
    with pytest.raises(UserError, match=r"step_000004 cannot be written: .*No space left"):
        trainer.train()
    assert [path.name for path in (tmp_path / "full/checkpoints").iterdir()] == ["step_000002"]
    train(tmp_path / "full", "sft")
    assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")

    newest = tmp_path / "full/checkpoints/step_000004"
    for file in [path for path in newest.rglob("*") if path.is_file()]:  # weights, optimizer, RNG, loop, manifest
        data = file.read_bytes()
        middle = len(data) // 2
        for damaged in (data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
            file.write_bytes(damaged)
            assert newest_checkpoint(tmp_path / "full") == newest.with_name("step_000002"), file
        file.write_bytes(data)
    assert newest_checkpoint(tmp_path / "full") == newest
    (newest / "model.safetensors").write_bytes(b"damaged")
    train(tmp_path / "full", "sft")  # from step 2 again
    assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")
    expected = load(str(tmp_path / "whole/final"))[0].state_dict()
    weights = load(str(tmp_path / "full/final"))[0].state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


if __name__ == "__main__":
    run_forks(Path(sys.argv[1]), sys.argv[2])
