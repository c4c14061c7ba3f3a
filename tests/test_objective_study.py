"""The study of objectives: what it runs and in which order, what it makes of its lines, and that the page says that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import compare_objectives as study  # noqa: E402
import objective_study as jobs  # noqa: E402
import objective_tables as tables  # noqa: E402

from dirl.errors import UserError  # noqa: E402
from dirl.model.tiny import save_tiny_model  # noqa: E402

Line = dict[str, Any]
LINES = ROOT / "docs/benchmarks/objectives.jsonl"
PLACE = {"hardware": "a machine", "torch": "2", "commit": "abc", "date": "2026-01-02"}


def line(preset: str = "dipo", kind: str = "final", **fields: Any) -> Line:
    """A finished run."""
    measured = {"accuracy": 0.5, "standard_error": 0.02, "greedy_accuracy": 0.75, "tokens_per_step": 2.0}
    cost = {"cpu_seconds_per_step": 1.0, "packed_tokens_per_step": 100, "reward": [0.25, 0.5]}
    run = {"setting": "accuracy", "seed": 0, "learning_rate": 6e-4, "rollouts": 2, "steps": 2, "sft": "s", "config": ""}
    return {"kind": kind, "preset": preset, "objective": {}, **run, **measured, **cost, **PLACE, **fields}


def searched(preset: str, rate: float, accuracy: float, **fields: Any) -> Line:
    return line(preset, "search", learning_rate=rate, accuracy=accuracy, seed=3, **fields)


def test_what_is_worth_most_runs_first() -> None:
    arms = {"dipo": ["objective=dipo"], "espo": ["objective=espo"]}
    start, search, *finals = [list(stage) for stage in jobs.stages("two_passes", arms, 40, "sft")]
    assert [(job.arm, job.seed) for job, _ in start] == [("start", 0), ("start", 1), ("start", 2)]
    assert [job.arm for job, _ in search] == ["dipo"] * 3 + ["espo"] * 3
    assert {job.seed for job, _ in search}.isdisjoint(job.seed for stage in finals for job, _ in stage)
    assert [[(job.arm, job.seed) for job, _ in stage] for stage in finals] == [
        [("dipo", seed), ("espo", seed)] for seed in (0, 1, 2)
    ]
    # The same number of rollouts: with two passes twice the steps; the search takes half.
    assert [job.steps for job, _ in (start[0], search[0], finals[0][0])] == [0, 40, 80]
    assert "num_iterations=2" in search[0][0].all_overrides and "objective=dipo" in search[0][0].all_overrides


def test_the_learning_rate_of_the_best_short_run_is_chosen() -> None:
    lines = [searched("dipo", 2e-4, 0.6), searched("dipo", 6e-4, 0.7), searched("dipo", 1.8e-3, 0.7)]
    assert jobs.chosen_rate(lines, "accuracy", "dipo") == 6e-4  # the smaller of two alike
    failed = {key: value for key, value in searched("dipo", 6e-4, 0).items() if key != "accuracy"} | {"error": "NaN"}
    assert jobs.chosen_rate([lines[0], failed], "accuracy", "dipo") == 2e-4
    assert jobs.chosen_rate([failed], "accuracy", "dipo") is None
    assert jobs.chosen_rate(lines, "accuracy", "espo") is None
    fast = {"setting": "speed", "tokens_per_step": 3.0}
    lines = [searched("dipo", 2e-4, 0.6, **fast), searched("dipo", 6e-4, 0.7, setting="speed")]
    assert jobs.chosen_rate(lines, "speed", "dipo") == 2e-4


def test_a_preset_that_changed_is_another() -> None:
    old, new = {"objective": {"epsilon": 0.1}}, {"objective": {"epsilon": 0.3}}
    lines = [searched("dipo", 2e-4, 0.9, **old), searched("dipo", 6e-4, 0.7, **new), line(accuracy=0.5, **new)]
    assert jobs.chosen_rate(lines, "accuracy", "dipo") == 6e-4
    assert [found["accuracy"] for found in tables.final_lines(lines, "accuracy", "dipo")] == [0.5]
    # Done twice, the later counts.
    again = line(accuracy=0.6, **new)
    assert [found["accuracy"] for found in tables.final_lines([*lines, again], "accuracy", "dipo")] == [0.6]


def test_the_table() -> None:
    masks = {"objective": {"views": "masks"}, "packed_tokens_per_step": 250}
    lines = [
        line("start", "start", learning_rate=0.0, accuracy=0.3),
        searched("dipo", 6e-4, 0.7),
        searched("espo", 2e-4, 0.7, **masks),
        line(accuracy=0.5),
        line(accuracy=0.6, seed=1),
        line(accuracy=0.1, seed=2, learning_rate=2e-4),  # of a rate that is no longer chosen
        line("espo", accuracy=0.8, learning_rate=2e-4, **masks),
        {key: value for key, value in line("espo", seed=1, learning_rate=2e-4, **masks).items() if key != "accuracy"}
        | {"error": "ValueError: a reason"},
    ]
    title, head, _, *rows, failure = filter(None, tables.study_tables(lines).splitlines())
    assert title == "### accuracy: reward: a right answer" and head.startswith("| preset | learning rate |")
    assert rows == [
        "| before RL |  | 1 | 0.300 (0.300 to 0.300) | 0.750 | 2.00 |  |  |",
        "| `espo` | 0.0002 | 1 | 0.800 (0.800 to 0.800) | 0.750 | 2.00 | 1.00 | 2.50 |",
        "| `dipo` | 0.0006 | 2 | 0.550 (0.500 to 0.600) | 0.750 | 2.00 | 1.00 | 1.00 |",
    ]
    assert failure == "Failed: `espo`, seed 1, learning rate 0.0002: ValueError: a reason."
    assert (
        tables.places(lines) == "Measured on: hardware a machine, torch 2, commit abc; from 2026-01-02 to 2026-01-02."
    )
    assert tables.study_tables([]) == tables.places([]) == ""


def test_the_picture(tmp_path: Path) -> None:
    lines = [searched(name, 6e-4, 0.7) for name in ("dipo", "espo")]
    lines += [line("dipo", seed=seed) for seed in (0, 1)] + [line("espo", objective={"views": "masks"})]
    lines[1]["objective"] = {"views": "masks"}
    tables.draw(lines, "accuracy", tmp_path / "new" / "a.png")
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="no finished run of setting speed"):
        tables.draw(lines, "speed", tmp_path / "b.png")


def test_tables_go_between_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- begin a -->\nold\n<!-- end a -->\nafter\n")
    tables.write_between(page, "a", "| new |")
    assert page.read_text() == "before\n<!-- begin a -->\n\n| new |\n\n<!-- end a -->\nafter\n"
    assert tables.between(page.read_text(), "a") == "| new |"
    with pytest.raises(UserError, match="begin b"):
        tables.write_between(page, "b", "")


def test_the_page_has_the_tables_of_the_lines() -> None:
    lines = study.read_lines(LINES)
    expected = "\n\n".join(filter(None, (tables.study_tables(lines), tables.places(lines))))
    page = (ROOT / "docs/objectives.md").read_text()
    assert tables.between(page, "study") == expected
    assert tables.between(page, "presets") == tables.preset_table(ROOT / "configs/objectives")


def run_study(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIRL_COMMIT": "named", **variables}
    command = [sys.executable, str(ROOT / "scripts/compare_objectives.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_settings_without_a_checkpoint_are_left_out(tmp_path: Path) -> None:
    options = (
        "--sft",
        str(tmp_path),
        "--presets",
        "",
        "--lines",
        str(tmp_path / "l"),
        "--outputs",
        str(tmp_path / "o"),
    )
    assert "block_8: left out" in run_study("--settings", "block_8", *options)
    with pytest.raises(SystemExit):
        study.parse(["--settings", "none_such", "--table"])
    with pytest.raises(SystemExit):
        study.parse([])


@pytest.mark.slow
def test_a_study_of_two_arms_stops_and_goes_on(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    lines = tmp_path / "lines.jsonl"
    arguments = [
        *("--sft", str(tmp_path / "model"), "--settings", "accuracy", "--rollouts", "2", "--presets", "none_such"),
        *("--lines", str(lines), "--outputs", str(tmp_path / "runs"), "--jobs", "2"),
        *("--also", "rollout.prompts_per_step=2", "rollout.max_completion_length=8", "eval.limit=4"),
        *("--arm", "reveal", "objective.beta=0", "--arm", "broken", "max_logp_difference=1e-12"),
    ]
    said = run_study(*arguments)
    assert "accuracy none_such: left out: ConfigError" in said
    found = study.read_lines(lines)
    assert len(said.splitlines()) == 1 + len(found)
    done = {(row["preset"], row["kind"], row["seed"]) for row in found if "error" not in row}
    assert done == {("start", "start", seed) for seed in range(3)} | {("reveal", "search", 3)} | {
        ("reveal", "final", seed) for seed in range(3)
    }
    assert all(row["commit"] == "named" and len(row["sft"]) == 8 for row in found)
    broken = [row for row in found if row["preset"] == "broken"]
    assert len(broken) == 3 and all(row["error"].startswith("EngineMismatch") for row in broken)  # of the search
    (final,) = (row for row in found if row["kind"] == "final" and row["seed"] == 0)
    assert len(final["reward"]) == final["steps"] == 2 and final["packed_tokens_per_step"] > 0
    assert final["cpu_seconds_per_step"] > 0 and final["objective"] == {"scale_rewards": "group"}
    assert list((tmp_path / "runs").rglob("checkpoints")) == []
    # As a kill may leave it: the last line is cut, and its run is done again; the others are not.
    whole = lines.read_text()
    lines.write_text(whole[:-20])
    assert len(run_study(*arguments).splitlines()) == 2
    again = json.loads(lines.read_text().splitlines()[-1])
    last = json.loads(whole.splitlines()[-1])
    assert (again["accuracy"], again["reward"]) == (last["accuracy"], last["reward"])
