"""Rollouts ahead: which weights sampled what, what is recorded of it, and that nothing is lost or comes twice."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dirl.data.problems import Problem
from dirl.errors import UserError
from dirl.model.logprobs import PackedScorer
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollout_group import RolloutGroup
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import logprobs
from dirl.training.seeds import stable_seed

PROBLEMS = [Problem("?" * (1 + n % 7), str(n), {}) for n in range(12)]


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def trainer(output_dir: Path, max_staleness: int, **changes: Any) -> RLTrainer:
    model, tokenizer = tiny()
    rollout = {"prompts_per_step": 3, "num_generations": 4, "max_completion_length": 12, "dynamic_sampling": False}
    config = {"max_steps": 6, "learning_rate": 1e-2, "save_steps": 0, **changes}
    return RLTrainer(
        RLConfig(
            output_dir=str(output_dir),
            reward=RewardConfig(functions=["tests.rl.test_ahead:even_length"]),
            rollout=RolloutConfig(max_staleness=max_staleness, **(rollout | config.pop("rollout", {}))),
            **config,
        ),
        model=model,
        tokenizer=tokenizer,
        problems=PROBLEMS,
    )


def watched(ours: RLTrainer) -> tuple[dict[int, Any], list[list[RolloutGroup]]]:
    """The weights of every version and the groups of every step, as a run goes on."""
    versions: dict[int, Any] = {}
    steps: list[list[RolloutGroup]] = []
    push, collect = ours._push_weights, ours.collector.collect

    def pushed(step: int) -> None:
        versions[step] = copy.deepcopy(ours.model).eval()
        push(step)

    def collected(step: int, oldest: int) -> Any:
        found = collect(step, oldest)
        steps.append(found.groups)
        return found

    ours._push_weights, ours.collector.collect = pushed, collected  # type: ignore[method-assign]
    return versions, steps


TRAJECTORY = ObjectiveConfig(likelihood="trajectory")


@pytest.mark.parametrize(
    ("max_staleness", "objective"),
    [*(pytest.param(1, one, marks=pytest.mark.slow) for one in (ObjectiveConfig(), TRAJECTORY)), (2, TRAJECTORY)],
)
def test_every_group_is_what_its_weights_give(tmp_path: Path, max_staleness: int, objective: ObjectiveConfig) -> None:
    """An oracle that keeps the weights of every version decodes each group again, and scores it by replay."""
    ours = trainer(tmp_path, max_staleness, objective=objective)
    versions, steps = watched(ours)
    look_ahead = ours.collector.look_ahead

    def waited_for() -> None:  # so that a round is never late, and takes newer weights
        look_ahead()
        assert ours.ahead is not None
        for _, future in ours.ahead._rounds:
            future.result()

    ours.collector.look_ahead = waited_for  # type: ignore[method-assign]
    ours.train()
    numbers = [group.number for groups in steps for group in groups]
    assert sorted(numbers) == list(range(6 * 3))  # nothing twice, nothing lost
    ages = [now - group.sampled_at for now, groups in enumerate(steps) for group in groups]
    assert max(ages) == max_staleness and min(ages) == 0
    num_holds = 0
    for group in (group for groups in steps for group in groups):
        engine = TorchEngine(versions[group.sampled_at], ours.tokenizer)
        seeds = [stable_seed(group.seed, sample) for sample in range(4)]
        again = engine.generate([group.prompt.token_ids] * 4, ours.collector.config, seeds)
        assert [c.token_ids for c in again] == [c.token_ids for c in group.completions]
        with torch.no_grad():
            replayed = logprobs(versions[group.sampled_at], group.completions, ours.config.rollout)
        for completion, logprob_R in zip(group.completions, replayed, strict=True):
            assert completion.logprobs == pytest.approx(logprob_R.tolist(), abs=1e-5)
        num_holds += assert_actions_are_what_their_weights_give(ours, group, versions[group.sampled_at])
    assert (num_holds > 100) == (objective is TRAJECTORY)


def assert_actions_are_what_their_weights_give(ours: RLTrainer, group: RolloutGroup, model: Any) -> int:
    """Every row that trains, reveals and holds alike; how many holds."""
    num_holds = 0
    for batch in ours.updater._table([group], [torch.zeros(4)], group.sampled_at + 1, 0):
        with torch.no_grad():
            expected_T = PackedScorer(model)(batch.packed, ours.updater.rule).logprob_T
        torch.testing.assert_close(batch.behavior_logprob_T, expected_T, rtol=0, atol=1e-5)
        num_holds += int((~batch.packed.actions.is_reveal_T).sum())
    return num_holds


def test_one_step_ahead_does_not_depend_on_who_is_faster(tmp_path: Path) -> None:
    weights = []
    for name, delay in (("one", 0.0), ("two", 0.2)):
        ours = trainer(tmp_path / name, 1)
        roll_out = ours.collector.rollouts.roll_out
        ours.collector.rollouts.roll_out = delayed(roll_out, delay)  # type: ignore[method-assign]
        ours.train()
        weights.append(ours.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def delayed(function: Any, seconds: float) -> Any:
    def late(*args: Any) -> Any:
        threading.Event().wait(seconds)
        return function(*args)

    return late


@pytest.mark.parametrize("objective", [ObjectiveConfig(), TRAJECTORY], ids=lambda o: o.likelihood)
def test_what_a_stale_action_was_given_is_what_the_engine_recorded(tmp_path: Path, objective: ObjectiveConfig) -> None:
    ours = trainer(tmp_path, 1, objective=objective)
    tables: list[tuple[int, Any]] = []
    table = ours.updater._table

    def kept(groups: Sequence[RolloutGroup], advantages: Any, now: int, iteration: int) -> Any:
        found = table(groups, advantages, now, iteration)
        tables.extend((now, batch) for batch in found)
        return found

    passes: list[bool] = []
    ours.learner.module.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    ours.updater._table = kept  # type: ignore[method-assign]
    ours.train()
    assert passes.count(True) == len(tables) and passes.count(False) == ours.steps_done  # the probes'
    for now, batch in tables:
        stale_T = batch.sampled_at_T < now
        assert bool(stale_T.all()) == (now > 0)
        recorded_T = torch.where(stale_T, batch.engine_logprob_T, torch.nan)
        assert torch.equal(batch.behavior_logprob_T.nan_to_num(9), recorded_T.nan_to_num(9))
        assert not recorded_T[stale_T].isnan().any()


def test_a_round_ahead_has_prompts_for_a_whole_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the groups teach nothing: a round of a step's own size would have the trainer wait for a second one."""
    ours = trainer(tmp_path, 1, save_steps=3, rollout={"max_sampling_rounds": 4})
    monkeypatch.setattr(RolloutConfig, "reason_to_drop", lambda _, group: "small_spread" if group.number % 2 else None)
    assert ours.ahead is not None
    submit, sizes = ours.ahead.submit, []

    def noted(rollouts: Any, taken: Any) -> None:
        sizes.append(len(taken))
        submit(rollouts, taken)

    ours.ahead.submit = noted  # type: ignore[method-assign]
    _, steps = watched(ours)
    ours.train()
    # 3 of the 5 groups of the first step teach, so that the second has 5 prompts and one more; then each finds a step.
    assert sizes == [3, 1, 1, 5, 1, 6, 6, 6, 6]
    assert [len(groups) for groups in steps] == [3] * 6
    assert [group.number % 2 for groups in steps for group in groups] == [0] * 18
    again = trainer(tmp_path / "again", 1)
    again.collector.load_state_dict(ours.collector.state_dict())
    assert again.collector._useful_share == 0.5


