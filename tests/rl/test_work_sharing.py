"""Groups on ranks: evened out by cost, carried over when too many, and kept in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig, Rubric
from dirl.rl.collector import Collector, NoSignal
from dirl.rl.rollout_group import RolloutGroup, render_prompts
from dirl.rl.rollouts import RolloutConfig, Rollouts
from dirl.rollout.engine import SamplingConfig
from dirl.training.distributed import Distributed
from dirl.training.interruption import StopAsked
from dirl.training.metrics import Timings
from tests.eval.scripted_engine import ScriptedEngine

MODEL, TOKENIZER = tiny()


def scripted_rewards(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(completion) for completion in completions]


def collector(should_stop: Callable[[], bool] = lambda: False, *, num_asked: int = 0) -> Collector:
    """Answers come by turns; `num_asked` of them have come before."""
    asked = ["open"] * num_asked

    def script(prompt: str, seed: int, _sampling: SamplingConfig) -> str:
        asked.append(prompt)
        return "0" if "hard" in prompt else str(len(asked) % 2)

    problems = [Problem(f"{'hard' if i % 3 == 0 else 'open'} {i}", "1", {}) for i in range(30)]
    prompts, _ = render_prompts(problems, TOKENIZER, system_prompt="", suffix="", max_length=100)
    rubric = Rubric(RewardConfig(functions=["tests.rl.test_work_sharing:scripted_rewards"]))
    config = RolloutConfig(prompts_per_step=4, num_generations=2, max_sampling_rounds=4, oversampling=2.0)
    rollouts = Rollouts(ScriptedEngine(TOKENIZER, script), rubric, config, Timings(), (MODEL.scheme, 64))
    return Collector(prompts, rollouts, Distributed(), 0, should_stop=should_stop, remember=remembered)


def remembered(groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """As the trainer does before the weights move on; a number that tells who was asked when."""
    return [
        group if group.behavior_logprobs else replace(group, behavior_logprobs=[[-1.0], [-2.0]]) for group in groups
    ]


def num_generated(ours: Collector) -> int:
    return ours.rollouts.engine.num_generated  # type: ignore[attr-defined, no-any-return]


def test_informative_groups_that_are_too_many_begin_the_next_step() -> None:
    ours = collector()
    first = ours.collect(0)
    assert len(first.groups) == 4 and first.num_carried > 0
    assert {group.sampled_at for group in first.groups} == {0}
    waiting = [group.number for group in ours.waiting]
    assert len(waiting) == first.num_carried
    second = ours.collect(1)
    assert [group.number for group in second.groups][: len(waiting)] == waiting
    assert [group.sampled_at for group in second.groups] == [0] * len(waiting) + [1] * (4 - len(waiting))
    used = [group.number for group in first.groups + second.groups]
    assert len(set(used)) == len(used) == 8


def test_groups_that_must_wait_are_remembered_and_others_are_not() -> None:
    ours = collector()
    first = ours.collect(0)
    assert all(group.behavior_logprobs for group in ours.waiting)
    assert not any(group.behavior_logprobs for group in first.groups)


def test_all_there_is_is_one_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed out has left it, what had no signal too; nobody has to say that a step is over."""
    ours = collector()
    for step in range(4):
        before = [group.number for group in ours.waiting]
        collected = ours.collect(step)
        assert not ours.is_amid
        assert {g.number for g in ours.waiting}.isdisjoint(g.number for g in [*collected.groups, *collected.dropped])
        assert set(before) <= {g.number for g in [*collected.groups, *ours.waiting]}
    monkeypatch.setattr(ours, "_is_useful", lambda group: False)
    with pytest.raises(NoSignal):
        ours.collect(4)
    assert ours.waiting == [] and not ours.is_amid


def test_what_was_rolled_out_survives_a_stop_between_rounds_and_after_them() -> None:
    whole = collector()
    expected = [[(g.number, g.rewards) for g in whole.collect(step).groups] for step in range(3)]
    for stop_at in range(1, 8):
        got, step, calls = [], 0, 0

        def should_stop() -> bool:
            nonlocal calls
            calls += 1
            return calls == stop_at  # noqa: B023 - called within the iteration

        ours = collector(should_stop)
        while step < 3:
            try:
                collected = ours.collect(step)
            except StopAsked:
                state = json.loads(json.dumps(ours.state_dict()))
                waiting = ours.waiting
                ours = collector(should_stop, num_asked=num_generated(ours))
                ours.load_state_dict(state)
                assert ours.waiting == waiting
                continue
            got.append([(g.number, g.rewards) for g in collected.groups])
            step += 1
        assert got == expected


def test_a_collector_is_amid_a_step_once_something_was_rolled_out() -> None:
    calls = iter([False, True])
    ours = collector(lambda: next(calls))
    with pytest.raises(StopAsked):
        ours.collect(0)
    assert ours.is_amid and ours.waiting


def test_oversampling_below_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="oversampling must be at least 1"):
        RolloutConfig(oversampling=0.5)
