"""Rollouts -> optimizer steps: on-policy, with several steps per rollout, and with a KL."""

from __future__ import annotations

import copy
import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dirl.data.problems import Problem
from dirl.diffusion.likelihood import Likelihood
from dirl.diffusion.packing import PackedViews, TokenTable, Views
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import replay_views
from dirl.errors import UserError
from dirl.model.attention import AttentionPlan, DensePlan
from dirl.model.flex_attention import AttentionName, padded_for_flex, training_plan
from dirl.model.logprobs import PackedScorer
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.advantage import advantages_of
from dirl.rl.objective import VIEWS, ImportanceSampling, Level, LossType, ObjectiveConfig
from dirl.rl.rl_config import RLConfig, RLEvalConfig
from dirl.rl.rollout_group import RolloutGroup
from dirl.rl.rollout_metrics import completion_rows
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.rl.update_metrics import EngineMismatch
from dirl.rollout.engine import ApproximateCache, Completion
from dirl.rollout.replay import logprobs
from tests.oracle import sharp_tiny_model

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
    return trained.collector.collect(0).groups


def update(trained: RLTrainer, groups: list[RolloutGroup], now: int = 0) -> dict[str, float]:
    advantages = advantages_of(groups, trained.config.objective, trained.distributed)
    return trained.updater.update(groups, advantages, now)


@pytest.mark.parametrize("likelihood", ["reveal", "trajectory"])
def test_first_update_is_on_policy(likelihood: Likelihood) -> None:
    trained = trainer(replace(CONFIG, objective=ObjectiveConfig(beta=0.1, likelihood=likelihood)))
    first, second = trained.step(), trained.step()
    assert first["clip_ratio/region_mean"] == 0
    assert first["kl"] == 0
    assert second["kl"] > 0
    assert second["clip_ratio/region_mean"] == 0
    assert first["sampling/logp_difference/max"] < 1e-4


@pytest.mark.parametrize("likelihood", ["reveal", "trajectory"])
def test_on_policy_every_level_takes_the_same_step(likelihood: Likelihood) -> None:
    norms = []
    for level in get_args(Level):
        objective = ObjectiveConfig(likelihood=likelihood, importance_sampling_level=level)
        norms.append(trainer(replace(CONFIG, objective=objective, max_tokens_per_micro_batch=256)).step()["grad_norm"])
    assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5) and norms[0] > 0


@pytest.mark.parametrize(
    ("num_iterations", "likelihood", "correction", "num_passes"),
    [
        (1, "reveal", "none", 1),
        (1, "trajectory", "none", 1),
        (1, "reveal", "token_truncate", 1),
        (2, "reveal", "none", 2),
        (2, "trajectory", "none", 2),  # the engine has recorded holds as well
        (2, "reveal", "token_truncate", 3),  # one more, before the first step
    ],
)
def test_no_forward_pass_is_made_but_for_training(
    num_iterations: int, likelihood: Likelihood, correction: ImportanceSampling, num_passes: int
) -> None:
    config = replace(
        CONFIG,
        num_iterations=num_iterations,
        objective=ObjectiveConfig(likelihood=likelihood, importance_sampling_correction=correction),
        max_tokens_per_micro_batch=256,
    )
    trained = trainer(config)
    assert trained.updater.reference is None, "beta=0 loads no reference"
    groups = rolled_out(trained)
    assert all(completion.logprobs is not None for group in groups for completion in group.completions)
    num_micro_batches = len(trained.updater._packed(groups))
    assert num_micro_batches > 1
    trains: list[bool] = []
    trained.learner.module.register_forward_hook(lambda *_: trains.append(torch.is_grad_enabled()))
    update(trained, groups)
    assert trains.count(True) == num_iterations * num_micro_batches
    assert len(trains) == num_passes * num_micro_batches


