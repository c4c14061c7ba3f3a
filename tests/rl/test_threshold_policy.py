"""The policy of thresholds: its gradient by enumeration, what it reads and draws, that it learns, where it goes."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dirl.data.problems import Problem
from dirl.errors import UserError
from dirl.model.logprobs import PackedScorer
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.advantage import advantages_of
from dirl.rl.collector import Collector
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig, RLEvalConfig
from dirl.rl.rollout_group import Prompt, RolloutGroup, ThresholdChoice, render_prompts
from dirl.rl.rollouts import RolloutConfig, Rollouts
from dirl.rl.threshold_policy import (
    ThresholdConfig,
    ThresholdPolicy,
    build_threshold_policy,
    prompt_states,
    threshold_loss,
)
from dirl.rl.train import RLTrainer
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.training.distributed import Distributed
from dirl.training.metrics import Timings
from tests.eval.scripted_engine import ScriptedEngine
from tests.oracle import brute_force_actions, sharp_tiny_model

STATES = torch.eye(2)
TWO = ThresholdConfig(threshold_policy=[0.3, 0.9])


def policy(config: ThresholdConfig = TWO) -> ThresholdPolicy:
    """Over prompts [0] and [1], whose states are the unit vectors."""

    def states_of(prompts: Sequence[Sequence[int]]) -> Tensor:
        return STATES[[prompt[0] for prompt in prompts]]

    return ThresholdPolicy(config, states_of, ObjectiveConfig(), Distributed(), hidden_size=2)


def group(prompt: int, chosen: list[int], rewards: list[float], logprob_K: Tensor) -> RolloutGroup:
    choice = ThresholdChoice(chosen, [float(logprob_K[k]) for k in chosen], STATES[prompt].tolist())
    asked = Prompt(Problem("?", "1", {}), [prompt])
    return RolloutGroup(prompt=asked, completions=[], rewards=rewards, reward_parts={}, threshold_choice=choice)


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Two prompts and two thresholds, drawn as often as their probabilities say: 1/4 and 3/4, 1/2 and 1/2."""
    head = policy()
    with torch.no_grad():
        head.weight_KD[1, 0] = math.log(3)
    weight, bias = (x.detach().clone().requires_grad_() for x in (head.weight_KD, head.bias_K))
    reward_PK = torch.tensor([[1.0, -0.5], [0.25, 2.0]])
    expectation = ((STATES @ weight.T + bias).softmax(1) * reward_PK).sum(1).mean()
    expected = torch.autograd.grad(expectation, (weight, bias))
    with torch.no_grad():
        logprob_PK = head.logprobs(STATES)
    assert logprob_PK.exp().tolist() == [pytest.approx([0.25, 0.75]), pytest.approx([0.5, 0.5])]
    groups = [
        group(prompt, chosen, [float(reward_PK[prompt, k]) for k in chosen], logprob_PK[prompt])
        for prompt, chosen in enumerate([[0, 1, 1, 1], [0, 1, 0, 1]])
    ]
    metrics = head.update(groups, advantages_of(groups, ObjectiveConfig(), Distributed()))
    for parameter, gradient in zip((head.weight_KD, head.bias_K), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(-parameter.grad, gradient)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected))
    entropies = [-sum(p * math.log(p) for p in row) for row in ([0.25, 0.75], [0.5, 0.5])]
    assert metrics == pytest.approx(
        {
            "threshold/mean": (5 * 0.9 + 3 * 0.3) / 8,
            "threshold/entropy": sum(entropies) / 2,
            "threshold/grad_norm": norm,
        }
    )


def test_the_surrogate_is_clipped_as_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    logprob_NK = torch.randn(40, 3, generator=generator).log_softmax(1)
    index_N = torch.randint(0, 3, (40,), generator=generator)
    behavior_N = torch.randn(40, 3, generator=generator).log_softmax(1)[:, 0]
    advantage_N = torch.randn(40, generator=generator)
    total, num_clipped = 0.0, 0
    for n, k in enumerate(index_N.tolist()):
        ratio, advantage = math.exp(float(logprob_NK[n, k]) - float(behavior_N[n])), float(advantage_N[n])
        clipped = min(max(ratio, 0.9), 1.3)
        num_clipped += clipped * advantage < ratio * advantage
        total -= min(ratio * advantage, clipped * advantage)
    found = threshold_loss(logprob_NK, index_N, behavior_N, advantage_N, ObjectiveConfig(epsilon=0.1, epsilon_high=0.3))
    assert float(found) == pytest.approx(total, rel=1e-5) and 5 < num_clipped < 35


