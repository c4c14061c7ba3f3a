"""The one loop of all stages: what it calls when, how it ends, and what it writes down and shows."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dirl.data.prompt_stream import PromptStream
from dirl.errors import RunInterrupted, UserError
from dirl.show.terminal import Terminal
from dirl.training import run_state
from dirl.training.interruption import StopAsked
from dirl.training.loop import NothingToLearn, Trainer, TrainingConfig
from dirl.training.metrics import MetricsLogger
from dirl.training.optimizer import Learner, Loss
from dirl.training.run import Run

Act = Callable[["Toy"], None]


class Toy(Trainer):
    """Rows of ones -> one number; `acts[n]` is done in the n-th call of `step`, `calls` is what the loop asked for."""

    stage = "sft"
    heldout = ("something",)

    def __init__(self, config: TrainingConfig, acts: Mapping[int, Act] | None = None, steps_at_a_time: int = 1) -> None:
        super().__init__(config)
        torch.manual_seed(0)  # the same model at every start
        self.learner = Learner(
            nn.Linear(2, 1),
            config,
            self.distributed,
            on_micro_batch=self.show_micro_batch,
            on_skip=self.record_skipped,
        )
        self.source = self.stream = PromptStream(10, config.seed)
        self.acts, self.steps_at_a_time = dict(acts or {}), steps_at_a_time
        self.calls: list[str] = []
        self.scale = 1.0

    def begin(self) -> None:
        self.calls.append(f"begin at {self.steps_done}")

    def step(self) -> dict[str, float]:
        number = sum(call.startswith("step") for call in self.calls)
        self.calls.append(f"step {number}")
        self.acts.get(number, lambda _: None)(self)
        self.taken = self.stream.take(2)
        outcome = self.learner.update([partial(self.loss, rows) for rows in (3, 5)], partial(self.loss, 1))
        self.steps_done += self.steps_at_a_time
        return outcome.metrics | {"rows": 8.0}

    def loss(self, rows: int) -> Loss:
        return Loss(self.scale * self.learner.module(torch.ones(rows, 2)).square().sum(), rows)

    def evaluate(self) -> dict[str, float]:
        self.calls.append("evaluate")
        return {"eval/loss": 1.0 / self.steps_done}

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"{metrics['rows_per_second']:.0f} rows/s"

    def throughput(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {"rows_per_second": metrics["rows"] / metrics["timing_s/step"]}

    def record(self, run: Run) -> None:
        self.calls.append(f"record {run.step}")

    def last_documents(self) -> list[Any]:
        return [{"item": index} for index in self.taken]

    def write_final(self) -> Path:
        self.calls.append("write_final")
        final = Path(self.config.output_dir, "final")
        final.mkdir(exist_ok=True)
        return final


def config(output_dir: Path, **changes: Any) -> TrainingConfig:
    return TrainingConfig(output_dir=str(output_dir), **{"learning_rate": 1e-2, "max_steps": 4, **changes})


def logged(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def test_evaluates_when_due_and_at_the_end_and_writes_what_every_step_gave(tmp_path: Path) -> None:
    toy = Toy(config(tmp_path, eval_steps=3, save_steps=2))
    assert toy.train() == tmp_path / "final"
    first, second, third, fourth = ([f"step {n}", f"record {n + 1}"] for n in range(4))
    assert toy.calls == ["begin at 0", *first, *second, *third, "evaluate", *fourth, "write_final", "evaluate"]
    rows = logged(tmp_path)
    assert [(row["step"], row.get("eval/loss")) for row in rows] == [(1, None), (2, None), (3, 1 / 3), (4, 1 / 4)]
    assert all(row["rows_per_second"] == pytest.approx(8 / row["timing_s/step"]) for row in rows)
    assert ["timing_s/eval" in row for row in rows] == [False, False, True, True]
    assert ["timing_s/save" in row for row in rows] == [False, True, False, True]
    assert saved_steps(tmp_path) == ["step_000002", "step_000004"]
    assert (tmp_path / "final/README.md").is_file() and list((tmp_path / "plots").iterdir())


def test_several_optimizer_steps_at_a_time_are_all_counted(tmp_path: Path) -> None:
    toy = Toy(config(tmp_path, max_steps=6, eval_steps=3), steps_at_a_time=2)
    toy.train()
    assert [row["step"] for row in logged(tmp_path)] == [2, 4, 6]
    after_steps = [call for call in toy.calls if call.startswith(("record", "evaluate"))]
    assert after_steps == ["record 2", "record 4", "evaluate", "record 6", "evaluate"]


def test_a_run_goes_on_where_its_checkpoint_is_and_a_finished_one_only_writes_its_model(tmp_path: Path) -> None:
    Toy(config(tmp_path, max_steps=2)).train()
    more = Toy(config(tmp_path, max_steps=3))
    more.train()
    assert more.calls == ["begin at 2", "step 0", "record 3", "write_final", "evaluate"]
    again = Toy(config(tmp_path, max_steps=3))
    again.train()
    assert again.calls == ["begin at 3", "write_final"]
    assert [row["step"] for row in logged(tmp_path)] == [1, 2, 3]


def die_in(function_name: str, of: object, call: int, *, before: bool) -> None:
    """SIGKILL to this process before or after the call-th call of a function."""
    function, count = getattr(of, function_name), 0

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if before and count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        if not before and count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(of, function_name, counted)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("moment", "call"),
    [("log", 2), ("publish", 1), ("prune", 2), ("evaluate", 1), ("evaluate", 2), ("add", 2), ("write_final", 1)],
)
def test_every_finished_step_has_its_line_whenever_a_kill_comes(
    moment: str, call: int, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "_finish", lambda _, final: final)  # no card and no pictures
    monkeypatch.setattr("dirl.training.run.refresh_report", lambda _: None)
    settings = config(tmp_path / "parts", eval_steps=2, save_steps=2, metric_for_best_model="eval/loss")
    child = os.fork()
    if not child:
        toy = Toy(settings)
        owner: Any = {"log": MetricsLogger, "add": MetricsLogger, "publish": run_state, "prune": run_state}.get(
            moment, toy
        )
        die_in(moment, owner, call, before=before)
        toy.train()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status)
    for folder in ("parts", "whole"):
        Toy(replace(settings, output_dir=str(tmp_path / folder))).train()
    whole, parts = (
        [{name: value for name, value in row.items() if "loss" in name or name == "step"} for row in logged(path)]
        for path in (tmp_path / "whole", tmp_path / "parts")
    )
    assert parts == whole and ["eval/loss" in row for row in whole] == [False, True, False, True]
    assert saved_steps(tmp_path / "parts") == saved_steps(tmp_path / "whole")


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_evaluation_that_fails_costs_no_training(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, count = Toy(config(tmp_path, eval_steps=2)), 0
    evaluate = toy.evaluate

    def fail() -> dict[str, float]:
        nonlocal count
        count += 1
        if count == failing_call:
            raise UserError("a held-out row lacks the column level")
        return evaluate()

    monkeypatch.setattr(toy, "evaluate", fail)
    step, saved = (2, "checkpoints") if failing_call == 1 else (4, "final")
    message = f"the evaluation after step {step} failed, what is trained is in {tmp_path / saved}: a held-out row lacks"
    with pytest.raises(UserError, match=re.escape(message)):
        toy.train()
    assert (tmp_path / saved).is_dir() and logged(tmp_path)[-1]["step"] == step
    again = Toy(config(tmp_path, eval_steps=2))
    again.train()
    assert again.calls[:2] == [f"begin at {step}", "evaluate" if step == 2 else "write_final"]
    assert [row.get("eval/loss") for row in logged(tmp_path)] == [None, 1 / 2, None, 1 / 4]


def test_an_evaluation_between_two_logged_steps_is_written(tmp_path: Path) -> None:
    Toy(config(tmp_path, eval_steps=3, logging_steps=2)).train()
    assert [(row["step"], "eval/loss" in row) for row in logged(tmp_path)] == [(2, False), (3, True), (4, True)]


def test_a_finished_run_and_a_best_that_was_never_measured_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Terminal, "say", lambda _, text: said.append(text))
    settings = config(tmp_path, max_steps=1, metric_for_best_model="eval/accuracy")
    Toy(settings).train()
    assert said == []
    assert "metric_for_best_model=eval/accuracy was never logged" in caplog.text
    Toy(replace(settings, learning_rate=5e-2)).train()
    assert said == [
        "other settings than before step 1: learning_rate 0.01 -> 0.05",
        "all 1 steps are done; raise max_steps, or name another output_dir for another run",
    ]


def test_a_run_that_goes_on_longer_has_the_learning_rates_of_the_longer_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Terminal, "say", lambda _, text: said.append(text))
    longer = {"max_steps": 6, "weight_decay": 0.5, "adam_beta2": 0.9}
    Toy(config(tmp_path / "whole", **longer)).train()
    Toy(config(tmp_path / "parts", max_steps=3, learning_rate=3e-2)).train()
    assert said == []
    more = Toy(config(tmp_path / "parts", **longer))
    more.train()
    whole, parts = ([row["learning_rate"] for row in logged(tmp_path / name)] for name in ("whole", "parts"))
    assert parts[3:] == whole[3:] and min(parts[3:]) > 0
    (group,) = more.learner.optimizer.param_groups[:1]
    assert (group["weight_decay"], group["betas"]) == (0.5, (0.9, 0.9))
    assert said == [
        "other settings than before step 3: max_steps 3 -> 6, learning_rate 0.03 -> 0.01, weight_decay 0.0 -> 0.5, "
        "adam_beta2 0.999 -> 0.9"
    ]


def test_nothing_to_learn_in_the_first_step_is_an_error(tmp_path: Path) -> None:
    def give_up(_: Toy) -> None:
        raise NothingToLearn("all rewards are equal")

    with pytest.raises(NothingToLearn, match="all rewards are equal"):
        Toy(config(tmp_path), {0: give_up}).train()
    assert not (tmp_path / "final").exists()


def test_nothing_to_learn_later_ends_the_run_with_a_checkpoint_and_a_model(tmp_path: Path) -> None:
    def give_up(_: Toy) -> None:
        raise NothingToLearn("all rewards are equal")

    toy = Toy(config(tmp_path), {2: give_up})
    toy.train()
    assert toy.calls[-2:] == ["step 2", "write_final"]
    assert saved_steps(tmp_path) == ["step_000002"] and [row["step"] for row in logged(tmp_path)] == [1, 2]


def test_a_step_that_a_signal_cut_short_ends_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    def stop(toy: Toy) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert toy.signals.is_stop_asked()  # as a stage asks between two acts of a step
        raise StopAsked

    toy = Toy(config(tmp_path), {2: stop})
    with pytest.raises(RunInterrupted, match="SIGTERM at step 2"):
        toy.train()
    assert toy.calls[-1] == "step 2" and saved_steps(tmp_path) == ["step_000002"]
    resumed = Toy(config(tmp_path))
    resumed.train()
    assert resumed.calls[0] == "begin at 2" and [row["step"] for row in logged(tmp_path)] == [1, 2, 3, 4]


def test_micro_batches_and_their_tokens_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, told = Toy(config(tmp_path)), []
    monkeypatch.setattr(toy.terminal, "begin", lambda name, total: told.append((name, total)))
    monkeypatch.setattr(toy.terminal, "advance", told.append)
    toy.step()
    assert told == [("training", 2), 3, 5]


def test_a_skipped_step_writes_down_what_it_was_made_of(tmp_path: Path) -> None:
    def spoil(toy: Toy) -> None:
        toy.scale = math.nan

    def mend(toy: Toy) -> None:
        toy.scale = 1.0

    expected = PromptStream(10, 0).take(8)
    Toy(config(tmp_path), {1: spoil, 2: mend}).train()
    (line,) = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 2, "documents": [{"item": index} for index in expected[2:4]]}
    assert [row["skipped_steps"] for row in logged(tmp_path)] == [0, 1, 0, 0]


@pytest.mark.parametrize("change", [{"max_steps": 0}, {"save_steps": -1}, {"learning_rate": math.inf}], ids=str)
def test_a_joined_configuration_checks_the_keys_of_both(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))} "):
        replace(config(tmp_path), **change)


def test_a_run_that_is_waited_for_is_not_stuck(tmp_path: Path) -> None:
    """Loading before it, and a tracker that takes its time after it, are no phases that hang."""
    toy = Toy(replace(config(tmp_path), phase_timeout=1))
    time.sleep(1.3)  # the model loads, or a notebook is left alone
    toy.train()
    assert "write_final" in toy.calls


def test_a_run_that_was_stopped_goes_on_in_the_same_process(tmp_path: Path) -> None:
    def stop(_: Toy) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    toy = Toy(config(tmp_path), {1: stop})
    with pytest.raises(RunInterrupted):
        toy.train()
    assert not toy.signals.is_stop_asked()
    toy.train()
    assert "write_final" in toy.calls
