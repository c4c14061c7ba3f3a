"""Two processes, one of which has more completions, make the oracle's steps.

This file is also the script that the processes run: `torch.distributed.run ... test_objective_processes.py OUT`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.launching import launch_script
from tests.rl.objective_runs import config_of, groups_of, slow_step, smallest_budget, taken_steps, trainer_of

PRESETS = ("coupled_grpo", "dapo", "espo", "gspo", "lightning")
RANKS = [[0, 1, 2], [3, 4, 5, 6, 7, 8]]  # numbers of the completions of each process: groups are never parted


def train(output_dir: Path) -> None:
    """The steps of every preset, each completion in several micro-batches; written by the main process."""
    for preset in PRESETS:
        config = config_of([f"objective={preset}"])
        groups = groups_of(config)
        trained = trainer_of(replace(config, max_tokens_per_micro_batch=smallest_budget(config, groups)))
        assert trained.distributed.world_size == 2
        steps = taken_steps(trained, groups[1:] if trained.distributed.rank else groups[:1])
        if trained.distributed.is_main:
            rows = [(step.loss, step.gradient, step.model.state_dict()) for step in steps]
            torch.save(rows, output_dir / f"{preset}.pt")
    trained.distributed.close()


@pytest.mark.slow
def test_two_processes_make_the_steps_of_the_oracle(tmp_path: Path) -> None:
    done = launch_script(__file__, str(tmp_path), backend="ddp", num_processes=2, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    for preset in PRESETS:
        config = config_of([f"objective={preset}"])
        groups, model = groups_of(config), trainer_of(config).model
        rows = torch.load(tmp_path / f"{preset}.pt", weights_only=True)
        assert len(rows) == 2
        for iteration, (loss, found, weights) in enumerate(rows):
            model.load_state_dict(weights)
            expected_loss, expected = slow_step(config, groups, model, iteration=iteration, ranks=RANKS)
            assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-6), (preset, iteration)
            assert float((found - expected).norm()) <= 1e-5 * float(expected.norm()), (preset, iteration)


if __name__ == "__main__":
    train(Path(sys.argv[1]))
