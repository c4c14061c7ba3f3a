"""Files -> rows -> problems: every format gives the same problems, and a bad file or row is one clear line."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import Table, parquet

from dirl.data.conversations import count_documents
from dirl.data.problem_sources import load_problems
from dirl.data.problems import Problem, problem_from_row
from dirl.data.rows import DataError
from dirl.errors import UserError

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
ROWS = [{"question": f"{n} + ü?", "ground_truth_answer": str(n), "level": "easy"} for n in range(3)]
PROBLEMS = [Problem(row["question"], row["ground_truth_answer"], {"level": "easy"}) for row in ROWS]


def write_rows(file: Path) -> None:
    if file.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(ROWS), file)
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif file.suffix == ".json":
        file.write_text(json.dumps(ROWS), encoding="utf-8-sig")  # with the byte order mark some editors leave
    else:
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_format_gives_the_same_problems(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    write_rows(file)
    assert load_problems(str(file)) == PROBLEMS
    assert load_problems(str(file), limit=2, seed=7) == PROBLEMS[:2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"{}", "expected an array"),
        ("a.json", b"", "not valid JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "named .jsonl"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b"\xff\xfe[]", "not UTF-8 text"),
        ("a.jsonl", b'{"question": "q", "ground_truth_answer": "1"}\n\xff\n', "not UTF-8 text"),
        ("a.parquet", b"no parquet", "not a readable parquet file"),
        ("a.txt", b"x", "'.txt'; expected one of .json"),
        ("a.csv", b"question,answer,question\n1,2,3\n", "2 columns are named 'question'; rename or remove all but one"),
    ],
)
def test_unusable_files_are_one_line_naming_the_file(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    for skip_bad_rows in (False, True):
        with pytest.raises(DataError) as caught:
            load_problems(str(file), skip_bad_rows=skip_bad_rows)
        assert str(file) in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("absent.json", "data file absent.json does not exist"),
        ("a/b/c", "data file a/b/c does not exist"),
        (".", "is a directory"),
        ("task:absent", "unknown task 'absent' .* noisy_sums"),
    ],
)
def test_missing_paths(path: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_problems(path)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(name: str, configuration: str | None, *, split: str, revision: str | None) -> None:
        asked.append((name, configuration, split, revision))
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    for path in ("owner/name:main", "owner/name", "owner/name:main@refs/pr/1", "owner/name@v1.0"):
        with pytest.raises(DataError, match=f"{path} is no local file, .* no route to the hub"):
            load_problems(path, split="test")
    assert asked == [
        ("owner/name", "main", "test", None),
        ("owner/name", None, "test", None),
        ("owner/name", "main", "test", "refs/pr/1"),
        ("owner/name", None, "test", "v1.0"),
    ]


def test_rows_of_the_hub_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, split, revision: {"test": ROWS}[split])
    assert load_problems("owner/name", split="test") == PROBLEMS


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"question": "q", "reply": "1"}', "columns question, reply; expected question and ground_truth_answer"),
        ('{"question": " ", "ground_truth_answer": "1"}', "question=' '"),
        ('{"question": ["q"], "ground_truth_answer": "1"}', "the message 'q'"),
        ('{"question": "q", "ground_truth_answer": null}', "ground_truth_answer=None"),
        ('{"question": "q", "ground_truth_answer": true}', "ground_truth_answer=True"),
        ('{"question": "q", "ground_truth_answer": "  "}', "ground_truth_answer='  '"),
        ('{"question": "q", "ground_truth_answer": NaN}', "ground_truth_answer=nan"),
        ('{"question": "q", "ground_truth_answer": ["1"]}', r"ground_truth_answer=\['1'\]"),
        ("[1, 2]", "is not an object of named columns"),
        ('{"question": "q', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"question": "q", "ground_truth_answer": ' + "9" * 5000 + "}", "is not valid JSON"),
        ('{"question": "q\\ud800", "ground_truth_answer": "1"}', "no valid Unicode"),
    ],
)
def test_bad_rows_are_named_or_counted(row: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"question": "q", "ground_truth_answer": "1"}}\n{row}\n', encoding="utf-8")
    with pytest.raises(DataError, match=rf"rows\.jsonl row 2 .*{words}.*skip_bad_rows=true") as caught:
        load_problems(str(file))
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert load_problems(str(file), skip_bad_rows=True) == [Problem("q", "1", {})]
    assert "skipped 1 bad rows, kept 1" in caplog.text


def test_files_are_utf8_whatever_the_locale_is(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "Wie gro\u00df ist \u03c0?", "answer": "3"}, ensure_ascii=False), "utf-8")
    read = (
        f"from dirl.data.problem_sources import load_problems; print(ascii(load_problems({str(file)!r})[0].question))"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", read], env={**os.environ, **plain}, capture_output=True, text=True)
    assert done.stdout.strip() == r"'Wie gro\xdf ist \u03c0?'", done.stderr


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(f"question,ground_truth_answer\n{'q' * 200_000},1\n")
    assert [len(problem.question) for problem in load_problems(str(file))] == [200_000]


def test_a_csv_row_with_too_many_cells_is_bad(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("question,ground_truth_answer\nq,1\nq,1,000\n")
    with pytest.raises(DataError, match=r"rows\.csv row 2 is not an object of named columns"):
        load_problems(str(file))


@pytest.mark.parametrize(
    ("gold", "text"), [(18, "18"), (18.0, "18"), (0.1, "0.1"), (-3, "-3"), (10**30, str(10**30)), (" x ", " x ")]
)
def test_golds_become_text(gold: object, text: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"question": "q", "ground_truth_answer": gold}]))
    assert load_problems(str(file))[0].answer == text


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("\\boxed{1} no: \\boxed{\\frac{1}{\\sqrt{2}}}.", "\\frac{1}{\\sqrt{2}}"),
        ("the answer is 7", "the answer is 7"),
        ("cut short: \\boxed{1", "cut short: \\boxed{1"),
        ("\\boxed{}", "\\boxed{}"),
    ],
)
def test_the_answer_of_a_solution_is_its_last_box(solution: str, answer: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"prompt": "q", "solution": solution, "question": 5}]))
    assert load_problems(str(file)) == [Problem("q", answer, {"question": 5})]


def test_splits_and_limits_of_the_task() -> None:
    assert len(load_problems("task:noisy_sums", limit=7)) == 7
    assert load_problems("task:noisy_sums", limit=50, seed=1) != load_problems("task:noisy_sums", limit=50, seed=2)
    with pytest.raises(DataError, match="splits train and heldout, got 'test'"):
        load_problems("task:noisy_sums", split="test")
    with pytest.raises(DataError, match="held-out sums of 3 terms"):
        load_problems("task:noisy_sums", split="heldout", limit=1000)


@pytest.mark.parametrize(("name", "num"), [("GSM8K.json", 1319), ("MATH500.json", 500), ("OlympiadBench.json", 675)])
def test_the_real_benchmarks(name: str, num: int) -> None:
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not beside the repository")
    assert len(load_problems(str(DATA / name))) == num


@pytest.mark.parametrize(
    "path",
    [
        "./owner/rows",
        "~/rows",
        "/owner/rows",
        "owner/rows.json:a",
        "owner/rows:",
        "rows:a",
        "owner/rows@",
        "owner/rows@a:b",
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path: str) -> None:
    with pytest.raises(DataError, match=f"data file {path} does not exist"):
        load_problems(path, split="train")


def test_a_null_hides_no_column_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"question": "1+1?", "prompt": None, "ground_truth_answer": None, "answer": "2", "solution": None},
        {"question": None, "prompt": "1+1?", "ground_truth_answer": "3", "answer": None, "solution": "2"},
    ]
    file.write_text("".join(json.dumps({**row, "level": i}) + "\n" for i, row in enumerate(rows)), encoding="utf-8")
    with pytest.raises(DataError, match="row 1 has ground_truth_answer=None"):
        load_problems(str(file))
    file.write_text(json.dumps({**rows[0], "prompt": "1+1?"}) + "\n" + json.dumps(rows[1]) + "\n", encoding="utf-8")
    assert [(problem.question, problem.answer) for problem in load_problems(str(file))] == [("1+1?", "2")] * 2


def test_columns_are_named_in_one_line() -> None:
    for read in (problem_from_row, count_documents):
        with pytest.raises(UserError, match=r"has the columns 'a\\nb\\x1b', level; expected") as error:
            read({"a\nb\x1b": 1, "level": 2})
        assert "\n" not in str(error.value)
