"""The files of a public benchmark, as downloaded -> data/eval/NAME.json in the rows dirl reads, counted and hashed.

    python scripts/convert_benchmark.py source GSM8K                 # prints the repository and the files to fetch
    python scripts/convert_benchmark.py convert GSM8K data/raw/GSM8K data/eval/GSM8K.json
    python scripts/convert_benchmark.py check GSM8K data/eval/GSM8K.json

`download.sh` calls all three. Hashes are of the content (questions and answers or tests, spacing apart), not of files:
repositories store the same rows as parquet, JSON or JSON lines. Where no hash is known, the first download's is kept in
SHA256SUMS.json beside the data and later ones must agree; ACCEPT_CHANGED=1 takes what differs.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dirl.data.problems import INSTRUCTIONS, TESTS, Problem, problem_from_row
from dirl.data.row_source import open_rows
from dirl.data.rows import convert_rows
from dirl.files import write_whole

HASHES = "SHA256SUMS.json"


@dataclass(frozen=True)
class Source:
    """Where a benchmark comes from and how it is recognised."""

    repository: str  # of data sets on the Hugging Face hub
    files: str  # pattern of their paths
    num_rows: tuple[int, ...]  # of any published version
    sha256: str = ""  # of the content; "": not known


SOURCES = {
    "GSM8K": Source(
        "openai/gsm8k",
        "main/test-*.parquet",
        (1319,),
        "59c2cee265a88c0d4b356bc5a69662589d7975bb7f04089b949501f914f7d08a",
    ),
    "MATH500": Source(
        "HuggingFaceH4/MATH-500",
        "test.jsonl",
        (500,),
        "9b72d404fee6b7ac988d0f72be0fe0ca4be2206236d69dbe2627d1dd817f79c7",
    ),
    "AIME2024": Source("HuggingFaceH4/aime_2024", "data/train-*.parquet", (30,)),
    "AIME2025": Source("math-ai/aime25", "test.jsonl", (30,)),
    "OlympiadBench": Source("Hothan/OlympiadBench", "*OE_TO_maths_en_COMP*.parquet", (674, 675)),
    "HumanEval": Source("openai/openai_humaneval", "openai_humaneval/test-*.parquet", (164,)),
    "MBPP": Source("google-research-datasets/mbpp", "full/test-*.parquet", (500,)),
    "LiveCodeBench-v6": Source("livecodebench/code_generation_lite", "test6.jsonl", (175,)),
    "GPQA-Diamond": Source("Idavidrein/gpqa", "gpqa_diamond.csv", (198,)),
    "MMLU-Pro": Source("TIGER-Lab/MMLU-Pro", "data/test-*.parquet", (12032,)),
    "IFEval": Source("google/IFEval", "ifeval_input_data.jsonl", (541,)),
}


def convert(name: str, folder: Path) -> list[dict[str, object]]:
    """The rows of the downloaded files, in order of their paths.

    Raises:
        ValueError: no file matches, or a row cannot be read; names the file and row.
    """
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    matching = [path for path in paths if fnmatch.fnmatch(path, SOURCES[name].files)]
    if not matching:
        there = ", ".join(path for path in paths if not path.startswith(".")) or "nothing"
        raise ValueError(f"{folder} holds no {SOURCES[name].files}, but {there}")
    problems: list[Problem] = []
    for path in matching:
        file = str(folder / path)
        rows = open_rows(file, split="test").scan()
        found = convert_rows(file, rows, problem_from_row, columns={}, limit=0, skip_bad_rows=False)
        problems += [problem for _, problem in found]
    return [as_row(problem) for problem in problems]


def as_row(problem: Problem) -> dict[str, object]:
    """What JSON can hold of a problem; images and the like are left behind."""
    columns = {key: value for key, value in problem.columns.items() if is_plain(value)}
    answer = {} if columns.keys() & {TESTS, INSTRUCTIONS} else {"ground_truth_answer": problem.answer}
    return {"question": problem.question, **answer, **columns}


def is_plain(value: object) -> bool:
    if isinstance(value, list | dict):
        return all(map(is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float | bool)


def digest(rows: Sequence[dict[str, object]]) -> str:
    """SHA-256 of questions and answers, tests or instructions, with every run of white space as one blank."""
    keys = ("question", "ground_truth_answer", "prefix", "test_list")
    more = ("public_test_cases", "private_test_cases", INSTRUCTIONS, "kwargs")
    content = [
        [" ".join(str(row.get(key, "")).split()) for key in keys]
        + [" ".join(str(row[key]).split()) for key in more if key in row]
        for row in rows
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check(name: str, file: Path, rows: Sequence[dict[str, object]]) -> None:
    """Compare count and hash with what is known; a hash seen for the first time is kept.

    Raises:
        ValueError: one of them differs.
    """
    source, found = SOURCES[name], digest(rows)
    if len(rows) not in source.num_rows:
        raise ValueError(f"{file} would hold {len(rows)} rows; {name} has {' or '.join(map(str, source.num_rows))}")
    hashes = file.parent / HASHES
    kept = json.loads(hashes.read_text(encoding="utf-8")) if hashes.is_file() else {}
    known = kept.get(name) or source.sha256
    if known and known != found and os.environ.get("ACCEPT_CHANGED") != "1":
        raise ValueError(
            f"{file}: the content of {name} has the hash {found[:12]}, expected {known[:12]}; "
            "look at what changed, then take it with ACCEPT_CHANGED=1"
        )
    if kept.get(name) != found:
        write(hashes, dict(sorted({**kept, name: found}.items())))


def write(file: Path, content: object) -> None:
    """The whole file or none of it, for people to read."""
    write_whole(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def run(action: str, name: str, paths: Sequence[Path]) -> None:
    """One of the three calls of the module's docstring."""
    if action == "source":
        print(SOURCES[name].repository, SOURCES[name].files)
    elif action == "convert":
        folder, file = paths
        rows = convert(name, folder)
        check(name, file, rows)
        write(file, rows)
        print(f"{file}: {len(rows)} problems")
    else:
        (file,) = paths
        check(name, file, json.loads(file.read_text(encoding="utf-8")))
        print(f"{file}: there already, and unchanged")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 and one line where the data are not what they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["source", "convert", "check"])
    parser.add_argument("name", choices=list(SOURCES))
    parser.add_argument("paths", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    try:
        run(options.action, options.name, options.paths)
    except (OSError, ValueError) as error:
        print(f"convert_benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
