"""Pass rates of a data set: counted by hand from the samples, continued after a kill, and read by an RL run."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet

from dirl.cli import main
from dirl.config import load_config
from dirl.console.difficulty import Difficulty, DifficultyConfig
from dirl.data.problem_sources import load_problems
from dirl.data.problems import of_pass_rate
from dirl.data.rows import DataError
from dirl.errors import UserError
from dirl.files import read_json_lines
from dirl.model.tiny import save_tiny_model
from tests.eval.test_evaluate import World, true_sum, world

__all__ = ["world"]  # a fixture

ROWS = [{"prompt": f"{n}+{n}=", "answer": 2 * n, "level": n, "tags": ["é", None]} for n in range(6)]
QUICK = ["sampling.max_completion_length=48", "chunk_size=5"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rated(out: str) -> list[dict[str, Any]]:
    return list(read_json_lines(out, "a row"))


def run(data: str, out: str, *overrides: str) -> str:
    difficulty = Difficulty(data, out, load_config(DifficultyConfig, None, [*QUICK, *overrides]))
    difficulty.evaluate()
    return difficulty.write()


def test_rates_are_the_shares_of_right_samples_and_rows_stay(world: World, tmp_path: Path) -> None:
    data, out = write(tmp_path / "d.jsonl", ROWS), str(tmp_path / "o.jsonl")
    said = run(data, out, "k=6")
    right = defaultdict[int, int](int)
    for sample in rated(f"{out}.samples/samples.jsonl"):
        right[sample["problem"]] += sample["text"] == f"\\boxed{{{true_sum(ROWS[sample['problem']]['prompt'])}}}"
    expected = [{**row, "pass_rate": right[index] / 6} for index, row in enumerate(ROWS)]
    assert rated(out) == expected
    assert len({row["pass_rate"] for row in expected}) > 2
    mean = sum(right.values()) / 36
    assert said.startswith(f"pass rates: {out} (mean {mean:.3f} of 6; ")
    assert world.num_generated == 36
    # Rated once more, the column is replaced; fewer completions are already there.
    run(out, str(tmp_path / "again.jsonl"), "k=6")
    assert [{**row, "pass_rate": 0} for row in rated(str(tmp_path / "again.jsonl"))] == [
        {**row, "pass_rate": 0} for row in ROWS
    ]
    run(data, out, "k=2")
    assert world.num_generated == 0


def test_a_killed_one_goes_on(world: World, tmp_path: Path) -> None:
    data, whole, out = write(tmp_path / "d.jsonl", ROWS), str(tmp_path / "w.jsonl"), str(tmp_path / "o.jsonl")
    run(data, whole, "k=4")
    world.dies_after = 13
    with pytest.raises(KeyboardInterrupt):
        run(data, out, "k=4")
    assert not Path(out).exists()
    world.dies_after = None
    run(data, out, "k=4")
    assert world.num_generated == 24 - 10
    assert Path(out).read_text() == Path(whole).read_text()


def test_only_good_rows_that_json_holds_are_rated(world: World, tmp_path: Path) -> None:
    table = Table.from_pylist([{"prompt": "1+1=", "answer": 2, "raw": raw} for raw in (None, b"x")])
    parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet row 2 holds what JSON has no form for .*bytes"):
        run(str(tmp_path / "d.parquet"), str(tmp_path / "o.jsonl"))
    data = write(tmp_path / "d.jsonl", [*ROWS[:2], {"prompt": ""}, *ROWS[2:]])
    out = str(tmp_path / "o.jsonl")
    run(data, out, "data.skip_bad_rows=true", "data.limit=4", "k=1")
    assert [row["level"] for row in rated(out)] == [0, 1, 2, 3]
    assert world.num_generated == 4


def test_what_cannot_be_rated_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", ROWS)
    config = load_config(DifficultyConfig, None, [])
    for source, out, words in (
        ("task:noisy_sums", str(tmp_path / "o.jsonl"), "task:noisy_sums has no rows"),
        (data, str(tmp_path / "o.parquet"), r"o\.parquet must end in \.jsonl"),
        (data, data, "is there, and .*samples is not: it is another file"),
    ):
        with pytest.raises(UserError, match=words):
            Difficulty(source, out, config)
    with pytest.raises(UserError, match=r"k=8 completions of sampling\.temperature=0 are all alike"):
        load_config(DifficultyConfig, None, ["sampling.temperature=0"])


def test_from_the_command_line_to_the_band_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    data, out = write(tmp_path / "d.jsonl", ROWS[:3]), str(tmp_path / "o.jsonl")
    words = ["difficulty", str(tmp_path / "model"), data, out, "k=2", "sampling.max_completion_length=4", "--quiet"]
    assert main(words) == 0
    assert "pass rates:" in capsys.readouterr().out
    problems = load_problems(out)  # an untrained model is never right
    assert [problem.columns["pass_rate"] for problem in problems] == [0, 0, 0]
    assert of_pass_rate(problems, [0.0, 0.1]) == problems
    assert main([*words[:3], str(tmp_path / "o.csv")]) == 2
