"""Which groups are trained on, which are dropped and replaced."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter

import pytest

from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Rubric, combine_parts
from dirl.rl.advantage import advantages_of
from dirl.rl.collector import Collected, Collector, NoSignal
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollout_group import Prompt, RolloutGroup, render_prompts
from dirl.rl.rollout_metrics import rollout_metrics, summarise
from dirl.rl.rollouts import RolloutConfig, Rollouts
from dirl.rollout.engine import SamplingConfig
from dirl.training.distributed import Distributed
from dirl.training.metrics import Timings
from tests.eval.scripted_engine import ScriptedEngine

MODEL, TOKENIZER = tiny()


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
    collector = Collector(prompts, Rollouts(engine, rubric, config, Timings(), (MODEL.scheme, 64)), Distributed(), seed)
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


FILTERED = RolloutConfig(
    prompts_per_step=4, num_generations=4, max_sampling_rounds=30, needs_right=True, min_spread={"tokens_per_step": 0.3}
)


def random_group(rng: random.Random) -> RolloutGroup:
    """Four completions with few values, so that every reason to drop a group comes up."""
    accuracy = [float(rng.random() < 0.3) for _ in range(4)]
    speed = [None if rng.random() < 0.1 else rng.choice([1.0, 1.25, 1.5]) for _ in range(4)]
    rewards = [right + rng.choice([0.0, 0.0, 0.5]) for right in accuracy]
    parts = {"accuracy": list(accuracy), "tokens_per_step": speed}
    prompt = Prompt(Problem("?", "1", {}), [1])
    return RolloutGroup(prompt=prompt, completions=[], rewards=rewards, reward_parts=parts)  # type: ignore[arg-type]


def test_reasons_to_drop_a_group_against_loops() -> None:
    rng, found = random.Random(0), Counter[str | None]()
    for _ in range(500):
        group = random_group(rng)
        expected: str | None = "equal_rewards"
        for one, other in itertools.combinations(group.rewards, 2):
            if one != other:
                expected = "none_right"
        if expected == "none_right":
            for right in group.reward_parts["accuracy"]:
                if right:
                    expected = "small_spread"
        if expected == "small_spread":
            for one, other in itertools.permutations(group.reward_parts["tokens_per_step"], 2):
                if one is not None and other is not None and one - other >= 0.3:
                    expected = None
        assert FILTERED.reason_to_drop(group) == expected
        assert RolloutConfig(dynamic_sampling=False).reason_to_drop(group) is None
        found[expected] += 1
    assert min(found.values()) > 10 and len(found) == 4


def test_groups_without_a_right_completion_or_spread_are_dropped_counted_and_replaced() -> None:
    """`open` ones are answered in one to three tokens and an end, `same` ones in as many tokens each time."""

    def answer(prompt: str, seed: int, _sampling: SamplingConfig) -> str:
        right = 0 if "hard" in prompt else seed % 2
        return str(right) + "." * (0 if "same" in prompt else seed % 3)

    def rightness(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
        return [float(completion[0]) for completion in completions]

    questions = [f"{kind} {i}" for kind in ("hard", "open", "same") for i in range(6)]
    prompts, _ = render_prompts(
        [Problem(question, "1", {}) for question in questions], TOKENIZER, system_prompt="", suffix="", max_length=100
    )
    rubric = Rubric(RewardConfig(functions=["tokens_per_step"], combine="normalize_then_sum"))
    rubric.functions["accuracy"], rubric.weights["accuracy"], rubric._parameters["accuracy"] = rightness, 1.0, {}
    engine = ScriptedEngine(TOKENIZER, answer)
    collector = Collector(prompts, Rollouts(engine, rubric, FILTERED, Timings(), (MODEL.scheme, 64)), Distributed(), 0)
    collected = collector.collect(0)
    assert len(collected.groups) == 4
    assert all(group.num_right and group.spread("tokens_per_step") >= 0.3 for group in collected.groups)
    metrics = rollout_metrics(summarise(collected))
    for name, kind in (("none_right", "hard"), ("small_spread", "same")):
        dropped = zip(collected.dropped, collected.drop_reasons, strict=True)
        number = sum(reason == name for _, reason in dropped)
        assert metrics[f"groups/dropped_{name}"] == number > 0, kind
    assert metrics["groups/kept"] + len(collected.dropped) == engine.num_generated / 4


def test_speed_rewards_are_those_of_lightningrl() -> None:
    """Each part a z-score within its group with the population's deviation, their sum a z-score over the batch."""
    rng = random.Random(1)
    parts = {"accuracy": [float(rng.random() < 0.5) for _ in range(12)], "speed": [rng.random() for _ in range(12)]}
    totals = combine_parts(parts, [1.0, 1.0], group_size=4, combine="normalize_then_sum")
    expected = [0.0] * 12
    for values in parts.values():
        for start in (0, 4, 8):
            mine = values[start : start + 4]
            mean = sum(mine) / 4
            deviation = (sum((value - mean) ** 2 for value in mine) / 4) ** 0.5
            for i, value in enumerate(mine):
                expected[start + i] += (value - mean) / deviation if deviation else 0.0
    assert totals == pytest.approx(expected)
    prompt = Prompt(Problem("?", "1", {}), [1])
    groups = [
        RolloutGroup(prompt=prompt, completions=[], rewards=totals[start : start + 4], reward_parts={})
        for start in (0, 4, 8)
    ]
    advantages = advantages_of(groups, ObjectiveConfig(scale_rewards="batch"), Distributed())
    found = [float(a) for advantage_G in advantages for a in advantage_G]
    spread, mean = statistics.stdev(expected), statistics.fmean(expected)
    assert found == pytest.approx([(value - mean) / spread for value in expected], rel=1e-3, abs=1e-4)


def test_filters_that_name_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"min_spread names 'sped', which is none of reward.functions: \['accuracy'\]"):
        RLConfig(rollout=RolloutConfig(min_spread={"sped": 0.1}))
    with pytest.raises(ValueError, match="they need dynamic_sampling=true"):
        RolloutConfig(needs_right=True, dynamic_sampling=False)
    with pytest.raises(ValueError, match=r"needs_right needs accuracy among reward\.functions"):
        RLConfig(
            rollout=RolloutConfig(needs_right=True),
            reward=RewardConfig(functions=["tokens_per_step"], combine="normalize_then_sum"),
        )


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
    rollouts = Rollouts(ScriptedEngine(TOKENIZER, script), rubric, config, Timings(), (MODEL.scheme, 64))
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
