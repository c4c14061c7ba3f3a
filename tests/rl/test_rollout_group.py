"""Which groups are trained on, which are dropped and replaced."""

from __future__ import annotations

import itertools
import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest

from dirl.data.problems import Problem, of_pass_rate
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Rubric, combine_parts, right_ones
from dirl.rl.advantage import advantages_of
from dirl.rl.collector import Collected, Collector, NoSignal
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig, RLDataConfig
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


def test_groups_outside_the_band_of_pass_rates_are_dropped_counted_and_replaced() -> None:
    """`half` are right every second time, `seldom` every sixth, and a sixth lies outside."""
    asked = Counter[str]()

    def script(prompt: str, _seed: int, _sampling: SamplingConfig) -> str:
        asked[prompt] += 1
        return "0" if "never" in prompt else str(int(asked[prompt] % (2 if "half" in prompt else 6) == 0))

    questions = [f"{kind} {i}" for kind in ("half", "seldom", "never") for i in range(4)]
    problems = [Problem(question, "1", {}) for question in questions]
    prompts, _ = render_prompts(problems, TOKENIZER, system_prompt="", suffix="", max_length=100)
    rubric = Rubric(RewardConfig(functions=["tests.rl.test_rollout_group:scripted_rewards"]))
    config = RolloutConfig(prompts_per_step=4, num_generations=6, max_sampling_rounds=30, keep_pass_rate=[0.2, 0.8])
    engine = ScriptedEngine(TOKENIZER, script)
    rollouts = Rollouts(engine, rubric, config, Timings(), (MODEL.scheme, 64))
    collected = Collector(prompts, rollouts, Distributed(), 0).collect(0)
    assert [group.prompt.problem.question[:4] for group in collected.groups] == ["half"] * 4
    metrics = rollout_metrics(summarise(collected))
    kinds = Counter(group.prompt.problem.question.split()[0] for group in collected.dropped)
    assert metrics["groups/dropped_pass_rate"] == kinds["seldom"] > 0
    assert metrics["groups/dropped_all_wrong"] == kinds["never"] > 0
    assert engine.num_generated == 6 * (4 + len(collected.dropped))
    hard = Collector(prompts[4:], rollouts, Distributed(), 0)
    with pytest.raises(NoSignal, match=r"equal, or rollout\.keep_pass_rate dropped it, in 30 rounds"):
        hard.collect(0)


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


BANDED = replace(FILTERED, keep_pass_rate=[0.0, 0.25])  # of four completions at most one right


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
        is_easy = sum(group.reward_parts["accuracy"]) > 1  # type: ignore[arg-type]
        keeps = expected in ("equal_rewards", "none_right") or not is_easy
        assert BANDED.reason_to_drop(group) == (expected if keeps else "pass_rate")
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
    speed = RewardConfig(functions=["tokens_per_step"], combine="normalize_then_sum")
    for name, value in (("needs_right", True), ("keep_pass_rate", [0.2, 0.8])):
        with pytest.raises(ValueError, match=rf"{name} needs accuracy or code or .* among"):
            RLConfig(rollout=RolloutConfig(**{name: value}), reward=speed)  # type: ignore[arg-type]


def test_bands_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="they need dynamic_sampling=true"):
        RolloutConfig(keep_pass_rate=[0.2, 0.8], dynamic_sampling=False)
    for band in ([0.2], [0.8, 0.2], [0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match=r"^keep_pass_rate must be \[low, high\]"):
            RolloutConfig(keep_pass_rate=band)
        with pytest.raises(ValueError, match=r"^pass_rate must be \[low, high\]"):
            RLDataConfig(pass_rate=band)
    with pytest.raises(ValueError, match=r"keep_pass_rate\[1\] must be at least 0 and at most 1, got 80"):
        RolloutConfig(keep_pass_rate=[0.2, 80])
    for band in ([0.3, 0.4], [0.0, 0.2], [0.8, 1.0]):
        with pytest.raises(ValueError, match=r"num_generations=4 in which some .* their shares go by 1/4; widen it"):
            RolloutConfig(keep_pass_rate=band, num_generations=4)
    RolloutConfig(keep_pass_rate=[0.25, 0.25], num_generations=4)


def test_problems_too_easy_or_too_hard_are_left_out_by_their_column() -> None:
    problems = [Problem(f"{rate}", "1", {"pass_rate": rate}) for rate in (0.0, 0.2, 0.5, 0.8, 1)]
    assert [problem.question for problem in of_pass_rate(problems, [0.2, 0.8])] == ["0.2", "0.5", "0.8"]
    assert of_pass_rate(problems, []) == problems
    with pytest.raises(ValueError, match=r"pass_rate=\[0.3, 0.4\] leaves none of 5 problems; widen it"):
        of_pass_rate(problems, [0.3, 0.4])
    with pytest.raises(ValueError, match="which 1 of 6 rows lack; write it with `dirl difficulty"):
        of_pass_rate([*problems, Problem("?", "1", {"pass_rate": None})], [0.2, 0.8])


def test_right_is_the_full_score_of_a_judge() -> None:
    parts: dict[str, list[float | None]] = {"code": [1.0, 0.5, None, 0.0], "boxed": [1.0, 1.0, 1.0, 1.0]}
    assert right_ones(parts, [2.0, 1.5, 1.0, 1.0]) == [True, False, False, False]
    assert right_ones(parts | {"accuracy": [0.0, 0.0, 1.0, None]}, [0.0] * 4) == [True, False, True, False]
    assert right_ones({"boxed": parts["boxed"]}, [0.5, 0.0, -1.0, 1.0]) == [True, False, False, True]


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
