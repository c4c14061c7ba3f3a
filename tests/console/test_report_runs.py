"""`dirl report`: from the command line to a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dirl.cli import main
from dirl.model.tiny import save_tiny_model
from tests.eval.test_report import write_run as write_evaluation
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


def seeds_of(folder: Path, objective: str, *rewards: float, right: float | None = None) -> None:
    """Runs of an objective, one a reward; with `right` each has held-out scores of twenty problems of its seed."""
    for seed, reward in enumerate(rewards):
        row = rl_row(1) | {"reward": reward} | ({} if right is None else {"eval/accuracy": right})
        config = {"seed": seed, "objective": {"preset": objective}}
        run = write_run(folder / f"objective={objective},seed={seed}", [row], **config)
        if right is not None:
            shares = {f"{place} {seed}": right - 0.1 * (place % 2) for place in range(20)}
            (run / "heldout.json").write_text(json.dumps({"step": 1, "right": {"eval/accuracy": shares}}))


def test_groups_of_a_pattern_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds_of(tmp_path / "runs", "dipo", 0.5, 0.7, right=0.6)
    seeds_of(tmp_path / "runs", "espo", 0.8, 0.8, right=0.9)
    seeds_of(tmp_path / "runs", "spg", 0.1)
    (tmp_path / "runs/notes").mkdir()  # the pattern matches it too
    assert main(["report", str(tmp_path / "runs/*"), "--group-by", "objective"]) == 0
    page = tmp_path / "runs/by_objective.html"
    assert capsys.readouterr().out == f"report: {page}\n"
    final, differences, *_ = (table["rows"] for table in data_of(page.read_text())["tables"])
    assert final[0] == ["metric", "dipo", "espo", "spg"]
    assert final[1] == ["reward", "0.6 ± 0.1 (2 runs)", "0.8 ± 0 (2 runs)", "0.1 (1 run)"]
    found = {tuple(row[:2]): row[2:] for row in differences}
    assert found["metric", "group"][0] == "above dipo"
    assert found["reward", "espo"] == ["+0.2", "0.1", "no samples", "-", "-", "-"]
    assert found["reward", "spg"][:2] == ["-0.5", "one run"]
    # Every problem is 0.3 better: no resample says otherwise.
    assert found["eval/accuracy", "espo"] == ["+0.3", "0", "+0.3000 to +0.3000", "0.0002", "40", "yes"]
    assert ("eval/accuracy", "spg") not in found


def test_evaluations_are_grouped_too(tmp_path: Path) -> None:
    for name, correct in (("a", False), ("b", True)):
        directory = write_evaluation(tmp_path / name, {place: [correct, True] for place in range(10)})
        (directory / "run.json").write_text(json.dumps({"config": {"model": {"path": name}}}))
    target = tmp_path / "page.html"
    patterns = [str(tmp_path / "[ab]")]
    assert main(["report", *patterns, "--group-by", "model.path", "--output", str(target)]) == 0
    page = data_of(target.read_text())
    assert page["tables"][0]["rows"][1] == ["A dynamic", "0.5 (1 run)", "1 (1 run)"]
    assert page["tables"][1]["rows"][1][2:] == ["+0.5", "one run", "+0.5000 to +0.5000", "0.0002", "10", "yes"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["runs/*", "--group-by", "sed"], "--group-by sed: no run has such a key; keys: objective, seed"),
        (["nothing*"], "nothing*: no run matches"),
        (["runs/objective=dipo,seed=0", "empty", "--group-by", "seed"], "no metrics.jsonl and no samples.jsonl"),
    ],
)
def test_what_cannot_be_grouped_is_one_line(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds_of(tmp_path / "runs", "dipo", 0.5)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
