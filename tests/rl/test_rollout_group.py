"""Which groups are trained on, which are dropped and replaced."""

from __future__ import annotations

import pytest

from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.collector import Collected, Collector, NoSignal, RolloutConfig, Rollouts
from dirl.rl.rollout_group import render_prompts
from dirl.rl.rollout_metrics import rollout_metrics, summarise
from dirl.rollout.engine import SamplingConfig
from dirl.training.distributed import Distributed
from dirl.training.metrics import Timings
from tests.eval.scripted_engine import ScriptedEngine

TOKENIZER = tiny()[1]


def scripted_rewards(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(completion) for completion in completions]


def collect(questions: list[str], config: RolloutConfig, *, seed: int = 0) -> tuple[Collected, ScriptedEngine]:
    """Questions that hold `easy` are always answered right, `hard` never, others every second time."""
    asked: list[str] = []

    def script(prompt: str, _seed: int, _sampling: SamplingConfig) -> str:
        asked.append(prompt)
        return "1" if "easy" in prompt else "0" if "hard" in prompt else str(len(asked) % 2)

    engine = ScriptedEngine(TOKENIZER, script)
    problems = [Problem(question, "1", {}) for question in questions]
    prompts, _ = render_prompts(problems, TOKENIZER, system_prompt="", suffix="", max_length=100)
    rubric = Rubric(RewardConfig(functions=["tests.rl.test_rollout_group:scripted_rewards"]))
    collector = Collector(prompts, Rollouts(engine, rubric, config, Timings(), (4, 64)), Distributed(), seed)
    return collector.collect(0), engine


def test_groups_without_spread_are_dropped_counted_and_replaced() -> None:
    questions = ["easy 1", "easy 2", "hard 1", *(f"open {i}" for i in range(5))]
    config = RolloutConfig(prompts_per_step=4, num_generations=4, max_sampling_rounds=8)
    for seed in range(4):
        collected, engine = collect(questions, config, seed=seed)
        kept = [group.prompt.problem.question for group in collected.groups]
        dropped = [group.prompt.problem.question for group in collected.dropped]
        assert len(kept) == 4
        assert all(question.startswith("open") for question in kept)
        assert not any(question.startswith("open") for question in dropped)
        assert engine.num_generated == 4 * (len(kept) + len(dropped))
        metrics = rollout_metrics(summarise(collected))
        assert metrics["groups/kept"] == 4
        assert metrics["groups/dropped_all_correct"] == sum(question.startswith("easy") for question in dropped)
        assert metrics["groups/dropped_all_wrong"] == sum(question.startswith("hard") for question in dropped)
        assert metrics["frac_reward_zero_std"] == pytest.approx(len(dropped) / (len(dropped) + 4))


def test_rounds_are_capped() -> None:
    """One question in eight is informative: each further round asks for the seven that are missing."""
    questions = ["open", *(f"hard {i}" for i in range(7))]
    collected, engine = collect(questions, RolloutConfig(prompts_per_step=8, num_generations=2, max_sampling_rounds=1))
    assert (len(collected.groups), len(collected.dropped), engine.num_generated) == (1, 7, 16)
    collected, engine = collect(questions, RolloutConfig(prompts_per_step=8, num_generations=2, max_sampling_rounds=2))
    assert len(collected.groups) + len(collected.dropped) == 8 + 7
    assert engine.num_generated == 2 * (8 + 7)


def test_without_dynamic_sampling_everything_is_kept() -> None:
    collected, engine = collect(
        ["easy", "hard", "open"], RolloutConfig(prompts_per_step=3, num_generations=2, dynamic_sampling=False)
    )
    assert (len(collected.groups), len(collected.dropped), engine.num_generated) == (3, 0, 6)


def test_no_signal_is_an_error() -> None:
    with pytest.raises(NoSignal, match=r"equal in 3 rounds of 2 prompts.*for example '(easy|hard)' -> .*reward [01]$"):
        collect(["easy", "hard"], RolloutConfig(prompts_per_step=2, num_generations=2, max_sampling_rounds=3))


def test_every_rollout_has_its_own_seed() -> None:
    seeds: list[int] = []

    def script(_prompt: str, seed: int, _sampling: SamplingConfig) -> str:
        seeds.append(seed)
        return str(seed % 2)

    prompts, _ = render_prompts([Problem("?", "1", {})], TOKENIZER, system_prompt="", suffix="", max_length=100)
    rubric = Rubric(RewardConfig(functions=["tests.rl.test_rollout_group:scripted_rewards"]))
    config = RolloutConfig(prompts_per_step=4, num_generations=4, dynamic_sampling=False)
    rollouts = Rollouts(ScriptedEngine(TOKENIZER, script), rubric, config, Timings(), (4, 64))
    collector = Collector(prompts, rollouts, Distributed(), 0)
    for step in range(2):
        collector.collect(step)
    assert len(set(seeds)) == 2 * 4 * 4


def test_long_prompts_are_left_out_and_counted() -> None:
    problems = [Problem("x" * length, "1", {}) for length in (1, 5, 50)]
    prompts, num_left_out = render_prompts(problems, TOKENIZER, system_prompt="", suffix="!", max_length=20)
    assert [prompt.problem.question for prompt in prompts] == ["x", "xxxxx"]
    assert num_left_out == 1


@pytest.mark.parametrize(
    ("num_generations", "rounds", "named"), [(1, 1, "num_generations"), (2, 0, "max_sampling_rounds")]
)
def test_impossible_settings_are_errors(num_generations: int, rounds: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RolloutConfig(num_generations=num_generations, max_sampling_rounds=rounds)
