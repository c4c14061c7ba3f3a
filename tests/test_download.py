"""download.sh and its converter on files in the forms the hub has, with a stand-in for `hf`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from dirl.eval.benchmarks import KNOWN, load_benchmark
from dirl.reward.code_execution import code

REPOSITORY = Path(__file__).parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"

# Logs its arguments, then puts the files of $HUB into the folder after --local-dir.
FAKE_HF = """#!/usr/bin/env bash
echo "$*" >>"$HF_LOG"
[[ -z ${FAKE_ERROR:-} ]] || { printf 'Traceback\\n\\nConnectionError: no route\\n' >&2; exit 1; }
[[ -z ${HF_TOKEN_PATH:-} || $HF_TOKEN_PATH == /dev/null ]] || exit 9
while [[ $1 != --local-dir ]]; do shift; done
mkdir -p "$2" && cp -r "$HUB/." "$2"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """download.sh and what it calls, in a path with a space."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "download.sh", root)
    shutil.copy(REPOSITORY / "scripts/convert_benchmark.py", root / "scripts")
    (root / "dirl").symlink_to(REPOSITORY / "dirl")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/hf").write_text(FAKE_HF)
    (tmp_path / "bin/hf").chmod(0o755)
    (tmp_path / "hub").mkdir()
    return root


def download(checkout: Path, *names: str, **variables: str) -> subprocess.CompletedProcess[str]:
    base = checkout.parent
    path = f"{base / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "HF_LOG": str(base / "log"), "HUB": str(base / "hub"), "HOME": str(base), **variables}
    command = ["bash", str(checkout / "download.sh"), "data", *names]
    return subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True, timeout=120)


def put(checkout: Path, path: str, rows: list[dict[str, Any]]) -> None:
    file = checkout.parent / "hub" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done
    return done.stderr.splitlines()[0]


def gsm8k(num_rows: int) -> list[dict[str, str]]:
    return [{"question": f"{n}+{n}?", "answer": f"{n}+{n}=<<>>{2 * n}\n#### {2 * n:,}"} for n in range(num_rows)]


def test_a_benchmark_is_fetched_once_and_checked_after(checkout: Path) -> None:
    put(checkout, "test.jsonl", [{"problem": f"Q{n}", "answer": str(n), "id": str(n)} for n in range(30)])
    put(checkout, "README.md", [])
    done = download(checkout, "AIME2025")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "data/eval/AIME2025.json: 30 problems\n"
    again = download(checkout, "AIME2025", FAKE_ERROR="1")  # it needs no network
    assert (again.returncode, again.stdout) == (0, "data/eval/AIME2025.json: there already, and unchanged\n")
    (line,) = (checkout.parent / "log").read_text().splitlines()
    assert line == "download math-ai/aime25 --repo-type dataset --local-dir data/raw/AIME2025 --include test.jsonl"
    rows = json.loads((checkout / "data/eval/AIME2025.json").read_text())
    assert rows[7] == {"question": "Q7", "ground_truth_answer": "7", "id": "7"}
    # A file that somebody broke is fetched again; a hub that has changed is not believed.
    (checkout / "data/eval/AIME2025.json").write_text("[]")
    assert download(checkout, "AIME2025").stdout == "data/eval/AIME2025.json: 30 problems\n"
    (checkout / "data/eval/AIME2025.json").unlink()
    put(checkout, "test.jsonl", [{"problem": f"Q{n}", "answer": str(n + (n == 3))} for n in range(30)])
    assert "take it with ACCEPT_CHANGED=1" in error_line(download(checkout, "AIME2025"))
    assert not (checkout / "data/eval/AIME2025.json").exists()
    assert download(checkout, "AIME2025", ACCEPT_CHANGED="1").returncode == 0


def test_counts_and_known_hashes(checkout: Path) -> None:
    put(checkout, "main/test-00000-of-00001.parquet", gsm8k(1318))
    put(checkout, "main/train-00000-of-00001.parquet", gsm8k(1))
    assert "would hold 1318 rows; GSM8K has 1319" in error_line(download(checkout, "GSM8K"))
    put(checkout, "main/test-00000-of-00001.parquet", gsm8k(1319))
    assert "the content of GSM8K has the hash" in error_line(download(checkout, "GSM8K"))
    assert download(checkout, "GSM8K", ACCEPT_CHANGED="1").returncode == 0
    rows = json.loads((checkout / "data/eval/GSM8K.json").read_text())
    assert rows[600] == {"question": "600+600?", "ground_truth_answer": "1200"}


def test_code_arrives_ready_to_evaluate(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mbpp = {"task_id": 1, "text": "Add.", "code": "", "test_setup_code": "", "challenge_test_list": ["x"]}
    rows = [{**mbpp, "test_list": [f"assert add({n}, 1) == {n + 1}"]} for n in range(500)]
    put(checkout, "full/test-00000-of-00001.parquet", rows)
    put(checkout, "full/train-00000-of-00001.parquet", rows[:3])
    assert download(checkout, "MBPP").returncode == 0
    monkeypatch.setenv("DIRL_DATA", str(checkout / "data/eval"))
    benchmark = load_benchmark("mbpp")
    assert (benchmark.name, benchmark.rule.judge, len(benchmark.problems)) == ("MBPP", "code", 500)
    columns = {name: [value] for name, value in benchmark.problems[9].columns.items()}
    assert code(["Q"], ["```python\ndef add(a, b): return a + b\n```"], **columns) == [1.0]


def test_failures_are_one_line(checkout: Path) -> None:
    failed = download(checkout, "MATH500", "GSM8K", FAKE_ERROR="1", HF_ENDPOINT="https://mirror.example")
    assert failed.returncode == 1
    (line,) = failed.stderr.splitlines()
    assert line == (
        "download.sh: could not fetch HuggingFaceH4/MATH-500 from https://mirror.example: check the network, the name, "
        "and HF_TOKEN if it is gated (ConnectionError: no route)"
    )
    put(checkout, "other.jsonl", [{"problem": "Q", "answer": "1"}])
    assert "data/raw/MATH500 holds no test.jsonl, but other.jsonl" in error_line(download(checkout, "MATH500"))
    put(checkout, "test.jsonl", [{"problem": "Q", "reply": "1"}])
    assert "test.jsonl row 1 has the columns problem, reply" in error_line(download(checkout, "MATH500"))
    unknown = download(checkout, "MATH500", "MATH501")
    assert unknown.returncode == 2 and unknown.stderr.startswith("usage: ")


def test_every_benchmark_has_a_source() -> None:
    script = (REPOSITORY / "download.sh").read_text()
    (listed,) = [line for line in script.splitlines() if line.startswith("BENCHMARKS=")]
    assert set(listed.partition("=")[2].strip('"').split()) == {*KNOWN}
    for name in KNOWN:
        command = [sys.executable, str(REPOSITORY / "scripts/convert_benchmark.py"), "source", name]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert len(done.stdout.split()) == 2


@pytest.mark.parametrize("name", ["GSM8K", "MATH500"])
def test_known_hashes_are_those_of_the_real_data(name: str, tmp_path: Path) -> None:
    file = SHARED / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    shutil.copy(file, tmp_path)
    command = [sys.executable, str(REPOSITORY / "scripts/convert_benchmark.py"), "check", name]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*command, str(tmp_path / file.name)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
