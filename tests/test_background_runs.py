"""Runs of the embedded default whose evaluations go on beside training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dirl import cli
from dirl.config import CONFIGS
from dirl.model.tiny import save_tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_through_the_command_line(stage: str, tmp_path: Path) -> None:
    """The embedded default, with evaluations in the loop and beside it: the same numbers in the same lines."""
    save_tiny_model(tmp_path / "base")
    small = {
        "sft": ["data.limit=60", "data.num_heldout=8", "global_batch_size=4", "warmup_steps=0"],
        "rl": ["rollout.prompts_per_step=2", "rollout.max_sampling_rounds=1", "eval.limit=4"],
    }[stage]
    for background in ("false", "true"):
        changes = [
            f"model.path={tmp_path / 'base'}",
            f"output_dir={tmp_path / background}",
            "max_steps=4",
            "eval_steps=2",
        ]
        command = [stage, str(CONFIGS / f"tiny/{stage}.yaml"), *changes, *small, f"eval.background={background}"]
        assert cli.main([*command, "max_steps=4", "eval_steps=2", "logging_steps=1"]) == 0
    loop, later = (
        [
            {name: value for name, value in json.loads(line).items() if name.startswith("eval/") or name == "step"}
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in ("false", "true")
    )
    assert later == loop and [len(row) > 1 for row in loop] == [False, True, False, True]
    assert list((tmp_path / "true/evaluations").iterdir()) == []
