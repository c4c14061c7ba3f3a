"""Evaluations in processes of their own: the numbers of the loop, later; kills, failures and queues lose nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dirl.data.prompt_stream import PromptStream
from dirl.errors import RunInterrupted, UserError
from dirl.training import background
from dirl.training.background import MAX_WAITING, BackgroundConfig, BackgroundEvaluations
from dirl.training.loop import Trainer, TrainingConfig
from dirl.training.optimizer import Learner, Loss

# Does what the real program does with `Weighed`, without seconds of imports, or what a file `act` in the run says.
PROGRAM = """
import pathlib, sys, time
snapshot = pathlib.Path(sys.argv[2])
act = snapshot.parents[1] / "act"
words = act.read_text().split() if act.exists() else []
if "fail" in words and snapshot.name in words:
    raise ValueError("a held-out row lacks the column level")
if "sleep" in words:
    time.sleep(100)
(snapshot / "evaluation.json").write_text('{"eval/loss": %s}' % (snapshot / "weight").read_text())
"""


class Weighed(Trainer):
    """One number is learned, and evaluated by reading it."""

    CONFIG = TrainingConfig
    stage = "sft"
    heldout = ("something",)
    after_step: Callable[[Weighed], None] = staticmethod(lambda trainer: None)

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        torch.manual_seed(0)
        self.learner = Learner(nn.Linear(1, 1, bias=False), config, self.distributed)
        self.source = PromptStream(10, config.seed)

    def step(self) -> dict[str, float]:
        def loss() -> Loss:
            return Loss(self.learner.module(torch.ones(1, 1)).sum(), 1)

        outcome = self.learner.update([loss], loss)
        self.steps_done += 1
        self.after_step(self)
        return outcome.metrics

    def evaluate(self) -> dict[str, float]:
        return {"eval/loss": self.learner.module.weight.item()}  # type: ignore[operator, union-attr]

    def write_snapshot(self, directory: Path) -> None:
        directory.mkdir()
        (directory / "weight").write_text(repr(self.evaluate()["eval/loss"]))

    @classmethod
    def evaluate_snapshot(cls, config: Any, snapshot: Path) -> dict[str, float]:
        return {"eval/loss": float((snapshot / "weight").read_text())}

    def headline(self, metrics: Any) -> str:
        return ""

    def write_final(self) -> Path:
        final = Path(self.config.output_dir, "final")
        final.mkdir(exist_ok=True)
        return final

    def _finish(self, final: Path) -> Path:
        return final


def config(output_dir: Path, *, background: bool = True, **changes: Any) -> TrainingConfig:
    output_dir.mkdir(exist_ok=True)
    evaluation = BackgroundConfig(background=background)
    defaults: dict[str, Any] = {"learning_rate": 0.1, "max_steps": 3, "eval_steps": 1, "eval": evaluation}
    return TrainingConfig(output_dir=str(output_dir), **{**defaults, **changes})


def losses(output_dir: Path) -> dict[int, float | None]:
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row.get("eval/loss") for row in rows}


def left(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "evaluations").glob("step_*"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "_PROGRAM", PROGRAM)
    monkeypatch.setattr("dirl.training.run.refresh_report", lambda _: None)


def test_the_same_numbers_under_the_same_steps_and_the_best_is_kept(tmp_path: Path) -> None:
    """Losses fall, so that with greater_is_better the first step is the best: it must outlive two newer checkpoints."""
    best = {"metric_for_best_model": "eval/loss", "save_total_limit": 1, "save_steps": 1}
    for name in ("loop", "later"):
        Weighed(config(tmp_path / name, background=name == "later", **best)).train()
    assert losses(tmp_path / "later") == losses(tmp_path / "loop") and None not in losses(tmp_path / "later").values()
    checkpoints = sorted(path.name for path in (tmp_path / "later/checkpoints").iterdir())
    assert checkpoints == sorted(path.name for path in (tmp_path / "loop/checkpoints").iterdir())
    assert checkpoints == ["step_000001", "step_000003"]
    assert left(tmp_path / "later") == []


def test_the_program_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a file of the snapshot says, read by the trainer's class under its name, by a process that is nice."""
    place = tmp_path / "evaluations/step_000001"
    later = BackgroundEvaluations(str(tmp_path), BackgroundConfig(), Weighed, limit_seconds=0, is_main=True)
    assert later.prepare(1, config(tmp_path)) == place
    place.mkdir()
    (place / "weight").write_text("0.25")
    niceness: list[int] = []
    monkeypatch.setattr(os, "nice", niceness.append)
    monkeypatch.setattr(background, "end_with_launcher", lambda: None)
    monkeypatch.setattr(sys, "argv", ["-c", f"{__name__}:Weighed", str(place)])
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Weighed.__module__])
    background.main()
    assert json.loads((place / "evaluation.json").read_text()) == {"eval/loss": 0.25} and niceness == [10]


