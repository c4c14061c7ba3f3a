"""What a loop stands in: what it logs, when it saves, where it continues."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dirl.data.prompt_stream import PromptStream
from dirl.errors import RunInterrupted, UserError
from dirl.show.terminal import Terminal
from dirl.training.distributed import Distributed
from dirl.training.interruption import SignalWatch
from dirl.training.metrics import Timings
from dirl.training.optimizer import Learner, OptimizerConfig
from dirl.training.run import Run
from dirl.training.run_state import RunConfig


def new_run(config: RunConfig, *, num_items: int = 10) -> Run:
    torch.manual_seed(0)  # the same model at every start
    learner = Learner(nn.Linear(2, 2), OptimizerConfig(max_steps=7), Distributed())
    return Run(
        config,
        {},
        {"model": learner},
        PromptStream(num_items, config.seed),
        signals=SignalWatch(),
        timings=Timings(),
        terminal=Terminal(is_main=True),
    )


def go(run: Run, until: int) -> list[int]:
    taken: list[int] = []
    with run:
        while run.step < until:
            taken += run.source.take(3)  # type: ignore[attr-defined]
            run.advance(run.step + 1)
            run.log({"number": float(run.step)}, "")
            run.save_if_due()
    return taken


def logged_steps(output_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def saved_steps(output_dir: Path) -> list[str]:
    return sorted(path.name for path in (output_dir / "checkpoints").iterdir())


def test_saves_and_logs_when_due_and_at_the_end(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=3, save_total_limit=0, logging_steps=2)
    go(new_run(config), 7)
    assert saved_steps(tmp_path) == ["step_000003", "step_000006", "step_000007"]
    assert logged_steps(tmp_path) == [2, 4, 6, 7]


def test_several_optimizer_steps_at_a_time_pass_no_multiple_unseen(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=3, save_total_limit=0, logging_steps=3)
    with new_run(config) as run:
        for step in (2, 4, 5, 7):
            run.advance(step)
            run.log({}, "")
            run.save_if_due()
    assert saved_steps(tmp_path) == ["step_000004", "step_000007"]
    assert logged_steps(tmp_path) == [4, 7]
    resumed = new_run(config)
    assert resumed.step == 7 and not resumed.is_due(3)


def test_continues_the_stream_and_forgets_lines_after_the_checkpoint(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=2)
    expected = PromptStream(10, config.seed).take(21)
    assert go(new_run(config), 5) == expected[:15]
    resumed = new_run(config)
    assert resumed.step == 4
    assert logged_steps(tmp_path) == [1, 2, 3, 4]
    assert go(resumed, 7) == expected[12:]
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert new_run(config).is_finished


def test_what_a_kill_left_of_old_checkpoints_goes_though_the_run_is_finished(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=6, save_total_limit=0)
    go(new_run(config), 7)
    (tmp_path / "checkpoints/step_000006/loop.json").unlink()  # as in the middle of prune
    assert go(new_run(config), 7) == []
    assert saved_steps(tmp_path) == ["step_000007"]


def test_none_starts_afresh(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=2)
    go(new_run(config), 4)
    assert new_run(replace(config, resume_from_checkpoint="none")).step == 0


def test_other_data_is_an_error(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=2)
    go(new_run(config), 2)
    with pytest.raises(ValueError, match="num_items=10, this run 11"):
        new_run(config, num_items=11)


def test_the_report_is_written_at_saves_and_at_the_end(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=2)
    report, seen = tmp_path / "report.html", []
    with new_run(config) as run:
        for step in range(1, 4):
            run.advance(step)
            run.log({"loss": step / 8}, "")
            run.save_if_due()
            seen.append(report.is_file())
            report.unlink(missing_ok=True)
    assert seen == [False, True, False]
    assert "0.375" in report.read_text()  # the last line, after the last save


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    config = RunConfig(
        output_dir=str(tmp_path), save_steps=2, save_total_limit=1, metric_for_best_model="eval/accuracy"
    )
    values = {2: 0.3, 3: 0.9, 5: 0.4}
    run = new_run(config)
    with run:
        while run.step < 6:
            run.advance(run.step + 1)
            run.save_if_due({"eval/accuracy": values[run.step]} if run.step in values else {})
    assert saved_steps(tmp_path) == ["step_000003", "step_000006"]
    resumed = new_run(config)  # it knows what is best
    with resumed:
        resumed.advance(7)
        resumed.save_if_due({"eval/accuracy": 0.8})
    assert saved_steps(tmp_path) == ["step_000003", "step_000007"]


def test_a_signal_ends_the_run_after_one_checkpoint(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        config = RunConfig(output_dir=str(tmp_path / str(int(number))))
        run = new_run(config)
        with pytest.raises(RunInterrupted, match=f"{number.name} at step 1"), run:
            run.advance(1)
            run.stop_if_asked()  # nothing yet
            os.kill(os.getpid(), number)
            run.stop_if_asked()
        assert saved_steps(tmp_path / str(int(number))) == ["step_000001"]
        again = new_run(config)
        assert signal.getsignal(number) is not None and not again.signals.is_stop_asked()


def test_a_signal_during_a_save_lets_it_end_and_makes_no_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(RunConfig(output_dir=str(tmp_path), save_steps=1))
    saves: list[int] = []
    save_state = run.distributed.save_state

    def interrupted(directory: Path) -> None:
        saves.append(run.step)
        os.kill(os.getpid(), signal.SIGTERM)
        save_state(directory)

    monkeypatch.setattr(run.distributed, "save_state", interrupted)
    with pytest.raises(RunInterrupted), run:
        run.advance(1)
        run.save_if_due()
        run.stop_if_asked()
    assert saves == [1] and saved_steps(tmp_path) == ["step_000001"]
    assert new_run(RunConfig(output_dir=str(tmp_path))).step == 1


def test_a_checkpoint_of_another_stage_is_refused_in_one_line(tmp_path: Path) -> None:
    config = RunConfig(output_dir=str(tmp_path), save_steps=1)
    go(new_run(config), 1)
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    state = json.loads((checkpoint / "loop.json").read_text())
    text = json.dumps({**state, "source": {"waiting": []}})
    (checkpoint / "loop.json").write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["loop.json"] = len(text)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"step_000001 does not hold what this run saves \(KeyError: .*another stage"):
        new_run(config)
