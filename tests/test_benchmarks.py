"""The benchmark scripts run at toy sizes: their layouts agree, and each line says what, where and from which commit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
COMMON = {"benchmark", "model", "dtype", "liger", "peak_memory_gb", "hardware", "cores", "torch", "commit", "date"}

# A pytest plugin or module; after its import the machine lacks what a bare GPU machine lacks.
WITHOUT_EXTRAS = """
from importlib.machinery import PathFinder
from importlib.util import find_spec

MISSING = {"omegaconf", "datasets", "math_verify", "wandb", "deepspeed", "lmdeploy"}
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *more: None if name.split(".")[0] in MISSING else find(name, *more))
assert not any(map(find_spec, MISSING))
"""


def lines_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "scripts" / script), *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DIRL_COMMIT": "named"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert all(line.keys() >= COMMON and line["commit"] == "named" and not line["liger"] for line in lines)
    return lines


@pytest.mark.parametrize(("prompt", "group"), [(10, 1), pytest.param(13, 3, marks=pytest.mark.slow)])
def test_train_step_layouts_score_alike(prompt: int, group: int) -> None:
    sizes = ["--prompt", str(prompt), "--completion", "42", "--max-prompt", "32", "--max-completion", "64"]
    options = ["--group", str(group), "--repeats", "1", "--attention", "tiles", "dense"]
    lines = lines_of("bench_train_step.py", *sizes, *options)
    kinds = [(line["layout"], line["padding"], line["attention"]) for line in lines]
    paddings = {"packed": ["none"], "dirl": ["own", "none"], "tracerl": ["own", "none"], "dare": ["none"]}
    assert kinds == [
        (name, padding, attention)
        for name, of_layout in paddings.items()
        for padding in of_layout
        for attention in (["tiles"] if name == "packed" else ["tiles", "dense"])
    ]
    assert all(line["largest_difference"] < 1e-4 for line in lines)
    assert all(line["mfu"] * line["matmul_tflops"] == pytest.approx(line["tflops"], abs=2e-4) for line in lines)
    completion = lines[0]["completion"]
    tokens = {(line["layout"], line["padding"]): line["tokens"] for line in lines}
    assert tokens["dirl", "own"] == group * 4 * 2 * (32 + 64)
    assert tokens["tracerl", "own"] == group * 4 * (32 + 2 * 64)
    assert tokens["dare", "none"] == tokens["dirl", "none"] == group * 4 * 2 * (prompt + completion)
    assert tokens["packed", "none"] < tokens["tracerl", "none"] < tokens["dare", "none"]


def test_sft_step_layouts_give_one_loss() -> None:
    packed, *rows = lines_of("bench_sft_step.py", "--documents", "3", "--repeats", "1")
    assert [(r["padding"], r["attention"]) for r in rows] == [
        (p, a) for p in ("own", "none") for a in ("tiles", "dense")
    ]
    for row in rows:
        assert packed["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert packed.keys() == row.keys() >= {"tflops", "matmul_tflops", "mfu"}
        assert packed["tokens"] < row["tokens"] <= 3 * row["row_length"]
    assert rows[0]["tokens"] == 3 * rows[0]["row_length"] > rows[2]["tokens"]


@pytest.mark.slow
def test_a_push_is_measured_both_ways() -> None:
    lines = lines_of("bench_push.py", "--repeats", "1")
    assert [line["weight_transfer"] for line in lines] == ["http", "collective"]


def test_rollout_decoders_give_the_same_tokens() -> None:
    sizes = ["--batch-sizes", "1", "5", "--prompt-length", "6", "--completion-length", "16", "--plain-sequences", "4"]
    lines = lines_of("bench_rollout.py", *sizes, "--repeats", "1")
    assert [(line["compared"], line["equal"]) for line in lines] == [(1, 1), (4, 4)]


def test_approximate_caches_are_measured_against_none() -> None:
    sizes = ["--batch-sizes", "3", "--prompt-length", "6", "--completion-length", "16", "--denoising-steps", "4"]
    lines = lines_of("bench_rollout.py", "--approximate-caches", *sizes, "--generation-window", "8", "--repeats", "1")
    exact, *approximate = lines
    assert [line["approximate_cache"] for line in lines] == ["none", "prefix", "dual"]
    assert exact["logp_difference_max"] < 1e-4 and (exact["greedy_equal"], exact["speedup"]) == (1, 1)
    assert all(line["logp_difference_mean"] > 1e-4 for line in approximate)


@pytest.mark.parametrize(("lines", "page"), [("cpu.jsonl", "README.md"), ("gpu.jsonl", "gpu.md")])
def test_the_tables_are_those_of_the_lines(lines: str, page: str) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts/bench_table.py"), str(ROOT / "docs/benchmarks" / lines)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "train_step" in run.stdout and run.stdout.strip() in (ROOT / "docs/benchmarks" / page).read_text()


def test_the_ratios_of_the_readme_are_those_of_lines() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| layout |") :].partition("\n\n")[0]
    shown = {float(cell) for cell in re.findall(r"\| \**([0-9.]+)\**(?= \|)", table)}
    lines = [json.loads(line) for line in (ROOT / "docs/benchmarks/cpu.jsonl").read_text().splitlines()]
    measured = {round(line["ratio"], 1) for line in lines if line["benchmark"] in ("train_step", "sft_step")}
    assert len(shown) > 10 and shown <= measured


def run_without_extras(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "without_extras.py").write_text(WITHOUT_EXTRAS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, ROOT / "scripts")))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


def test_gpu_check_names_the_files_with_gpu_tests_and_they_need_no_extras(tmp_path: Path) -> None:
    named = re.findall(r"tests/\S+\.py", (ROOT / "scripts/gpu_check.sh").read_text())
    marker = re.compile(r"pytest\.mark\.gpu\b")
    marked = [
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/*.py") if marker.search(path.read_text())
    ]
    assert sorted(named) == sorted(marked)
    options = ["-q", "-p", "without_extras", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu"]
    collected = run_without_extras(tmp_path, "-m", "pytest", *options, *named)
    assert collected.returncode == 0, collected.stdout + collected.stderr
    assert [name for name in named if f"{name}::" not in collected.stdout] == []


def test_benchmarks_need_no_extras(tmp_path: Path) -> None:
    names = [path.stem for path in sorted(ROOT.glob("scripts/bench*.py"))]
    assert "bench_train_step" in names
    imported = run_without_extras(tmp_path, "-c", f"import without_extras, {', '.join(names)}")
    assert imported.returncode == 0, imported.stderr