def test_packs_are_not_padded_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention is told apart by the lengths it is compiled for: neither policy nor reference asks for more."""
    config = replace(CONFIG, objective=ObjectiveConfig(beta=0.1), max_tokens_per_micro_batch=300)
    trained, lengths = trainer(config), []
    plan, padded = training_plan, padded_for_flex

    def noted(tokens: TokenTable, attention: AttentionName) -> AttentionPlan:
        lengths.append(len(tokens))
        return plan(tokens, attention)

    def cut(tokens: TokenTable, budget: int) -> TokenTable:
        return padded(tokens, budget) if len(tokens) <= 300 else tokens

    monkeypatch.setattr("dirl.model.logprobs.uses_flex", lambda tokens, attention: True)
    monkeypatch.setattr("dirl.model.logprobs.padded_for_flex", cut)
    monkeypatch.setattr("dirl.model.logprobs.training_plan", noted)
    trained.step()
    assert len(lengths) >= 4 and max(lengths) <= 384 and all(length % 128 == 0 for length in lengths)


def test_under_autocast_the_reference_computes_as_the_policy_does() -> None:
    assert trainer(replace(CONFIG, objective=ObjectiveConfig(beta=0.1), bf16=True)).step()["kl"] == 0


def test_half_precision_without_master_weights_is_refused() -> None:
    """Steps of 1e-6 would round to nothing, and no number in the log would show it."""
    model, tokenizer = tiny()
    with pytest.raises(UserError, match=r"model.dtype=bfloat16 has no float32 master weights under plain.*bf16=true"):
        RLTrainer(CONFIG, model=model.bfloat16(), tokenizer=tokenizer, problems=[Problem("1+1=", "2", {})])


def test_a_budget_that_a_long_completion_may_exceed_is_said_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    trainer(CONFIG)
    assert "max_tokens_per_micro_batch" not in caplog.text
    trainer(replace(CONFIG, max_tokens_per_micro_batch=64))
    assert (
        "max_tokens_per_micro_batch=64: the longest prompt with a completion of one token a step takes" in caplog.text
    )


def test_evaluation_reads_the_test_split_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(path: str, *, split: str, **_: object) -> list[Problem]:
        asked.append((path, split))
        return [Problem("1+1=", "2", {})]

    monkeypatch.setattr("dirl.rl.heldout.load_problems", load)
    for path in ("task:noisy_sums", "owner/name"):
        model, tokenizer = tiny()
        RLTrainer(replace(CONFIG, eval=RLEvalConfig(path=path)), model=model, tokenizer=tokenizer)
    assert [(path, split) for path, split in asked if split != "train"] == [
        ("task:noisy_sums", "heldout"),
        ("owner/name", "test"),
    ]


@pytest.mark.parametrize("likelihood", ["reveal", "trajectory"])
@pytest.mark.parametrize(("num_iterations", "steps_per_generation"), [(2, 1), (1, 2), (2, 2)])
def test_several_steps_per_rollout(likelihood: Likelihood, num_iterations: int, steps_per_generation: int) -> None:
    objective = ObjectiveConfig(likelihood=likelihood, epsilon=1e-3, epsilon_high=1e-3)
    trained = trainer(
        replace(CONFIG, objective=objective, num_iterations=num_iterations, steps_per_generation=steps_per_generation)
    )
    metrics = trained.step()
    assert trained.steps_done == num_iterations * steps_per_generation
    assert trained.learner.scheduler.state_dict()["last_epoch"] == trained.steps_done
    # The policy has left the one that sampled by more than the narrow clip.
    assert 0 < metrics["clip_ratio/region_mean"] < 1
    assert metrics["skipped_steps"] == 0


@pytest.mark.parametrize(("shift", "clipped"), [(1.0, "clip_ratio/low_mean"), (-1.0, "clip_ratio/high_mean")])
def test_off_policy_ratios_use_what_the_engine_recorded(shift: float, clipped: str) -> None:
    """An engine that recorded one nat more or less: every ratio starts at exp(-shift), beyond the clip."""
    trained = trainer(replace(CONFIG, num_iterations=2, learning_rate=0.0, max_logp_difference=0.0))
    groups = shifted(rolled_out(trained), shift)
    advantages = advantages_of(groups, ObjectiveConfig(), trained.distributed)
    metrics = update(trained, groups)
    tokens = [
        (float(a), len(c.token_ids))
        for g, A in zip(groups, advantages, strict=True)
        for a, c in zip(A, g.completions, strict=True)
    ]
    one_sided = sum(n for a, n in tokens if (a < 0 if shift > 0 else a > 0)) / sum(n for _, n in tokens)
    assert metrics[clipped] == pytest.approx(one_sided)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(one_sided)
    assert metrics["sampling/logp_difference/mean"] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("correction", ["token_truncate", "token_mask"])
@pytest.mark.parametrize("shift", [0.25, -0.25])
def test_correction_weighs_tokens_by_trainer_over_engine(
    correction: ImportanceSampling, shift: float, num_iterations: int
) -> None:
    """An engine whose logprobs are all off by `shift`: the gradient is the uncorrected one times one known weight."""
    grads = []
    for mode in ("none", correction):
        config = replace(
            CONFIG,
            num_iterations=num_iterations,
            learning_rate=0.0,
            objective=ObjectiveConfig(importance_sampling_correction=mode, importance_sampling_clip_max=1.1),
            max_grad_norm=0.0,
        )
        trained = trainer(config)
        groups = shifted(rolled_out(trained), 0.0 if mode == "none" else shift)
        metrics = update(trained, groups)
        grads.append(metrics["grad_norm"])
    weight = math.exp(-shift)
    cut = min(weight, 1.1) if correction == "token_truncate" else (weight if weight <= 1.1 else 0.0)
    assert grads[1] == pytest.approx(cut * grads[0], rel=1e-3)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(weight, abs=1e-4)
    assert metrics["sampling/importance_sampling_ratio/cut_fraction"] == (weight > 1.1)
    assert metrics["clip_ratio/region_mean"] == 0, "the clip compares with the trainer before the update"


def test_mismatch_of_whole_completions() -> None:
    """Two nats over one completion, none over the others."""
    trained = trainer(replace(CONFIG, objective=ObjectiveConfig(importance_sampling_correction="sequence_truncate")))
    first, *others = rolled_out(trained)
    length = len(first.completions[0].token_ids)
    odd = shifted([replace(first, completions=first.completions[:1])], -2.0 / length)[0].completions
    groups = [replace(first, completions=[*odd, *first.completions[1:]]), *others]
    metrics = update(trained, groups)
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(math.exp(2.0), rel=1e-3)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(1.0, abs=1e-3)
    num_tokens = sum(len(c.token_ids) for g in groups for c in g.completions)
    assert metrics["sampling/importance_sampling_ratio/cut_fraction"] == pytest.approx(length / num_tokens)
    expected = 1 + (math.exp(2.0) - 1) * length / num_tokens
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shift", [0.6, math.nan])
def test_an_engine_with_other_weights_ends_the_run(shift: float) -> None:
    trained = trainer(CONFIG)
    groups = rolled_out(trained)
    logprobs = groups[0].completions[0].logprobs
    assert logprobs is not None
    if math.isnan(shift):  # a logprob that is no number is not "none recorded"
        broken = replace(groups[0].completions[0], logprobs=[math.inf, *logprobs[1:]])
        groups[0] = replace(groups[0], completions=[broken, *groups[0].completions[1:]])
    else:
        groups = shifted(groups, shift)
    with pytest.raises(EngineMismatch, match=r"max_logp_difference=0\.5: trainer and engine differ"):
        update(trained, groups)


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_an_approximate_cache_is_weighed_and_gauged(kind: ApproximateCache) -> None:
    """What the engine sampled with, against the exact replay: neither is the other."""
    rollout = replace(CONFIG.rollout, approximate_cache=kind, generation_window=6)
    with pytest.raises(UserError, match=rf"approximate_cache={kind} .* set objective.importance_sampling_correction"):
        replace(CONFIG, rollout=rollout)
    objective = ObjectiveConfig(importance_sampling_correction="token_truncate", importance_sampling_clip_max=1.001)
    model, tokenizer = sharp_tiny_model(block_length=0)
    trained = RLTrainer(
        replace(CONFIG, rollout=rollout, objective=objective, learning_rate=0.0),
        model=model,
        tokenizer=tokenizer,
        problems=[Problem("?" * length, "0", {}) for length in range(1, 8)],
    )
    groups = rolled_out(trained)
    metrics = update(trained, groups)
    completions = [completion for group in groups for completion in group.completions]
    with torch.no_grad():
        exact_T = torch.cat(logprobs(model, completions))
    difference_T = exact_T - torch.tensor([logprob for c in completions for logprob in c.logprobs or []])
    assert float(difference_T.abs().max()) > 1e-3
    for name, expected in (
        ("logp_difference/mean", difference_T.abs().mean()),
        ("logp_difference/max", difference_T.abs().max()),
        ("importance_sampling_ratio/mean", difference_T.exp().mean()),
        ("importance_sampling_ratio/cut_fraction", (difference_T.exp() > 1.001).float().mean()),
    ):
        assert metrics[f"sampling/{name}"] == pytest.approx(float(expected), rel=1e-3), name
    trained.updater.config = replace(trained.updater.config, max_logp_difference=float(difference_T.abs().mean()) / 2)
    with pytest.raises(EngineMismatch, match=r"approximate_cache is such a rule: none is exact"):
        update(trained, groups)


def shifted(groups: list[RolloutGroup], shift: float) -> list[RolloutGroup]:
    """The same groups from an engine that recorded `shift` nats more."""
    return [
        replace(g, completions=[replace(c, logprobs=[x + shift for x in c.logprobs or []]) for c in g.completions])
        for g in groups
    ]


def test_without_recorded_logprobs_the_first_pass_is_on_policy() -> None:
    trained = trainer(
        replace(CONFIG, num_iterations=2, learning_rate=0.0, objective=ObjectiveConfig(likelihood="trajectory"))
    )
    groups = [replace(g, completions=[replace(c, logprobs=None) for c in g.completions]) for g in rolled_out(trained)]
    metrics = update(trained, groups)
    assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "bnpo"])
def test_fewer_groups_than_steps(loss_type: LossType) -> None:
    trained = trainer(replace(CONFIG, steps_per_generation=2, objective=ObjectiveConfig(loss_type=loss_type)))
    groups = rolled_out(trained)[:1]
    before = [parameter.clone() for parameter in trained.model.parameters()]
    metrics = update(trained, groups)
    assert metrics["grad_norm"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))


def test_the_engine_sleeps_while_the_trainer_works(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trainer(CONFIG)
    calls: list[str] = []
    for owner, name in (
        (trained.engine, "generate"),
        (trained.engine, "sleep"),
        (trained.updater, "update"),
        (trained.engine, "update_weights"),
        (trained.engine, "wake"),
    ):
        real = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *a, _name=name, _real=real, **k: (calls.append(_name), _real(*a, **k))[1]
        )
    trained.step()
    assert [name for name in calls if name != "generate"] == ["sleep", "update", "update_weights", "wake"]
    assert calls[0] == "generate" and calls[-1] == "wake"


class HostReads(TorchFunctionMode):
    """Every call that makes the host wait for the device, and where it came from."""

    READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
    SIZES = ("nonzero", "unique", "unique_consecutive", "masked_select", "is_nonzero", "equal", "allclose")

    def __init__(self) -> None:
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        picks_rows = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in self.READS or name in self.SIZES or picks_rows:
            place = next(f for f in inspect.stack()[1:] if "/torch/overrides" not in f.filename)
            if "/torch/optim/" not in place.filename:  # AdamW counts its steps on the host
                self.found.append(f"{name} at {place.filename}:{place.lineno}")
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted between the first forward pass of a step and its end, in which packs and tables are on the device."""
    objective = ObjectiveConfig(likelihood="trajectory", beta=0.1, importance_sampling_correction="sequence_truncate")
    trained = trainer(replace(CONFIG, objective=objective, num_iterations=2, max_tokens_per_micro_batch=256))
    groups = rolled_out(trained)
    # The plan of tiles is the CPU's own; FlexAttention, a GPU's, needs no look at the device either.
    monkeypatch.setattr("dirl.model.logprobs.training_plan", lambda tokens, _: DensePlan.packed(tokens))
    counts, passes = [], []
    learn, score = trained.learner.update, trained.updater._policy

    def counted(*arguments: Any) -> Any:
        with HostReads() as reads:
            result = learn(*arguments)
        counts.append(reads.found)
        return result

    def scored(packed: PackedViews) -> Tensor:
        with HostReads() as reads:
            result = score(packed)
        passes.append(reads.found)
        return result

    monkeypatch.setattr(trained.learner, "update", counted)
    monkeypatch.setattr(trained.updater, "_policy", scored)
    assert len(trained.updater._packed(groups)) > 1
    update(trained, groups)
    assert [len(found) for found in counts] == [1, 1], counts
    assert passes and not any(passes), passes


