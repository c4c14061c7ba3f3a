"""metrics.jsonl keeps every step, exactly once and without NaN, whatever happens to the trackers."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dirl.show.metric_table import read_metrics
from dirl.training import metrics
from dirl.training.metrics import MetricsLogger, Timings


def strict_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, by a parser that refuses NaN and Infinity."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_log_writes_one_json_line_per_call(tmp_path: Path) -> None:
    log = MetricsLogger(tmp_path / "run")
    log.log({"loss": 0.5, "count": 3, "nan": float("nan"), "inf": float("-inf")}, step=1)
    # Flushed: readable before close.
    assert strict_lines(tmp_path / "run/metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "count": 3, "nan": None, "inf": None}
    ]
    log.close()


def test_resumed_run_rewrites_later_steps(tmp_path: Path) -> None:
    first = MetricsLogger(tmp_path)
    for step in range(5):
        first.log({"loss": 10.0 + step}, step)
    with first.path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    second = MetricsLogger(tmp_path)
    second.truncate_after(2)
    second.log({"loss": 23.0}, step=3)
    assert [(line["step"], line["loss"]) for line in strict_lines(first.path)] == [(0, 10), (1, 11), (2, 12), (3, 23)]


def test_torn_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2')
    MetricsLogger(tmp_path).log({"loss": 2.0}, step=2)
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("line", ["not json", '{"loss": 1.0}', "[1]", '{"step": "one"}'])
def test_foreign_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = MetricsLogger(tmp_path / "run", ["wandb"], is_main=False)
    log.log({"loss": 1.0}, step=1)
    log.truncate_after(0)
    log.close()
    assert not (tmp_path / "run").exists()
    assert log.tracker_id is None


class RecordingTracker:
    """A tracker that fails at the step named in the config."""

    made: list[RecordingTracker]

    def __init__(self, output_dir: Path, run_name: str, config: Mapping[str, Any], resume_id: str | None) -> None:
        self.run_id: str | None = resume_id or "new"
        self.fails_at = config.get("fails_at")
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False
        RecordingTracker.made.append(self)
        if self.fails_at == "start":
            raise ConnectionError("no route\nto host")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("gone")
        self.logged.append((step, dict(metrics)))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordingTracker]:
    monkeypatch.setattr(RecordingTracker, "made", [], raising=False)
    monkeypatch.setattr(metrics, "TRACKERS", {"recording": RecordingTracker})
    return RecordingTracker.made


def test_tracker_gets_the_finite_numbers(tmp_path: Path, recorded: list[RecordingTracker]) -> None:
    log = MetricsLogger(tmp_path, ["recording"], resume_id="old")
    assert log.tracker_id == "old"
    log.log({"loss": 1.0, "bad": float("nan")}, step=7)
    log.close()
    assert recorded[0].logged == [(7, {"loss": 1.0})]
    assert recorded[0].is_closed


@pytest.mark.parametrize(("fails_at", "reached"), [("start", []), (1, [0])])
def test_failing_tracker_is_warned_about_once_and_switched_off(
    fails_at: str | int,
    reached: list[int],
    tmp_path: Path,
    recorded: list[RecordingTracker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        log = MetricsLogger(tmp_path, ["recording"], config={"fails_at": fails_at})
        for step in range(4):
            log.log({"loss": 1.0}, step)
        log.close()
    assert [step for step, _ in recorded[0].logged] == reached
    assert [line["step"] for line in strict_lines(log.path)] == [0, 1, 2, 3]
    (message,) = caplog.messages
    assert "recording" in message
    assert "ConnectionError" in message
    assert "\n" not in message


def test_unknown_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"report_to: 'mlflow' .*wandb, tensorboard"):
        MetricsLogger(tmp_path, ["mlflow"])


class FakeWandb:
    """The part of wandb that is used; going online fails when it has no network."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.errors = SimpleNamespace(Error=self.Error)
        self.modes: list[str] = []
        self.logged: list[dict[str, float]] = []

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def init(self, *, mode: str, id: str | None, **_: Any) -> SimpleNamespace:
        self.modes.append(mode)
        if mode == "online":
            raise self.Error("no network")
        return SimpleNamespace(
            id=id or "made", define_metric=lambda *a, **k: None, log=self.logged.append, finish=lambda: None
        )

    def teardown(self) -> None:
        self.modes.append("teardown")


@pytest.mark.parametrize(
    ("variables", "modes"),
    [
        ({}, ["offline"]),
        ({"WANDB_API_KEY": "k"}, ["online", "teardown", "offline"]),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, ["offline"]),
    ],
)
def test_wandb_never_needs_the_network(
    variables: dict[str, str], modes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = MetricsLogger(tmp_path, ["wandb"], resume_id="abc")
    log.log({"loss": 1.0}, step=3)
    assert fake.modes == modes
    assert fake.logged == [{"loss": 1.0, "step": 3}]
    assert log.tracker_id == "abc"


def test_missing_tensorboard_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING):
        MetricsLogger(tmp_path, ["tensorboard"]).log({"loss": 1.0}, step=1)
    (message,) = caplog.messages
    assert message.startswith("tensorboard is switched off")
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.slow
def test_real_wandb_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = MetricsLogger(tmp_path, ["wandb"], resume_id="abc123", config={"seed": 1})
    assert log.tracker_id == "abc123"
    log.log({"loss": 1.0}, step=1)
    log.close()
    (record,) = tmp_path.glob("wandb/offline-run-*/run-abc123.wandb")
    assert record.stat().st_size > 0


def test_timings_add_up_and_start_again() -> None:
    now = iter([0.0, 0.0, 1.0, 10.0, 12.0, 20.0, 25.0, 30.0, 31.0])
    timings = Timings(clock=lambda: next(now))
    with timings.phase("rollout"):
        pass
    with timings.phase("rollout"):
        pass
    with pytest.raises(KeyError), timings.phase("train"):
        raise KeyError
    assert timings.drain() == {"timing_s/rollout": 3.0, "timing_s/train": 5.0}
    with timings.phase("train"):
        pass
    assert timings.drain() == {"timing_s/train": 1.0}