def test_a_run_that_stops_goes_on_with_the_prompts_in_flight(tmp_path: Path) -> None:
    first = trainer(tmp_path, 2, save_steps=3)
    _, before = watched(first)
    collect = first.collector.collect

    def killed(step: int, oldest: int) -> Any:
        if step == 4:
            raise KeyboardInterrupt
        return collect(step, oldest)

    first.collector.collect = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = trainer(tmp_path, 2, save_steps=3)
    _, after = watched(second)
    second.train()
    numbers = [group.number for groups in [*before[:3], *after] for group in groups]
    assert sorted(numbers) == list(range(6 * 3))


def test_a_stage_with_other_blocks_begins_with_the_prompts_in_flight(tmp_path: Path) -> None:
    """The rounds in flight and the probe are of the old blocks, in which nothing of the new stage could be scored."""
    ours = trainer(tmp_path, 1, stages=[{"from_step": 3, "model.block_length": 2}])
    _, steps = watched(ours)
    ours.train()
    assert sorted(group.number for groups in steps for group in groups) == list(range(6 * 3))
    assert [group.sampled_at for group in steps[3]] == [3] * 3
    lengths = {
        len(c.prompt_ids + c.token_ids) % 4 for groups in steps[3:] for group in groups for c in group.completions
    }
    assert 2 in lengths