def test_the_reference_scores_a_batch_of_rollouts_once() -> None:
    config = replace(CONFIG, objective=ObjectiveConfig(beta=0.1), max_steps=6)
    trained = trainer(replace(config, num_iterations=3, steps_per_generation=2))
    reference = trained.updater.reference
    assert isinstance(reference, PackedScorer)
    calls: list[int] = []
    reference.register_forward_hook(lambda *_: calls.append(1))
    groups = rolled_out(trained)
    update(trained, groups)
    assert len(calls) == 2  # one pack a minibatch, whatever the number of passes over it


CARRYING = replace(
    CONFIG,
    max_steps=8,
    max_logp_difference=0.0,
    objective=ObjectiveConfig(likelihood="trajectory"),
    rollout=replace(CONFIG.rollout, oversampling=2.0, confidence_threshold=0.02, max_sampling_rounds=3),
)


@pytest.mark.parametrize("likelihood", ["reveal", "trajectory"])
def test_groups_that_waited_keep_what_their_own_weights_gave_them(likelihood: Likelihood) -> None:
    """Reveals and holds alike: against a copy of the weights of every step."""
    trained = trainer(replace(CARRYING, objective=ObjectiveConfig(likelihood=likelihood)))
    copies, num_checked, num_holds = [], 0, 0
    for now in range(4):
        copies.append(copy.deepcopy(trained.model).eval())
        collected = trained.collector.collect(now)
        (old := [g for g in collected.groups if g.sampled_at < now])
        for group in old:
            for batch in trained.updater._packed([group]):
                with torch.no_grad():
                    expected_T = PackedScorer(copies[group.sampled_at])(batch.packed, trained.updater.rule).logprob_T
                torch.testing.assert_close(batch.behavior_logprob_T, expected_T, rtol=0, atol=1e-5)
                num_checked += len(batch.packed.actions)
                num_holds += int((~batch.packed.actions.is_reveal_T).sum())
        update(trained, collected.groups, now)
    assert num_checked > 0 and (num_holds > 0) == (likelihood == "trajectory")


