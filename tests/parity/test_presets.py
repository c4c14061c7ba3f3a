"""Every preset of configs/objectives trains off-policy, logs only known metrics, and resumes bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dirl.config import CONFIGS, load_config
from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.rl.rl_config import RLConfig
from dirl.rl.train import RLTrainer
from dirl.show.metric_table import TABLE

PRESETS = sorted(path.stem for path in (CONFIGS / "objectives").glob("*.yaml"))
# One of a kind: replayed, with holds, with a critic, masks drawn, one full mask, weighted draws.
KINDS = ("dipo", "dipo_exact", "tracerl_value", "coupled_grpo", "diffu_grpo", "espo")
# Two passes over each batch of rollouts, and groups that wait.
OVERRIDES = [
    *("num_iterations=2", "max_steps=4", "save_steps=2", "learning_rate=1e-3", "max_tokens_per_micro_batch=160"),
    *("rollout.prompts_per_step=2", "rollout.num_generations=3", "rollout.max_completion_length=16"),
    *("rollout.oversampling=1.5", "rollout.needs_right=false", "rollout.min_spread.tokens_per_step=0"),
    *(f"reward.functions=[{__file__}:even_length,tokens_per_step]", "eval.path=", "lora.r=2"),
]


class Killed(RuntimeError):
    """The process is gone."""


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def trainer(preset: str, output_dir: Path) -> RLTrainer:
    model, tokenizer = tiny()
    overrides = [f"objective={preset}", f"output_dir={output_dir}", *OVERRIDES]
    config = load_config(RLConfig, CONFIGS / "tiny" / "rl.yaml", overrides)
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def rows(output_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = ("timing_s/", "perf/", "time")
    return [{name: value for name, value in row.items() if not name.startswith(measured)} for row in lines]


def weights(trained: RLTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trained.model.state_dict().items()}


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[] if name in KINDS else pytest.mark.slow) for name in PRESETS]
)
def test_a_preset_trains_and_resumes(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(preset, tmp_path / "whole")
    before = weights(whole)
    whole.train()
    expected = weights(whole)
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())

    killed = trainer(preset, tmp_path / "parts")
    step = killed.step

    def step_until_killed() -> dict[str, float]:
        if killed.steps_done == 2:
            raise Killed
        return step()

    monkeypatch.setattr(killed, "step", step_until_killed)
    with pytest.raises(Killed):
        killed.train()
    resumed = trainer(preset, tmp_path / "parts")
    resumed.train()
    found = rows(tmp_path / "parts")
    assert [row["step"] for row in found] == [2, 4]
    assert found == rows(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())
    assert all(TABLE.row(name) for row in found for name in row)
    assert all(row["sampling/logp_difference/mean"] < 1e-4 for row in found), (
        "the engine is compared, whatever is scored"
    )