def test_a_run_that_fails_leaves_no_round_behind(tmp_path: Path) -> None:
    ours = trainer(tmp_path, 2)

    def fails(*_: Any) -> Any:
        raise UserError("no update")

    ours.updater.update = fails  # type: ignore[method-assign]
    with pytest.raises(UserError, match="no update"):
        ours.train()
    assert ours.ahead is not None and len(ours.ahead) == 0
    assert len(ours.collector._unasked) == 2


def test_groups_that_are_too_old_are_dropped_and_counted(tmp_path: Path) -> None:
    ours = trainer(tmp_path, 1, rollout={"prompts_per_step": 2})
    extra = trainer(tmp_path / "other", 0).collector
    ours.begin()
    ours.step()
    ours.step()
    old = extra.rollouts.roll_out(extra._take_round(0, 1), 0)[0]
    ours.collector.waiting += old
    metrics = ours.step()
    assert (metrics["groups/too_old"], metrics["staleness/max"]) == (1.0, 1.0)
    assert old[0].number not in [group.number for group in ours.collector.waiting]


def test_an_error_of_the_engine_reaches_the_trainer(tmp_path: Path) -> None:
    ours = trainer(tmp_path, 1)

    def fails(*_: Any) -> Any:
        raise UserError("the engine is gone")

    ours.begin()
    ours.step()
    ours.collector.rollouts.roll_out = fails  # type: ignore[method-assign]
    ours.step()  # whose rollouts were under way
    with pytest.raises(UserError, match="the engine is gone"):
        ours.step()


@pytest.mark.parametrize("part", ["logprobs", "hold_logprobs"])
def test_an_engine_that_did_not_record_is_an_error(tmp_path: Path, part: str) -> None:
    """What the policy gives now would be taken for what older weights gave."""
    ours = trainer(tmp_path, 1, objective=TRAJECTORY)
    generate = ours.engine.generate

    def forgetful(*arguments: Any) -> Any:
        return [replace(completion, **{part: None}) for completion in generate(*arguments)]

    ours.engine.generate = forgetful  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"weights before step 1 sampled the engine recorded no log-probability"):
        ours.train()


@pytest.mark.parametrize("objective", [{"score": "masked"}, {"shrink": 2}, {"views": "masks"}], ids=str)
def test_what_the_engine_does_not_record_is_refused(tmp_path: Path, objective: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"rollout\.max_staleness=1 needs what the engine recorded"):
        trainer(tmp_path, 1, objective=ObjectiveConfig(**objective))


def test_a_mismatched_engine_ends_the_run_whatever_its_age(tmp_path: Path) -> None:
    ours = trainer(tmp_path, 1, learning_rate=1e-4)
    ours.begin()
    ours.step()
    with ours.ahead.paused(), torch.no_grad():  # type: ignore[union-attr]
        for parameter in ours._decoded.parameters():
            parameter.mul_(1.5)
    with pytest.raises(UserError, match="the engine does not hold the trainer's weights"):
        for _ in range(3):
            ours.engine.update_weights = lambda model: None  # type: ignore[method-assign]
            ours.step()
