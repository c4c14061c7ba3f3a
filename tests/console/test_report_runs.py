"""`dirl report`: from the command line to a page."""

from __future__ import annotations

from pathlib import Path

import pytest

from dirl.cli import main
from dirl.model.tiny import save_tiny_model
from tests.show.report.run_files import completion_row, rl_row, sft_row, write_run
from tests.show.report.test_write import data_of


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a run", [rl_row(1)])
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run}/report.html\n"
    assert len(data_of((run / "report.html").read_text())["runs"]) == 1


def test_two_runs_and_a_place(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, [row(1)]) for name, row in (("rl", rl_row), ("sft", sft_row))]
    target = tmp_path / "new folder" / "both.html"
    assert main(["report", *map(str, runs), "--output", str(target)]) == 0
    assert len(data_of(target.read_text())["runs"]) == 2


def test_older_completions_are_read_with_the_runs_tokenizer(tmp_path: Path) -> None:
    bare = completion_row(0, 1.0, token_texts=None, block_length=0, token_ids=[19, 10, 18, 28, *[258] * 6])
    run = write_run(tmp_path / "run", [rl_row(1)], {1: [bare]})
    save_tiny_model(run / "final")  # its config says blocks of 4
    assert main(["report", str(run)]) == 0
    (sample,) = data_of((run / "report.html").read_text())["runs"][0]["samples"]
    assert sample["texts"][:4] == ["4", "+", "3", "="] and sample["block_length"] == 4


def test_no_run_is_an_error_of_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dirl: error: ") and "no metrics to report" in error and error.count("\n") == 1
