"""The report as a file: self-contained, small, safe, and never the end of a run."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest

from dirl.errors import UserError
from dirl.show.report.page import build_page, embed_json
from dirl.show.report.write import refresh_report, write_report
from tests.show.report.run_files import HOSTILE, completion_row, rl_row, sft_row, write_run


def data_of(page: str) -> dict[str, Any]:
    """What the page's script will read."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_a_run_in_one_file(tmp_path: Path) -> None:
    rows = [rl_row(step) for step in range(1, 21)]
    run = write_run(tmp_path / "run", rows, {10: [completion_row(0, 1.0)]}, max_steps=40, model={"path": "m"})
    path = write_report([run])
    assert path == run / "report.html" and not list(run.glob("*.tmp"))
    page = path.read_text()
    (shown,) = data_of(page)["runs"]
    assert ["step", "20 of 40"] in shown["tiles"]
    assert shown["config"] == "max_steps: 40\nmodel:\n  path: m\n"
    assert ["versions: torch", "2"] in shown["environment"] and ["argv", "dirl rl"] in shown["environment"]
    assert len(shown["samples"]) == 1 and len(shown["charts"]) >= 12
    assert not re.search(r"""(src|href|url|@import)\s*[=(]\s*["']?\s*(https?:)?//""", page)


def test_two_runs_name_what_differs(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [rl_row(1)], beta=0.1, model={"path": "m"})
    b = write_run(tmp_path / "b", [sft_row(1)], model={"path": "m"}, seed=2)
    path = write_report([a, b])
    assert path.parent == a and path.name.startswith("report_and_") and path.name.endswith("_b.html")
    data = data_of(path.read_text())
    assert [run["name"].split("/")[-1] for run in data["runs"]] == ["a", "b"]
    assert data["differences"] == [["beta", "0.1", "(not set)"], ["seed", "(not set)", "2"]]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / seed / "x" / "rl", [rl_row(1)]) for seed in ("one", "two")]
    names = [run["name"] for run in data_of(write_report(runs).read_text())["runs"]]
    assert names == ["one/x/rl", "two/x/rl"]


def test_two_thousand_steps_stay_small_and_quick(tmp_path: Path) -> None:
    long = completion_row(0, 1.0, token_texts=["token "] * 8000, step_map=[1] * 8000, logprobs=[-0.1] * 8000)
    long |= {"token_ids": [1] * 8000, "completion_length": 8000}
    completions = {step: [long | {"reward": float(i)} for i in range(4)] for step in range(250, 2001, 250)}
    run = write_run(tmp_path / "run", [rl_row(step) for step in range(1, 2001)], completions)
    start = time.process_time()
    path = write_report([run])
    assert time.process_time() - start < 10  # about 1 s on a quiet core
    assert path.stat().st_size < 5_000_000


def test_texts_cannot_leave_the_data_block(tmp_path: Path) -> None:
    hostile = completion_row(0, 1.0, question=HOSTILE, answer=HOSTILE, token_texts=[HOSTILE] * 10)
    run = write_run(tmp_path / "run", [rl_row(1)], {1: [hostile]}, run_name=HOSTILE + "{{script}}")
    page = write_report([run]).read_text()
    assert page.count("</script>") == 2 == page.count("<script")  # the data and the page's own
    (shown,) = data_of(page)["runs"]
    assert shown["samples"][0]["question"] == HOSTILE and shown["samples"][0]["texts"] == [HOSTILE] * 10
    assert "{{script}}" in shown["config"]


def test_embedded_json_is_exact_and_inert() -> None:
    value = {"<&>": ["</script>", "<!--", "\ud800 alone", "\u2028", 'quote " \\ slash']}
    text = embed_json(value)
    assert json.loads(text) == value and text.isascii() and not set(text) & set("<>&")
    with pytest.raises(ValueError, match="Out of range float"):
        embed_json([float("nan")])


def test_a_title_is_escaped() -> None:
    assert "<title>&lt;b&gt;</title>" in build_page("<b>", {"samples": []})


def test_a_directory_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: no metrics to report; give the output_dir"):
        write_report([tmp_path])
    with pytest.raises(UserError, match="name at least one run directory"):
        write_report([])


def test_one_directory_needs_no_list_and_a_folder_gets_the_usual_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [rl_row(step) for step in range(1, 4)])
    assert write_report(str(run)) == run / "report.html"
    assert write_report(run, tmp_path) == tmp_path / "report.html"


def test_a_report_that_fails_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = write_run(tmp_path / "run", [rl_row(1)])
    (run / "run.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        refresh_report(run)
    assert "training goes on: JSONDecodeError" in caplog.text and not (run / "report.html").exists()