def test_a_draw_depends_on_prompt_seed_and_place_only() -> None:
    head = policy(ThresholdConfig(threshold_policy=[0.3, 0.6, 0.9]))
    with torch.no_grad():
        head.weight_KD[:, 1] = torch.tensor([0.1, 0.6, 0.3]).log()
    prompts, seeds = [[0], [1], [1], [0]], [11, 12, 13, 14]
    together = head.draw(prompts, seeds, 5)
    assert together == [head.draw([prompt], [seed], 5)[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert head.draw([[1]], [12], 3)[0].indices == together[1].indices[:3]
    (many,) = head.draw([[1]], [7], 20_000)
    frequencies = [many.indices.count(k) / 20_000 for k in range(3)]
    assert frequencies == pytest.approx([0.1, 0.6, 0.3], abs=0.015)
    logprobs = {k: math.log(p) for k, p in enumerate([0.1, 0.6, 0.3])}
    assert many.logprobs[:50] == pytest.approx([logprobs[k] for k in many.indices[:50]], abs=1e-6)
    assert head.best([[1], [0]]) == [0.6, 0.3]


@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_states_are_those_of_the_whole_prompt_and_nothing_after_it(budget: int) -> None:
    model, _ = sharp_tiny_model()
    prompts = [[(7 * i + j) % 250 for j in range(length)] for i, length in enumerate([1, 4, 5, 8, 11, 3, 12])]
    scorer = PackedScorer(model).train()
    found_PD = prompt_states(scorer, [*prompts, prompts[2]], budget=budget)
    assert scorer.training
    model.eval()
    for prompt, state_D in zip([*prompts, prompts[2]], found_PD, strict=True):
        with torch.no_grad():
            hidden_D = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(state_D, hidden_D / hidden_D.norm(), atol=1e-5, rtol=0)
    assert prompt_states(scorer, [], budget=budget).shape == (0, model.config.hidden_size)


def scripted_rewards(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(completion) for completion in completions]


def test_it_learns_to_spend_steps_where_they_help() -> None:
    """Easy prompts are best answered at a low threshold, hard ones at a high one."""
    model, tokenizer = sharp_tiny_model()

    def script(prompt: str, seed: int, sampling: SamplingConfig) -> str:
        is_high, is_noise = sampling.confidence_threshold > 0.5, seed % 4 == 0
        return str(int((is_high == ("hard" in prompt)) != is_noise))

    problems = [Problem(f"{kind} {i}", "1", {}) for kind in ("easy", "hard") for i in range(4)]
    prompts, _ = render_prompts(problems, tokenizer, system_prompt="", suffix="", max_length=100)
    config = RolloutConfig(
        prompts_per_step=8, num_generations=16, threshold_policy=[0.3, 0.9], threshold_policy_learning_rate=0.1
    )
    distributed = Distributed()
    head = build_threshold_policy(config, PackedScorer(model), ObjectiveConfig(), distributed, budget=64, bf16=False)
    assert head is not None
    rubric = Rubric(RewardConfig(functions=["tests.rl.test_threshold_policy:scripted_rewards"]))
    rollouts = Rollouts(ScriptedEngine(tokenizer, script), rubric, config, Timings(), (tiny()[0].scheme, 64), head)
    collector = Collector(prompts, rollouts, distributed, 0)
    metrics, collected = [], []
    for step in range(25):
        groups = collector.collect(step).groups
        metrics.append(head.update(groups, advantages_of(groups, ObjectiveConfig(), distributed)))
        collected.append(groups)
    assert metrics[0]["threshold/entropy"] == pytest.approx(math.log(2))
    with torch.no_grad():
        probability_PK = head.logprobs(head.states_of([prompt.token_ids for prompt in prompts])).exp()
    for prompt, (low, high) in zip(prompts, probability_PK.tolist(), strict=True):
        assert (high if "hard" in prompt.problem.question else low) > 0.8
    rewards = [statistics.fmean(reward for group in groups for reward in group.rewards) for groups in collected]
    # At best 0.75: one answer in four is judged the wrong way.
    assert rewards[0] == pytest.approx(0.5, abs=0.1) and rewards[-1] > 0.65


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


CONFIG = RLConfig(
    output_dir="unused",
    max_steps=4,
    learning_rate=1e-3,
    objective=ObjectiveConfig(likelihood="trajectory"),
    rollout=RolloutConfig(
        prompts_per_step=3,
        num_generations=4,
        max_completion_length=12,
        oversampling=2.0,
        threshold_policy=[0.05, 0.2, 0.9],
    ),
    reward=RewardConfig(functions=["tests.rl.test_threshold_policy:even_length"]),
)


def trainer(config: RLConfig = CONFIG) -> RLTrainer:
    model, tokenizer = sharp_tiny_model()
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    return RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)


def test_completions_are_decoded_and_scored_with_their_own_thresholds() -> None:
    trained = trainer()
    collected = trained.collector.collect(0)
    thresholds = trained.config.rollout.threshold_policy
    seen = set()
    for one in collected.groups:
        choice = one.threshold_choice
        assert choice is not None
        own = [thresholds[index] for index in choice.indices]
        assert [completion.confidence_threshold for completion in one.completions] == own
        seen |= set(own)
        for completion, threshold in zip(one.completions, own, strict=True):
            (batch,) = trained.updater._packed([replace(one, completions=[completion])])
            with torch.no_grad():
                found_T = trained.learner.module(batch.packed, trained.updater.rule).logprob_T
                sampling = replace(trained.config.rollout, confidence_threshold=threshold)
                expected_T = brute_force_actions(trained.model, completion, sampling)
            torch.testing.assert_close(found_T, expected_T, atol=2e-4, rtol=0)
    assert seen == set(thresholds)


def test_groups_that_wait_keep_their_choices_through_a_checkpoint() -> None:
    trained = trainer()
    trained.step()
    waiting = trained.collector.waiting
    assert waiting and all(group.threshold_choice for group in waiting)
    state = json.loads(json.dumps(trained.collector.state_dict(), allow_nan=False))
    again = trainer()
    again.collector.load_state_dict(state)
    assert again.collector.waiting == waiting
    assert again.thresholds is not None and trained.thresholds is not None
    assert again.thresholds.state_dict() == trained.thresholds.state_dict()
    assert any(map(any, again.thresholds.as_row()["weight"]))
    for rollout in (
        replace(CONFIG.rollout, threshold_policy=[]),
        replace(CONFIG.rollout, threshold_policy=[0.05, 0.9]),
    ):
        other = trainer(replace(CONFIG, rollout=rollout))
        with pytest.raises(UserError, match=r"threshold_policy=\[.*written with \[0.05, 0.2, 0.9\]; resume with that"):
            other.collector.load_state_dict(state)


def test_evaluation_takes_the_best_threshold_of_each_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        CONFIG, output_dir=str(tmp_path), max_steps=1, eval=RLEvalConfig(path="task:noisy_sums", limit=3, num_samples=2)
    )
    trained = trainer(config)
    asked: list[tuple[Sequence[Sequence[int]], Sequence[float] | None]] = []
    generate = trained.engine.generate

    def recording(
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> list[Completion]:
        asked.append((prompts, thresholds))
        return generate(prompts, sampling, seeds, thresholds)

    monkeypatch.setattr(trained.engine, "generate", recording)
    final = trained.train()
    assert trained.thresholds is not None
    for prompts, thresholds in asked[-2:]:  # sampled, greedy
        assert thresholds == trained.thresholds.best(prompts)
    row = json.loads((final / "threshold_policy.json").read_text())
    assert row == trained.thresholds.as_row() and row["thresholds"] == [0.05, 0.2, 0.9]


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value, reason in (
        ("unmasking_strategy", "sequential", r"needs unmasking_strategy=low_confidence_dynamic: sequential has no"),
        ("engine", "lmdeploy", r"one for all completions; set rollout\.engine=torch"),
        ("threshold_policy", [0.5], r"at least two thresholds, all different, got \[0\.5\]"),
        ("threshold_policy", [0.5, 0.5], r"at least two thresholds, all different"),
        ("threshold_policy", [0.0, 0.5], r"threshold_policy"),
        ("threshold_policy", [0.5, 1.1], r"threshold_policy"),
    ):
        with pytest.raises(ValueError, match=reason):
            replace(CONFIG.rollout, **{key: value})
    model, _ = tiny()
    distributed = Distributed()
    monkeypatch.setattr(Distributed, "backend", "zero3")
    with pytest.raises(UserError, match="under zero3 none has whole weights; set ACCELERATE_CONFIG to zero1 or zero2"):
        build_threshold_policy(TWO, PackedScorer(model), ObjectiveConfig(), distributed, budget=8, bf16=False)
    assert (
        build_threshold_policy(
            ThresholdConfig(), PackedScorer(model), ObjectiveConfig(), distributed, budget=8, bf16=False
        )
        is None
    )
