"""Sweeps: what runs where and when, what is run again, how one ends; the runs are a program of a few lines."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dirl.cli import main
from dirl.config import Config
from dirl.console import sweep
from dirl.console.combinations import Axis, Combination, combinations_of
from dirl.console.sweep import Places, conclude, exit_code, run_one, run_sweep
from tests.show.report.test_write import data_of

ROOT = Path(__file__).parents[2]
ACTS = Axis("act", ("finish", "fail", "also"))
# A run: notes that it began, then does as its act says.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
told = dict(word.split("=", 1) for word in sys.argv[1:])
folder = Path(told["output_dir"])
(folder / "config.yaml").write_text("".join(f"{key}: {value}\\n" for key, value in told.items()))
(folder / "run.json").write_text(json.dumps({"config": {**told, "max_steps": 1}}))
(folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "timing_s/step": 36.0}\\n')
def say(**what):
    with (folder.parent / "began.jsonl").open("a") as file:
        file.write(json.dumps({"act": told["act"], **what}) + "\\n")
def stop(*_):
    say(did="checkpoint")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
say(did="begin", gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), time=time.time())
if told["act"] == "fail":
    print("dirl: error: no such\\x1b[31m thing; give another", file=sys.stderr)
    print("a last word")
    sys.exit(2)
if told["act"].startswith("wait"):
    time.sleep(60)
time.sleep(0.3)
(folder / "final").mkdir(exist_ok=True)
(folder / "final/README.md").write_text("a model")
say(did="end", gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), time=time.time())
"""


@dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    output_dir: str = "toy"
    act: str = "finish"
    max_steps: int = 1


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every run of the test is the program."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    (tmp_path / "toy.yaml").write_text("{}\n")

    def command_of(stage: str, config: str, one: Combination) -> list[str]:
        return [sys.executable, str(path), *one.overrides]

    monkeypatch.setattr(sweep, "command_of", command_of)
    for name in ("NUM_PROCESSES", "NUM_MACHINES", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    return path


def combined(tmp_path: Path, *acts: str, words: Sequence[str] = ()) -> list[Combination]:
    fixed = [f"output_dir={tmp_path}/out", *words]
    return combinations_of(ToyConfig, str(tmp_path / "toy.yaml"), fixed, [Axis("act", acts)])


def run(
    found: Sequence[Combination], places: Places | None = None, say: Callable[[str], None] = print
) -> tuple[list[sweep.Outcome], int]:
    return run_sweep("rl", "toy.yaml", found, places or Places(({}, {})), say)


def noted(tmp_path: Path, did: str = "begin") -> list[dict[str, Any]]:
    path = tmp_path / "out/began.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["did"] == did]


def test_a_failed_run_does_not_end_the_sweep_and_a_finished_one_is_not_run_again(tmp_path: Path) -> None:
    found, said = combined(tmp_path, *ACTS.values), []
    outcomes, received = run(found, say=said.append)
    assert [outcome.state for outcome in outcomes] == ["finished", "failed", "finished"]
    assert (
        outcomes[1].trouble == "no such\N{SYMBOL FOR ESCAPE}[31m thing; give another"
        and exit_code(outcomes, received) == 1
    )
    assert said[0] == f"3 runs, 0 finished already, 2 at a time: {tmp_path}/out" and said[-1].startswith("[3/3] ")
    outcomes, _ = run(found, say=said.append)
    assert sorted(row["act"] for row in noted(tmp_path)) == ["also", "fail", "fail", "finish"]
    assert (found[1].folder / "output.log").read_text().count("a last word") == 2
    # The program has mended itself: only what failed is left, and nothing fails.
    (found[1].folder / "final").mkdir()
    (found[1].folder / "final/README.md").touch()
    outcomes, received = run(found)
    assert exit_code(outcomes, received) == 0 and len(noted(tmp_path)) == 4


def test_what_is_asked_for_now_must_be_what_was_finished(tmp_path: Path) -> None:
    run(combined(tmp_path, "finish"))
    run(combined(tmp_path, "finish", words=["max_steps=7"]))  # goes on
    run(combined(tmp_path, "finish", words=["max_steps=7"]))
    assert len(noted(tmp_path)) == 2


def test_runs_at_the_same_time_have_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_visible_gpus", lambda: ["3", "5", "7", "8"])
    assert len(Places.on_this_machine(None, 9).environments) == 4
    monkeypatch.setenv("NUM_PROCESSES", "2")
    places = Places.on_this_machine(None, 9)
    assert places.environments == ({"CUDA_VISIBLE_DEVICES": "3,5"}, {"CUDA_VISIBLE_DEVICES": "7,8"})
    with pytest.raises(ValueError, match=r"^--jobs 3 with NUM_PROCESSES=2 takes 6 GPUs, and 4 are visible"):
        Places.on_this_machine(3, 9)
    run(combined(tmp_path, "a", "b", "c", "d"), places)
    spans = {row["act"]: [row["time"], row["gpus"]] for row in noted(tmp_path)}
    for row in noted(tmp_path, "end"):
        spans[row["act"]].append(row["time"])
    spans_by_gpus: dict[str, list[tuple[float, float]]] = {}
    for start, gpus, end in spans.values():
        spans_by_gpus.setdefault(gpus, []).append((start, end))
    assert spans_by_gpus.keys() == {"3,5", "7,8"}
    for one in spans_by_gpus.values():
        one.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(one))


