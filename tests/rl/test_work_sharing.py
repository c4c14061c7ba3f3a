"""Groups on ranks: evened out by cost, carried over when too many, and kept in a checkpoint."""

from __future__ import annotations

import json

import pytest
from dirl.rl.group_state import CollectorState

from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.rollout_group import Collector, RolloutConfig, StopAsked, render_prompts
from dirl.rollout.engine import SamplingConfig
from dirl.training.distributed import Distributed
from dirl.training.metrics import Timings
from tests.eval.scripted_engine import ScriptedEngine

TOKENIZER = tiny()[1]


def scripted_rewards(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(completion) for completion in completions]


def collector(**changes: object) -> Collector:
    asked: list[str] = []

    def script(prompt: str, seed: int, _sampling: SamplingConfig) -> str:
        asked.append(prompt)
        return "0" if "hard" in prompt else str(len(asked) % 2)

    problems = [Problem(f"{'hard' if i % 3 == 0 else 'open'} {i}", "1", {}) for i in range(30)]
    prompts, _ = render_prompts(problems, TOKENIZER, system_prompt="", suffix="", max_length=100)
    rubric = Rubric(RewardConfig(functions=["tests.rl.test_work_sharing:scripted_rewards"]))
    config = RolloutConfig(prompts_per_step=4, num_generations=2, max_sampling_rounds=4, oversampling=2.0)
    return Collector(prompts, ScriptedEngine(TOKENIZER, script), rubric, config, 0)


def test_informative_groups_that_are_too_many_begin_the_next_step() -> None:
    ours, distributed = collector(), Distributed()
    first = ours.collect(0, distributed, Timings())
    assert len(first.groups) == 4 and first.num_carried > 0 and first.is_on_policy(0)
    waiting = [group.draw for group in ours.carried]
    assert len(waiting) == first.num_carried
    ours.finish()
    second = ours.collect(1, distributed, Timings())
    assert [group.draw for group in second.groups][: len(waiting)] == waiting
    assert not second.is_on_policy(1)
    assert len(second.groups) == 4
    used = [group.draw for group in first.groups + second.groups]
    assert len(set(used)) == len(used) == 8


def test_what_was_rolled_out_survives_a_stop_between_rounds_and_after_them() -> None:
    distributed = Distributed()
    whole = collector()
    expected = []
    for step in range(3):
        expected.append([(g.draw, g.rewards) for g in whole.collect(step, distributed, Timings()).groups])
        whole.finish()
    for stop_at in range(1, 8):
        ours, got, step, calls = collector(), [], 0, 0

        def should_stop() -> bool:
            nonlocal calls
            calls += 1
            return calls == stop_at  # noqa: B023 - called within the iteration

        ours.should_stop = should_stop
        while step < 3:
            try:
                collected = ours.collect(step, distributed, Timings())
            except StopAsked:
                assert ours.is_amid
                state = json.loads(json.dumps(CollectorState(ours, distributed).state_dict()))
                num_asked = ours.engine.num_generated  # type: ignore[attr-defined]
                ours = collector()
                CollectorState(ours, distributed).load_state_dict(state)
                for _ in range(num_asked):  # the script answers by turns: let it stand where it stood
                    ours.engine.script("open", 0, SamplingConfig())  # type: ignore[attr-defined]
                continue
            got.append([(g.draw, g.rewards) for g in collected.groups])
            ours.finish()
            step += 1
        assert got == expected


def test_oversampling_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="oversampling must be at least 1"):
        RolloutConfig(oversampling=0.5)
