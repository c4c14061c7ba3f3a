"""Whatever is shown is written whole: people open these files while a run goes on, and a disk may be full."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dirl.eval.accuracy_picture import plot_accuracy, sweep_points
from dirl.eval.report import write_report as write_evaluation
from dirl.show.model_card import MARK, write_model_card
from dirl.show.pictures import plot_run
from dirl.show.report.write import write_report
from dirl.show.trajectory_picture import plot_trajectory
from tests.eval.test_report import RESULT, RUN
from tests.show.report.run_files import rl_row, write_run
from tests.show.test_completions import HAND_MADE

RECORD = {**RUN, "date": "today", "config": {**RUN["config"], "output_dir": "x"}}
WRITERS: dict[str, Callable[[Path], object]] = {
    "report.html": write_report,
    "README.md": lambda run: write_model_card(run, run, "rl", ("block-diffusion", "sdar")),
    "plots/loss.png": plot_run,
    "trajectory.png": lambda run: plot_trajectory(HAND_MADE, run / "trajectory.png"),
    "plots/thresholds.png": lambda run: plot_accuracy([RESULT], run / "plots/thresholds.png", sweep_points, "speed"),
    "results.json": lambda run: write_evaluation(run, "m", [RESULT], run / "run.json"),
    "report.md": lambda run: write_evaluation(run, "m", [RESULT], run / "run.json"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_what_was_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [rl_row(1)])
    (run / "run.json").write_text(json.dumps(RECORD))
    target = run / name
    target.parent.mkdir(exist_ok=True)
    target.write_text(MARK)
    forced: list[str] = []

    def full(descriptor: int) -> None:
        forced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if Path(forced[-1]).name.startswith(target.name):
            raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](run)
    assert target.read_text() == MARK and not list(run.rglob("*.tmp"))
    assert forced[-1] == f"{target}.tmp"
