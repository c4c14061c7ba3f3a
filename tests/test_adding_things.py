"""What a researcher adds without touching the package, each in fewer than 40 lines: an objective, an engine, a stage.

A metric is one row: tests/show/test_metric_table.py adds one.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from dirl.data.chat import stop_token_ids
from dirl.data.problems import Problem
from dirl.data.prompt_stream import PromptStream
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import DiffusionScheme, Views
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import noisy_views
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.objective import VIEWS, ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.rollout.decoded import make_completion, touched_tokens
from dirl.rollout.engine import Completion, RolloutEngine, SamplingConfig
from dirl.training.loop import Trainer, TrainingConfig
from dirl.training.optimizer import Learner, Loss
from tests.show import test_metric_table

SCHEME = DiffusionScheme(block_length=4, mask_token_id=tiny()[0].config.mask_token_id)
CONFIG = RLConfig(
    output_dir="unused",
    max_steps=4,
    learning_rate=1e-3,
    rollout=RolloutConfig(prompts_per_step=3, num_generations=4, max_completion_length=12),
    reward=RewardConfig(functions=["tests.rl.test_update:even_length"]),
)


def rl_trainer(config: RLConfig, engine: RolloutEngine | None = None) -> RLTrainer:
    model, tokenizer = tiny()
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems, engine=engine)


# An objective: the finished text at random masks, one ratio a completion.


def random_masks(trajectory: Trajectory, mask_token_id: int, objective: ObjectiveConfig, seed: int) -> Views:
    """The same masks whenever the completion is scored: by the policy, as its behaviour, and by the reference."""
    generator = torch.Generator().manual_seed(seed)
    scored_KB = trajectory.steps_KB > 0
    levels_K = 0.1 + 0.9 * torch.rand(len(scored_KB), generator=generator)
    return noisy_views(trajectory, scored_KB, levels_K, mask_token_id, noise=NoiseConfig(), generator=generator)


def test_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VIEWS, "random_masks", random_masks)
    objective = ObjectiveConfig(views="random_masks", importance_sampling_level="sequence", beta=0.01, epsilon=1e-4)
    trainer = rl_trainer(replace(CONFIG, objective=objective, num_iterations=2))
    metrics = trainer.step()
    assert metrics["grad_norm"] > 0 and metrics["kl"] > 0
    assert 0 < metrics["clip_ratio/region_mean"] < 1, "the second pass has left the policy that sampled"
    assert metrics["sampling/logp_difference/mean"] < 1e-3, "a few completions are replayed for it"


# An engine: whatever has these members.


class Parrot:
    """Says the beginning of the prompt again, a block a step, and then stops."""

    def __init__(self) -> None:
        self.tokenizer = tiny()[1]
        self.weights_version = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> list[Completion]:
        sizes = touched_tokens(prompts, seeds, sampling, SCHEME)
        return [self._repeat(list(p), size, seed) for p, size, seed in zip(prompts, sizes, seeds, strict=True)]

    def _repeat(self, prompt: list[int], size: int, seed: int) -> Completion:
        said = [*prompt[: 1 + seed % 5], *stop_token_ids(self.tokenizer)[:1] * size][:size]
        return make_completion(prompt, said, [1] * size, None, tokenizer=self.tokenizer, scheme=SCHEME)

    def update_weights(self, model: nn.Module) -> None:
        self.weights_version += 1

    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...


def test_an_engine() -> None:
    parrot = Parrot()
    metrics = rl_trainer(CONFIG, parrot).step()
    assert metrics["grad_norm"] > 0 and metrics["completions/max_length"] <= 6
    assert parrot.weights_version == 1


# A stage: what a step is; when it happens, is saved, logged, resumed and reported is the loop's.


class Regression(Trainer):
    """Learns the sum of two numbers."""

    stage = "sft"

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config)
        torch.manual_seed(config.seed)
        self.learner = Learner(nn.Linear(2, 1), config, self.distributed, on_micro_batch=self.show_micro_batch)
        self.source = self.stream = PromptStream(100, config.seed)

    def step(self) -> dict[str, float]:
        rows = torch.tensor([[i % 10, i // 10] for i in self.stream.take(8)]) / 10
        outcome = self.learner.update([partial(self.loss, rows)], partial(self.loss, rows))
        self.steps_done += 1
        return outcome.metrics

    def loss(self, rows: torch.Tensor) -> Loss:
        error = self.learner.module(rows).squeeze(1) - rows.sum(1)
        return Loss(error.square().mean(), len(rows))

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"error {metrics['loss']:.3g}"

    def write_final(self) -> Path:
        (final := Path(self.config.output_dir, "final")).mkdir(exist_ok=True)
        torch.save(self.distributed.unwrap(self.learner.module).state_dict(), final / "weights.pt")
        return final


def test_a_stage(tmp_path: Path) -> None:
    config = TrainingConfig(output_dir=str(tmp_path), max_steps=60, learning_rate=0.05, save_steps=30)
    final = Regression(config).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and lines[-1]["loss"] < 0.01 < lines[0]["loss"]
    assert (final / "weights.pt").is_file() and (tmp_path / "report.html").is_file()
    assert (tmp_path / "checkpoints" / "step_000060").is_dir()
    assert Regression(config).train() == final, "and again: nothing is left to do"


@pytest.mark.parametrize(
    "demonstration",
    [
        (random_masks, test_an_objective),
        (Parrot, test_an_engine),
        (Regression, test_a_stage),
        (test_metric_table.test_a_new_metric_is_one_row,),
    ],
)
def test_each_takes_fewer_than_40_lines(demonstration: tuple[Callable[..., object], ...]) -> None:
    assert sum(len(inspect.getsource(each).strip().splitlines()) for each in demonstration) < 40
