"""Rollouts -> optimizer steps: on-policy, with several steps per rollout, and with a KL."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dirl.data.problems import Problem
from dirl.diffusion.likelihood import Likelihood
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.policy_loss import LossType
from dirl.rl.rollout_group import RolloutConfig, RolloutGroup
from dirl.rl.train import RLConfig, RLTrainer

CONFIG = RLConfig(
    output_dir="unused",
    max_steps=4,
    learning_rate=1e-3,
    rollout=RolloutConfig(prompts_per_step=4, num_generations=4, max_completion_length=12),
    reward=RewardConfig(functions=["tests.rl.test_update:even_length"]),
)


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def trainer(config: RLConfig) -> RLTrainer:
    model, tokenizer = tiny()
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def rolled_out(trained: RLTrainer) -> list[RolloutGroup]:
    return trained.collector.collect(0, trained.distributed, trained.timings).groups


@pytest.mark.parametrize("likelihood", ["reveal", "trajectory"])
def test_first_update_is_on_policy(likelihood: Likelihood) -> None:
    trained = trainer(replace(CONFIG, beta=0.1, likelihood=likelihood))
    first, second = trained.step(), trained.step()
    assert first["clip_ratio/region_mean"] == 0
    assert first["kl"] == 0
    assert second["kl"] > 0
    assert second["clip_ratio/region_mean"] == 0
    assert first["sampling/logp_difference/max"] < 1e-4


@pytest.mark.parametrize("likelihood", ["reveal", "trajectory"])
@pytest.mark.parametrize(("num_iterations", "steps_per_generation"), [(2, 1), (1, 2), (2, 2)])
def test_several_steps_per_rollout(likelihood: Likelihood, num_iterations: int, steps_per_generation: int) -> None:
    config = replace(
        CONFIG, likelihood=likelihood, num_iterations=num_iterations, steps_per_generation=steps_per_generation
    )
    trained = trainer(replace(config, epsilon=1e-3, epsilon_high=1e-3))
    metrics = trained.step()
    assert trained.steps_done == num_iterations * steps_per_generation
    assert trained.learner.scheduler.state_dict()["last_epoch"] == trained.steps_done
    # The policy has left the one that sampled by more than the narrow clip.
    assert 0 < metrics["clip_ratio/region_mean"] < 1
    assert metrics["skipped_steps"] == 0


@pytest.mark.parametrize(("shift", "clipped"), [(1.0, "clip_ratio/low_mean"), (-1.0, "clip_ratio/high_mean")])
def test_off_policy_ratios_use_what_the_engine_recorded(shift: float, clipped: str) -> None:
    """An engine that recorded one nat more or less: every ratio starts at exp(-shift), beyond the clip."""
    trained = trainer(replace(CONFIG, num_iterations=2, learning_rate=0.0))
    groups = [
        replace(g, completions=[replace(c, logprobs=[x + shift for x in c.logprobs or []]) for c in g.completions])
        for g in rolled_out(trained)
    ]
    advantages = trained.advantages(groups)
    metrics = trained.updater.update(groups, advantages)
    tokens = [
        (float(a), len(c.token_ids))
        for g, A in zip(groups, advantages, strict=True)
        for a, c in zip(A, g.completions, strict=True)
    ]
    one_sided = sum(n for a, n in tokens if (a < 0 if shift > 0 else a > 0)) / sum(n for _, n in tokens)
    assert metrics[clipped] == pytest.approx(one_sided)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(one_sided)
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(1.0, abs=1e-4)


def test_without_recorded_logprobs_the_first_pass_is_on_policy() -> None:
    trained = trainer(replace(CONFIG, num_iterations=2, learning_rate=0.0, likelihood="trajectory"))
    groups = [replace(g, completions=[replace(c, logprobs=None) for c in g.completions]) for g in rolled_out(trained)]
    metrics = trained.updater.update(groups, trained.advantages(groups))
    assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_fewer_groups_than_steps(loss_type: LossType) -> None:
    trained = trainer(replace(CONFIG, steps_per_generation=2, loss_type=loss_type))
    groups = rolled_out(trained)[:1]
    before = [parameter.clone() for parameter in trained.model.parameters()]
    metrics = trained.updater.update(groups, trained.advantages(groups))
    assert metrics["grad_norm"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
