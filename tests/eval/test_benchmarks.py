"""Names and paths -> problems, and the paper's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dirl.data.tasks import noisy_sums_problems
from dirl.eval.benchmarks import NAMES, PAPER_TABLE, load_benchmark, load_benchmarks

REAL_DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
ROWS = [{"question": f"{i}+1=", "ground_truth_answer": str(i + 1)} for i in range(5)]
# The last column of the paper's Table 1, which PAPER_TABLE does not hold.
PUBLISHED_AVERAGES = [42.9, 49.1, 42.2, 43.3, 46.5, 46.7, 54.0, 52.8]


def write_rows(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ROWS))
    return path


@pytest.mark.parametrize("asked", ["MATH500", "math500", "Math500"])
def test_name(asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRL_DATA", str(tmp_path))
    write_rows(tmp_path / "MATH500.json")
    benchmark = load_benchmark(asked, limit=3)
    assert benchmark.name == "MATH500"
    assert [problem.answer for problem in benchmark.problems] == ["1", "2", "3"]


def test_name_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIRL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "data/eval/GSM8K.json")
    assert len(load_benchmark("GSM8K").problems) == len(ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_missing_data_names_file_and_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIRL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        load_benchmark(name)
    assert f"{tmp_path / name}.json does not exist" in str(error.value)
    assert "download.sh" in str(error.value)
    assert "\n" not in str(error.value)


def test_path_is_named_by_its_stem(tmp_path: Path) -> None:
    benchmark = load_benchmark(str(write_rows(tmp_path / "my sums.json")))
    assert (benchmark.name, len(benchmark.problems)) == ("my sums", len(ROWS))


def test_columns_are_of_paths(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"ask": "1+1=", "reply": "2"}\n')
    columns = {"question": "ask", "ground_truth_answer": "reply"}
    found, task = load_benchmarks([str(own), "task:noisy_sums"], limit=1, columns=columns)
    assert (found.problems[0].question, found.problems[0].answer) == ("1+1=", "2")
    assert task.problems == noisy_sums_problems(1, 0, "heldout")


def test_task_is_held_out() -> None:
    benchmark = load_benchmark("task:noisy_sums", limit=7, seed=3)
    assert benchmark.name == "task:noisy_sums"
    assert benchmark.problems == noisy_sums_problems(7, 3, "heldout")


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'MATH5000'; known are MATH500, GSM8K"):
        load_benchmark("MATH5000")


def test_names_must_differ(tmp_path: Path) -> None:
    paths = [str(write_rows(tmp_path / folder / "sums.json")) for folder in ("a", "b")]
    with pytest.raises(ValueError, match=r"different names, got \['sums', 'sums'\]"):
        load_benchmarks(paths)
    with pytest.raises(ValueError, match=r"one or more data sets of different names, got \[\]"):
        load_benchmarks([])


def test_paper_table_averages_are_the_published_ones() -> None:
    averages = [sum(float(cell.split("/")[0]) for cell in cells.split()) / len(NAMES) for cells in PAPER_TABLE.values()]
    assert averages == pytest.approx(PUBLISHED_AVERAGES, abs=0.1)
    assert all(len(cell.split("/")) == 3 for cells in PAPER_TABLE.values() for cell in cells.split())


@pytest.mark.parametrize(("name", "num"), [("MATH500", 500), ("GSM8K", 1319), ("OlympiadBench", 675)])
def test_real_data(name: str, num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (REAL_DATA / f"{name}.json").is_file():
        pytest.skip("the real data sets are not beside the repository")
    monkeypatch.setenv("DIRL_DATA", str(REAL_DATA))
    assert len(load_benchmark(name).problems) == num
