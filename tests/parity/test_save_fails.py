"""A disk that is full at a save, and files that are cut or damaged afterwards: the run goes on bit for bit."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from dirl.errors import UserError
from dirl.model.checkpoint import load
from dirl.training.run_state import newest_checkpoint
from tests.parity.test_interruption import numbers, sft_trainer


def train(output_dir: Path) -> None:
    sft_trainer(output_dir, save_steps=2).train()


def test_a_full_disk_and_a_truncated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole")
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
    train(tmp_path / "full")
    assert numbers(tmp_path / "full") == numbers(tmp_path / "whole")
    weights, expected = (load(str(tmp_path / name / "final"))[0].state_dict() for name in ("full", "whole"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)

    newest = tmp_path / "full/checkpoints/step_000004"
    for file in [path for path in newest.rglob("*") if path.is_file()]:  # weights, optimizer, RNG, loop, manifest
        data = file.read_bytes()
        middle = len(data) // 2
        for damaged in (data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
            file.write_bytes(damaged)
            assert newest_checkpoint(tmp_path / "full") == newest.with_name("step_000002"), file
        file.write_bytes(data)
    assert newest_checkpoint(tmp_path / "full") == newest
