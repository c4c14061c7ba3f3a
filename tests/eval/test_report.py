"""Results -> report, and the comparison of two runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dirl.cli import main
from dirl.eval.estimates import paired_bootstrap
from dirl.eval.report import compare_runs, report_text
from dirl.eval.results import ModeResult, Sample
from dirl.eval.sample_store import SampleStore
from dirl.rollout.engine import Completion

RESULT = ModeResult(
    dataset="MATH500",
    mode="dynamic",
    temperature=1.0,
    confidence_threshold=0.9,
    num_problems=500,
    num_samples=4,
    avg_at_k=0.8312,
    pass_at_k={"1": 0.8312, "2": 0.88, "4": 0.91},
    maj_at_k=0.86,
    standard_error=0.0123,
    standard_error_sampling=0.0046,
    tokens_per_step=2.04,
    tokens_per_step_mean=2.17,
    output_length_mean=2000.66,
    output_length_p50=1500,
    output_length_p95=7000,
    truncated=0.021,
    no_answer=0.033,
    tokens_per_s=1234.5,
    seconds=10.0,
)
RUN: dict[str, Any] = {
    "config": {"engine": {"approximate_cache": "none"}},
    "git_commit": "abc",
    "git_dirty": False,
    "versions": {"dirl": "0.1", "torch": "2.9"},
    "hardware": {"machine": "x86_64", "cpu_cores": 2, "gpus": []},
}
COMPLETION = Completion(
    prompt_ids=[1],
    token_ids=[2],
    step_map=[1],
    logprobs=None,
    completion_length=1,
    finish_reason="stop",
    num_denoising_steps=1,
    text="",
)


def cells_of(text: str, first: str) -> list[str]:
    """The cells of the table row whose first cell is `first`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_layout_of_the_papers_table() -> None:
    results = [RESULT, replace(RESULT, dataset="GSM8K", avg_at_k=0.93), replace(RESULT, mode="static", avg_at_k=0.85)]
    text = report_text("my model", results, run=RUN, pictures={})
    assert cells_of(text, "model") == ["MATH500", "GSM8K", "average"]
    assert cells_of(text, "my model dynamic") == ["83.1/2.0/2000.7", "93.0/2.0/2000.7", "88.0"]
    assert cells_of(text, "my model static") == ["85.0/2.0/2000.7", "", ""]  # no average over what is missing
    assert cells_of(text, "DiRL-8B-Instruct static (paper)") == ["85.1/1.0/1917.2", "93.1/1.0/707.4", "89.1"]
    assert "plots/" not in text


def test_details() -> None:
    text = report_text("my model", [RESULT], run=RUN, pictures={"plots/thresholds.png": "a caption"})
    (line,) = [line for line in text.splitlines() if line.startswith("| MATH500 |")]
    for shown in ("83.1 ± 1.2 ± 0.5", "86.0", "1: 83.1, 2: 88.0, 4: 91.0", "2.04, 2.17", "1500/7000", "2.1", "3.3"):
        assert f"| {shown} |" in line
    for defined in ("accuracy", "tokens per step", "mean of ratios", "length", "pass@k", "maj@k", "truncated"):
        assert f"**{defined}**" in text
    assert "![a caption](plots/thresholds.png)" in text
    assert "Commit abc; PyTorch 2.9 on 2 CPU cores (x86_64)." in text


def test_where_the_numbers_come_from() -> None:
    hardware = {**RUN["hardware"], "gpus": ["H200", "H200"]}
    unclean = {**RUN, "git_dirty": True, "hardware": hardware}
    text = report_text("m", [RESULT], run=unclean, pictures={})
    assert "Commit abc with uncommitted changes; PyTorch 2.9 on H200, H200." in text and "approximate" not in text
    cached = {**RUN, "config": {"engine": {"approximate_cache": "dual"}}}
    text = report_text("m", [RESULT], run=cached, pictures={})
    assert "(x86_64). Decoded over an approximate cache (engine.approximate_cache=dual)." in text
    text = report_text("m", [RESULT], run={**RUN, "git_commit": None, "git_dirty": None}, pictures={})
    assert "Commit dirl 0.1, no git checkout; PyTorch" in text


def test_rows_of_a_table_are_equally_wide() -> None:
    lines = report_text("my model", [RESULT], run=RUN, pictures={}).splitlines()
    for head, row in (("| model |", "| DiRL-8B-Instruct dynamic (paper) |"), ("| data set |", "| MATH500 |")):
        widths = [line.count("|") for line in lines if line.startswith((head, row))]
        assert len(widths) == 2
        assert widths[0] == widths[1]


def test_no_paper_rows_for_other_data_sets() -> None:
    text = report_text("my model", [replace(RESULT, dataset="task:noisy_sums")], run=RUN, pictures={})
    assert "(paper)" not in text


def write_run(directory: Path, correct: dict[int, list[bool]], *, mode: str = "dynamic", digest: str = "a") -> Path:
    samples = [
        Sample(problem, sample, is_right, "1", 1, 1, "stop", 0.0)
        for problem, values in correct.items()
        for sample, is_right in enumerate(values)
    ]
    store = SampleStore(directory, {"problems.A": digest, "model.weights": str(directory)})
    store.append("A", mode, [(sample, COMPLETION) for sample in samples])
    return directory


def test_two_runs_are_compared_problem_by_problem(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {i: [i % 2 == 0, False] for i in range(40)})
    b = write_run(tmp_path / "b", {i: [i % 2 == 0] for i in reversed(range(40))})
    write_run(tmp_path / "b", {0: [True]}, mode="static")  # a has no such mode
    (comparison,) = compare_runs(a, b)
    assert (comparison.dataset, comparison.mode, comparison.num_problems) == ("A", "dynamic", 40)
    assert (comparison.accuracy_a, comparison.accuracy_b) == (0.25, 0.5)
    in_order = paired_bootstrap([0.5, 0.0] * 20, [1.0, 0.0] * 20)
    assert comparison.difference == in_order  # b was written back to front
    assert in_order.is_significant


def test_runs_on_other_problems_are_not_compared(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", {0: [True], 1: [True]})
    with pytest.raises(ValueError, match="hold other problems of A"):
        compare_runs(a, write_run(tmp_path / "b", {0: [True], 2: [True]}))
    with pytest.raises(ValueError, match="hold other problems of A"):
        compare_runs(a, write_run(tmp_path / "c", {0: [True], 1: [True]}, digest="other"))
    with pytest.raises(ValueError, match="share no data set and mode"):
        compare_runs(a, write_run(tmp_path / "d", {0: [True], 1: [True]}, mode="static"))


def test_two_runs_are_compared_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", {i: [i % 2 == 0, False] for i in range(40)})
    b = write_run(tmp_path / "b", {i: [i % 2 == 0] for i in range(40)})
    assert main(["report", "compare", str(a), str(b)]) == 0
    cells = cells_of(capsys.readouterr().out, "A")
    assert cells[:5] == ["dynamic", "40", "25.0", "50.0", "+25.0"]
    assert cells[-1] == "yes"
    assert main(["report", "compare", str(b), str(b)]) == 0
    assert cells_of(capsys.readouterr().out, "A")[-1] == "no"


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", {0: [True]})
    for words, message in (
        (["compare", str(a)], "expected the directories of two evaluations"),
        (
            ["compare", str(a), str(tmp_path)],
            f"{tmp_path} holds no samples.jsonl; give the output_dir of an evaluation",
        ),
        (["compare", str(a), str(write_run(tmp_path / "b", {1: [True]}))], "hold other problems of A"),
    ):
        assert main(["report", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("dirl: error: ") and message in line