def test_no_pass_is_made_for_groups_that_wait_where_the_engine_recorded_them() -> None:
    for correction, makes_passes in (("none", False), ("token_truncate", True)):
        objective = replace(CARRYING.objective, importance_sampling_correction=correction)
        trained, passes = trainer(replace(CARRYING, objective=objective)), []
        trained.learner.module.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        assert trained.collector.collect(0).num_carried > 0
        assert bool(passes) == makes_passes


def test_metrics_and_the_guard_stay_on_where_groups_were_carried_over() -> None:
    """Also in a step none of whose groups is fresh: then a short one is decoded for the comparison."""
    trained = trainer(replace(CARRYING, rollout=replace(CARRYING.rollout, dynamic_sampling=False)))
    probed, probe = [], trained.collector.probe
    trained.collector.probe = lambda step: (probed.append(step), probe(step))[1]  # type: ignore[method-assign]
    seen = [trained.step() for _ in range(4)]
    assert [metrics["groups/carried_over"] for metrics in seen] == [4, 0, 4, 0] and probed == [1, 3]
    for name in ("logp_difference/max", "hold_logp_difference/max"):
        assert all(metrics[f"sampling/{name}"] < 1e-3 for metrics in seen)


@pytest.mark.parametrize("part", ["logprobs", "hold_logprobs"])
def test_an_engine_that_goes_wrong_later_ends_the_run_although_groups_are_carried_over(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = trainer(replace(CARRYING, max_logp_difference=0.5))
    trained.step()
    assert trained.collector.waiting
    generate = trained.engine.generate

    def wrong(*arguments: Any) -> list[Completion]:
        return [replace(c, **{part: [x - 3 for x in getattr(c, part)]}) for c in generate(*arguments)]  # type: ignore[arg-type]

    monkeypatch.setattr(trained.engine, "generate", wrong)
    with pytest.raises(EngineMismatch, match=r"differ by 3 nats a " + ("hold" if "hold" in part else "token")):
        for _ in range(3):
            trained.step()


@pytest.mark.parametrize("correction", get_args(ImportanceSampling))
def test_holds_are_recorded_where_they_are_read(correction: ImportanceSampling) -> None:
    def records(likelihood: Likelihood, rollout: dict[str, Any], **changes: Any) -> bool:
        objective = ObjectiveConfig(likelihood=likelihood, importance_sampling_correction=correction)
        return replace(CONFIG, objective=objective, rollout=replace(CONFIG.rollout, **rollout), **changes).records_holds

    off_policy: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"max_staleness": 1}, {}),
        ({"oversampling": 1.5}, {}),
        ({}, {"num_iterations": 2}),
        ({}, {"steps_per_generation": 2}),
    ]
    assert all(records("trajectory", rollout, **changes) for rollout, changes in off_policy)
    assert not any(records("reveal", rollout, **changes) for rollout, changes in off_policy)
    assert records("trajectory", {}) == (correction != "none") and records("reveal", {"record_holds": True})