def test_without_gpus_the_runs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_visible_gpus", list)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Places.on_this_machine(None, 3).environments == ({"OMP_NUM_THREADS": "2"},) * 3
    assert Places.on_this_machine(None, 99).environments == ({"OMP_NUM_THREADS": "1"},) * 8
    assert Places.on_this_machine(16, 99).environments == ({"OMP_NUM_THREADS": "1"},) * 16  # who says so may
    with pytest.raises(ValueError, match=r"^--jobs 0: at least 1"):
        Places.on_this_machine(0, 3)
    monkeypatch.setenv("NUM_PROCESSES", "4")
    assert Places.on_this_machine(None, 99).environments == ({"OMP_NUM_THREADS": "1"},) * 2
    monkeypatch.setenv("NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match=r"^NUM_PROCESSES=two: must be a whole number"):
        Places.on_this_machine(None, 3)
    monkeypatch.setenv("NUM_MACHINES", "2")
    with pytest.raises(ValueError, match=r"^NUM_MACHINES is of one run"):
        Places.on_this_machine(None, 3)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_stops_all_runs_with_one_checkpoint_each(tmp_path: Path, number: int, code: int) -> None:
    found = combined(tmp_path, "wait 1", "wait 2", "wait 3")

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while len(noted(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    outcomes, received = run(found)
    thread.join()
    assert [outcome.state for outcome in outcomes] == ["stopped", "stopped", "waiting"]
    assert exit_code(outcomes, received) == code
    assert sorted(row["act"] for row in noted(tmp_path, "checkpoint")) == ["wait 1", "wait 2"]
    assert len(noted(tmp_path)) == 2  # the third never began


def test_the_summary_and_the_page(tmp_path: Path) -> None:
    outcomes, _ = run(combined(tmp_path, *ACTS.values))
    console = Console(width=160, file=io.StringIO(), record=True)
    page = conclude(outcomes, [ACTS], "rl", console)
    rows = [line.split() for line in console.export_text().splitlines() if line.split()]
    assert [row[:2] for row in rows[2:5]] == [
        ["act=finish", "finished"],
        ["act=fail", "failed"],
        ["act=also", "finished"],
    ]
    assert rows[5][:3] == ["act=fail:", "no", "such\N{SYMBOL FOR ESCAPE}[31m"]
    assert page == tmp_path / "out/report.html"
    assert data_of(page.read_text())["tables"][0]["rows"][0] == ["metric", "finish", "fail", "also"]


def test_one_combination_becomes_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: Path) -> None:
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execvpe", lambda file, command, environment: called.append((file, command)))
    first, second = combined(tmp_path, "finish", "also")
    run([first])
    run_one("rl", "toy.yaml", first, print)
    assert called == []  # finished
    run_one("rl", "toy.yaml", second, print)
    assert called == [(sys.executable, [sys.executable, str(program), *second.overrides])]


def test_several_processes_go_through_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("NUM_PROCESSES", "2")
    (one,) = combined(tmp_path, "finish")
    monkeypatch.chdir(tmp_path)
    command = sweep.command_of("rl", "toy.yaml", one)
    subprocess.run(command, env={**os.environ, "DRY_RUN": "1", "CUDA_VISIBLE_DEVICES": ""}, check=True, timeout=60)
    line = capfd.readouterr().out.split()
    assert "torchrun" in line and line[line.index("--nproc_per_node") + 1] == "2"
    assert line[-5:] == ["dirl.cli", "rl", f"{tmp_path}/toy.yaml", "act=finish", f"output_dir={one.folder}"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["rl.yaml", "max_steps=4"], "nothing to sweep"),
        (["rl.yaml", "seed=[0,-1]"], "seed=-1: override 'seed=-1': seed must be at least 0"),
        (["rl.yaml", "sed=[0,1]"], "unknown key 'sed'; did you mean"),
        (["rl.yaml", "seed=[0,1]", "--index", "2"], "--index 2: there are 2 combinations, 0 to 1"),
        (["rl.yaml", "seed=[0,1]", "--index", "1", "--jobs", "2"], "--jobs 2 is of several runs"),
        (
            ["mine.yaml", "seed=[0,1]"],
            "could be of sft and rl and eval; name the file one of sft.yaml, rl.yaml, eval.yaml",
        ),
        (["strange.yaml", "seed=[0,1]"], "is of no stage"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("rl", "max_steps: 2"), ("mine", "seed: 1"), ("strange", "nonsense: 1")):
        (tmp_path / f"{name}.yaml").write_text(text + "\n")
    assert main(["sweep", str(tmp_path / words[0]), *words[1:], f"output_dir={tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_the_stage_is_read_from_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("rollout:\n  prompts_per_step: 4\n")
    words = ["sweep", str(tmp_path / "mine.yaml"), "objective=[dipo,espo]", "seed=[0,1]", f"output_dir={tmp_path}/a b"]
    assert main([*words, "--print"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[3].startswith("3 objective=espo seed=1 'output_dir=")
    assert main([*words, "--print", "--index", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["objective=dipo", "seed=1"]


@pytest.mark.slow
def test_runs_end_when_the_sweep_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.console import test_sweep as t\n"
        "from dirl.console import sweep\nfolder = Path(sys.argv[1])\n"
        "sweep.command_of = lambda stage, config, one: [sys.executable, str(folder / 'program.py'), *one.overrides]\n"
        "t.run(t.combined(folder, 'wait 1'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    deadline = time.monotonic() + 120
    while not noted(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    while not noted(tmp_path, "checkpoint") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [row["act"] for row in noted(tmp_path, "checkpoint")] == ["wait 1"]


@pytest.mark.slow
def test_a_real_sweep_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    assert main(["tiny-model", str(tmp_path / "base")]) == 0
    words = ["sweep", "configs/tiny/sft.yaml", "noise.noise_level=[block,sequence]", "seed=[0,1]", "--jobs", "2"]
    words += ["max_steps=2", f"model.path={tmp_path}/base", f"output_dir={tmp_path}/out", "data.limit=64"]
    words += ["data.num_heldout=8", "global_batch_size=4", "eval_steps=1"]
    assert main(words) == 0
    assert capsys.readouterr().out.count("finished after") == 4
    page = data_of((tmp_path / "out/report.html").read_text())
    assert page["tables"][0]["rows"][0] == ["metric", "block", "sequence"]
    loss = next(chart for chart in page["charts"] if chart["title"] == "Loss: loss")
    assert [series["name"] for series in loss["series"]] == ["block", "sequence"] and "low" in loss["series"][0]
    assert main(words) == 0
    assert "4 finished already" in capsys.readouterr().out