def test_a_failed_evaluation_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(tmp_path, max_steps=2)
    (tmp_path / "act").write_text("fail step_000001")
    Weighed(settings).train()
    found = losses(tmp_path)
    assert found[1] is None and found[2] is not None and left(tmp_path) == ["step_000001.log"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("step 1 has no evaluation, its process failed (1): ValueError: a held-out row")


def test_training_does_not_wait_and_a_run_that_goes_on_evaluates_what_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process sleeps; five steps are done all the same, of which the first and two more have snapshots."""
    said: list[str] = []
    monkeypatch.setattr("dirl.training.run.Run.say", lambda _, text: said.append(text))
    stop = staticmethod(lambda trainer: trainer.steps_done == 5 and os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(Weighed, "after_step", stop)
    settings = config(tmp_path, max_steps=6)
    (tmp_path / "act").write_text("sleep")
    start = time.monotonic()
    with pytest.raises(RunInterrupted):
        Weighed(settings).train()
    assert time.monotonic() - start < 60
    waiting = [f"step_{step:06d}" for step in range(1, 2 + MAX_WAITING)]
    assert [name for name in left(tmp_path) if "." not in name] == waiting
    assert said[-1] == "step 4 is not evaluated: 2 snapshots wait for it already"
    (tmp_path / "act").unlink()
    monkeypatch.setattr(Weighed, "after_step", staticmethod(lambda trainer: None))
    Weighed(settings).train()
    whole = config(tmp_path / "whole", background=False, max_steps=6)
    Weighed(whole).train()
    found = losses(tmp_path)
    assert found == losses(tmp_path / "whole") | {4: None} | ({5: None} if found[5] is None else {})
    assert left(tmp_path) == []


def test_what_earlier_processes_left(tmp_path: Path) -> None:
    """Steps that are done or not reached, and what was never whole, go; the rest is evaluated."""

    def open_one() -> BackgroundEvaluations:
        return BackgroundEvaluations(str(tmp_path), BackgroundConfig(), Weighed, limit_seconds=0, is_main=True)

    for step in (1, 2, 3, 9):
        open_one().prepare(step, config(tmp_path)).mkdir()
    open_one().place(4).mkdir(parents=True)  # and nothing that says how
    Path(tmp_path, "evaluations/step_000002.tmp").mkdir()
    later = open_one()
    later.restore(8, done={1})
    assert later.steps == [2, 3]
    assert left(tmp_path) == [f"step_{step:06d}{end}" for step in (2, 3) for end in ("", ".yaml")]
    others = BackgroundEvaluations(str(tmp_path), BackgroundConfig(), Weighed, limit_seconds=0, is_main=False)
    others.restore(8, done=())
    others.add(5)
    assert others.steps == []


def test_a_process_that_is_told_to_end_or_takes_too_long(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first is begun again: whoever ends a job ends all of its processes. The second is killed."""
    (tmp_path / "act").write_text("sleep")
    recorded: list[int] = []
    with BackgroundEvaluations(str(tmp_path), BackgroundConfig(), Weighed, limit_seconds=1, is_main=True) as later:
        later.prepare(1, config(tmp_path)).mkdir()
        later.add(1)
        later.collect(lambda step, _: recorded.append(step))
        first: Any = later._process
        os.kill(first.pid, signal.SIGTERM)
        first.wait()
        later.collect(lambda step, _: recorded.append(step))
        assert later.steps == [1] and later._process is not None and later._process.pid != first.pid
        time.sleep(1.1)
        later.collect(lambda step, _: recorded.append(step))
        assert later.steps == [] and recorded == []
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step 1 has no evaluation, its process failed (it took too long)" in warning


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for values, words in (
        ({"device": "cuda"}, "device must be cpu or the number of a GPU, got 'cuda'"),
        ({"device": "1"}, "device=1 is of the process that background=true starts: set it too"),
        ({"num_threads": 2}, "num_threads=2 is of the process"),
    ):
        with pytest.raises(UserError, match=words):
            BackgroundConfig(**values)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = replace(config(tmp_path), eval=BackgroundConfig(background=True, device="1"))
    with pytest.raises(UserError, match=r"eval\.device=1: there is no CUDA device; use cpu"):
        Weighed(settings)
