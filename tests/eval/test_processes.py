"""An evaluation by two processes is the evaluation by one, also when one of them takes over from two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dirl import cli
from dirl.errors import UserError
from dirl.eval.eval_config import EvalConfig
from dirl.eval.evaluate import run_evaluation
from dirl.files import read_json_lines
from dirl.model.checkpoint import ModelConfig
from dirl.model.tiny import save_tiny_model

ROOT = Path(__file__).parents[2]
TIMED = {"seconds", "tokens_per_s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    return path


def evaluate(num_processes: int, model: Path, out: Path, modes: str) -> None:
    """`dirl eval` on 5 problems of 2 samples, in chunks of 2 a process: 5 chunks of one process, 3 of two."""
    common = ["data.limit=5", "num_samples=2", "chunk_size=2", "sampling.max_completion_length=12", "overwrite=false"]
    arguments = [
        "eval",
        str(ROOT / "configs/tiny/eval.yaml"),
        f"model.path={model}",
        f"output_dir={out}",
        *common,
        modes,
    ]
    if num_processes == 1:
        assert cli.main(arguments) == 0
        return
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = out.with_name("evaluate.py")
    script.write_text(
        "import sys; from dirl import cli; import torch; code = cli.main()\n"
        "assert not torch.distributed.is_initialized(), 'ranks that did not take leave'\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, *launcher, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("report: ") == 1


def results_of(out: Path) -> list[dict[str, Any]]:
    results = json.loads((out / "results.json").read_text())["results"]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in results]


def rows_of(out: Path) -> list[dict[str, Any]]:
    lines = read_json_lines(out / "samples.jsonl", "a sample")
    rows = [{key: value for key, value in row.items() if key not in TIMED} for row in lines]
    return sorted(rows, key=lambda row: (row["mode"], row["problem"], row["sample"]))


def test_two_processes_equal_one(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    one, two = tmp_path / "one", tmp_path / "two"
    evaluate(1, model, one, "modes=[dynamic,static,greedy]")
    # One process begins; two go on where it was killed; one adds what is left.
    evaluate(1, model, two, "modes=[dynamic]")
    samples = two / "samples.jsonl"
    lines = samples.read_text().splitlines(keepends=True)
    assert len(lines) == 10
    samples.write_text("".join([*lines[:3], *lines[5:9], lines[9][:20]]))
    evaluate(2, model, two, "modes=[dynamic,static]")
    evaluate(1, model, two, "modes=[dynamic,static,greedy]")
    assert len(rows_of(one)) == 5 * (2 + 2 + 1)
    assert rows_of(two) == rows_of(one)
    assert results_of(two) == results_of(one)


def test_all_processes_fail_with_the_main_one(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class SecondOfTwo:
        is_main, world_size = False, 2

        def from_main(self, item: str) -> str:
            return item or "samples of another configuration"

    monkeypatch.setattr("dirl.eval.evaluate.Distributed", SecondOfTwo)
    config = EvalConfig(output_dir=str(tmp_path / "out"), model=ModelConfig(path=str(model)))
    with pytest.raises(UserError, match="samples of another configuration"):
        run_evaluation(config)
    assert not (tmp_path / "out").exists()
