"""Rows that stay on disk: every format gives the same documents in any order, and the start tokenises nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from dirl.data.data_config import DataSource
from dirl.data.document_source import open_documents
from dirl.data.row_source import open_rows
from dirl.data.rows import DataError
from dirl.data.tasks import tiny_tokenizer

TURNS = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "ü"), ("user", "3"))]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{n}, {n}?\nü", "completion": "\U0001f642 x" * (n * n), "n": str(n)} for n in range(1, 40)
]
CONVERSATIONS = [{"messages": [*TURNS, {"role": "assistant", "content": "4"}]}, {"messages": TURNS}, ROWS[0]]


def write_rows(file: Path) -> str:
    if file.suffix == ".parquet":
        parquet.write_table(Table.from_pylist(ROWS), file)
    elif file.suffix == ".csv":
        with file.open("w", encoding="utf-8-sig", newline="") as lines:
            writer = csv.DictWriter(lines, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    elif file.suffix == ".json":
        file.write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8-sig")
    else:
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8-sig")
    return str(file)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_rows_are_read_again_from_their_places(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirl.data.row_source.PIECE", 50)  # bytes: a row goes over several pieces
    monkeypatch.setattr("dirl.data.row_source.BATCH_ROWS", 7)
    source = open_rows(write_rows(tmp_path / f"rows{suffix}"), split="train")
    found = list(source.scan())
    assert [row.content for row in found] == ROWS
    assert [source.read(row.place) for row in reversed(found)] == ROWS[::-1]
    assert found == list(source.scan())


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_the_first_rows_alone(suffix: str, tmp_path: Path) -> None:
    source = open_documents(DataSource(path=write_rows(tmp_path / f"rows{suffix}"), limit=7), tiny_tokenizer())
    assert len(source) == 7 and source[6] is not None


def test_every_format_is_the_same_data(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    sources = [
        open_documents(DataSource(path=write_rows(tmp_path / f"rows{suffix}")), tokenizer)
        for suffix in (".json", ".jsonl", ".csv", ".parquet")
    ]
    assert len({source.fingerprint for source in sources}) == 1
    for index in (38, 0, 17):
        assert all(source[index] == sources[0][index] for source in sources)
        assert tokenizer.decode(sources[0][index].completion_ids) == ROWS[index]["completion"] + "<|im_end|>"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1,]", "not valid JSON"),
        ('[{"a": 1} {"a": 2}]', "not valid JSON"),
        ('[{"a": 1}, {"a"', "not valid JSON"),
        ('[{"a": 1}] x', "not valid JSON"),
        ("[", "not valid JSON"),
        ('{"a": [1]}', "holds a JSON dict; expected an array"),
    ],
)
def test_damaged_arrays_are_one_line(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        list(open_rows(str(file), split="train").scan())


def test_documents_are_counted_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CONVERSATIONS))
    tokenizer = tiny_tokenizer()
    drawn: list[int] = []
    monkeypatch.setattr("dirl.data.document_source.document_of", lambda row, number, *_, **__: drawn.append(number))
    source = open_documents(DataSource(path=str(file)), tokenizer)
    assert len(source) == 4 and drawn == []
    for index in range(4):
        source[index]
    assert drawn == [0, 1, 0, 0]


def test_the_fingerprint_is_of_rows_tokenizer_and_system_prompt(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    plain, same, other = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    other.chat_template = str(other.chat_template) + "\n"
    prints = [
        open_documents(DataSource(path=path), plain).fingerprint,
        open_documents(DataSource(path=path), other).fingerprint,
        open_documents(DataSource(path=path), plain, system_prompt="s").fingerprint,
        open_documents(DataSource(path=path, limit=5), plain).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert open_documents(DataSource(path=path), same, skip_bad_rows=True).fingerprint == prints[0]


def test_a_file_that_changes_under_a_run_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl")
    source = open_documents(DataSource(path=path), tiny_tokenizer())
    Path(path).write_text("x" * Path(path).stat().st_size)
    with pytest.raises(DataError, match=r"rows\.jsonl row 5 is not what it was at the start"):
        source[2]
