"""Two hundred steps of RL leave nothing behind: no memory, no file handle, no process."""

from __future__ import annotations

import gc
from pathlib import Path

import psutil
import pytest

from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.killable_pool import count_usable_cores
from dirl.reward.rubric import RewardConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer


@pytest.mark.matrix
def test_200_steps_do_not_grow(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    config = RLConfig(
        output_dir=str(tmp_path),
        max_steps=200,
        learning_rate=1e-4,
        save_steps=25,
        completions_steps=10,
        rollout=RolloutConfig(prompts_per_step=4, num_generations=4, max_completion_length=16, oversampling=1.5),
        # With the grader's pool of processes: they must end with the run.
        reward=RewardConfig(functions=["accuracy", "tests.rl.test_update:even_length"], weights=[0.1, 1.0]),
    )
    problems = [Problem("?" * (1 + index % 9), str(index), {}) for index in range(40)]
    trainer = RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)
    process = psutil.Process()
    seen: dict[int, tuple[int, int, int]] = {}
    step = trainer.step

    def watched() -> dict[str, float]:
        metrics = step()
        if trainer.steps_done in (20, 200):
            gc.collect()
            memory = process.memory_info().rss
            seen[trainer.steps_done] = (memory, process.num_fds(), len(process.children(recursive=True)))
        return metrics

    trainer.step = watched  # type: ignore[method-assign]
    trainer.train()
    (early_memory, early_files, _), (memory, files, children) = seen[20], seen[200]
    print(
        f"memory at step 20 and 200: {early_memory / 1e6:.1f} and {memory / 1e6:.1f} MB; files {early_files}, {files}"
    )
    assert memory < 1.05 * early_memory
    assert files <= early_files + 4  # the first save, after step 20, opens a few that stay
    assert children <= min(4, count_usable_cores())  # the grader's, which start when an answer first needs them