def test_groups_without_actions_can_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random masks may leave a completion nothing to score."""

    def rarely(trajectory: Trajectory, mask_token_id: int, objective: ObjectiveConfig, seed: int) -> Views:
        views = replay_views(trajectory, mask_token_id)
        return views if seed % 2 else replace(views, revealed_VB=views.held_VB & False, held_VB=views.held_VB & False)

    monkeypatch.setitem(VIEWS, "rarely", rarely)
    trained = trainer(replace(CARRYING, objective=ObjectiveConfig(views="rarely")))
    metrics = [trained.step() for _ in range(3)]
    assert any(step["groups/carried_over"] for step in metrics)
    assert all(math.isfinite(step["loss"]) and step["skipped_steps"] == 0 for step in metrics)


def test_groups_that_wait_are_refused_by_another_objective() -> None:
    """What was remembered of other actions would be taken for theirs."""
    trained = trainer(CARRYING)
    trained.step()
    state = trained.collector.state_dict()
    for objective in (ObjectiveConfig(), ObjectiveConfig(shrink=2)):
        other = trainer(replace(CARRYING, objective=objective))
        other.collector.load_state_dict(state)
        with pytest.raises(UserError, match=r"objective: groups that wait .* likelihood=trajectory, this run has"):
            other.step()


def test_numbers_of_an_engine_that_are_none_survive_a_checkpoint(tmp_path: Path) -> None:
    trained = trainer(replace(CARRYING, output_dir=str(tmp_path), completions_steps=1))
    generate = trained.engine.generate

    def broken(*arguments: Any) -> list[Completion]:
        return [replace(c, logprobs=[math.nan, *(c.logprobs or [])[1:]]) for c in generate(*arguments)]

    trained.engine.generate = broken  # type: ignore[method-assign]
    trained.step()
    waiting = trained.collector.waiting
    state = json.loads(json.dumps(trained.collector.state_dict(), allow_nan=False))
    again = trainer(CARRYING)
    again.collector.load_state_dict(state)
    assert str(again.collector.waiting[0].completions) == str(waiting[0].completions)
    groups = [*trained.last.groups, *trained.last.dropped] if trained.last else []
    assert all(row["logprobs"] is None for row in completion_rows(groups, trained.tokenizer, trained.model.scheme))


def test_a_rank_without_work_adds_nothing_whatever_the_model_says() -> None:
    """Its placeholder may be as unlikely as it likes: zero times infinity would be no number."""
    trained = trainer(replace(CONFIG, objective=ObjectiveConfig(beta=0.1)))
    with torch.no_grad():
        trained.model.lm_head.weight.mul_(4000)
    loss = trained.updater._empty_loss(0)
    assert loss.value.item() == 0 and loss.num_tokens == 0


def test_a_cache_too_small_for_the_longest_completion_is_refused_at_the_start() -> None:
    rollout = replace(CONFIG.rollout, max_cached_tokens=16)
    with pytest.raises(UserError, match=r"max_cached_tokens=16 has no room for the longest prompt .* 21 tokens"):
        trainer(replace(CONFIG, rollout=rollout))
