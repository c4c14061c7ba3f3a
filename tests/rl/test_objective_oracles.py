"""Loss and gradient of every preset, as a trainer takes its steps, against one forward pass per state and loops.

Two optimizer steps on one batch of rollouts: at the weights that sampled, and after all of them moved at random.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest
from torch import Tensor

from tests.rl.objective_runs import (
    PRESETS,
    WHOLE,
    config_of,
    groups_of,
    slow_step,
    smallest_budget,
    taken_steps,
    trainer_of,
)

# Presets in which more than single actions hang together. With -m matrix each is both cut and whole.
CUT_BY_DEFAULT = ("agrpo", "coupled_grpo", "dipo_exact", "egspo", "espo", "gspo", "rldf", "spg")


def assert_same_steps(*overrides: str, is_cut: bool = False) -> None:
    """All steps of the updater are those of the oracle.

    Args:
        is_cut: micro-batches just hold a block, so that each completion of several blocks lies in several.
    """
    config = config_of(overrides)
    groups = groups_of(config)
    budget = smallest_budget(config, groups) if is_cut else WHOLE
    steps = taken_steps(trainer_of(replace(config, max_tokens_per_micro_batch=budget)), groups)
    assert len(steps) == config.num_iterations
    for iteration, step in enumerate(steps):
        loss, gradient = slow_step(config, groups, step.model, iteration=iteration, is_fresh=len(steps) == 1)
        assert step.loss == pytest.approx(loss, rel=1e-5, abs=1e-6), iteration
        assert float(gradient.norm()) > 1e-3
        assert float((step.gradient - gradient).norm() / gradient.norm()) <= 1e-5, iteration


@pytest.mark.parametrize(
    ("preset", "is_cut"),
    [
        pytest.param(preset, is_cut, marks=[] if is_cut == (preset in CUT_BY_DEFAULT) else pytest.mark.matrix)
        for preset in PRESETS
        for is_cut in (False, True)
    ],
)
def test_presets(preset: str, is_cut: bool) -> None:
    assert_same_steps(f"objective={preset}", is_cut=is_cut)


@pytest.mark.parametrize(
    ("preset", "is_cut"), [("dipo_exact", False), ("espo", True), ("gspo", True), ("lightning", False)]
)
def test_one_step_a_batch_knows_no_behaviour_but_the_policy(preset: str, is_cut: bool) -> None:
    assert_same_steps(f"objective={preset}", "num_iterations=1", is_cut=is_cut)


OTHERS = {
    "a part of the completions": ("objective=c3po", "objective.max_tokens_per_update=150"),
    "part, nll": ("objective=lightning", "objective.max_tokens_per_update=150", "objective.nll_on=all"),
    "entropy": ("objective.entropy_coef=0.3", "objective.likelihood=trajectory"),
    "entropy of drawn steps": ("objective=agrpo", "objective.entropy_coef=0.3", "objective.steps_per_completion=2"),
    "entropy of masks": ("objective=gdpo", "objective.entropy_coef=0.3"),
    "merged steps": ("objective.shrink=2", "objective.nll_coef=0.2", "objective.beta=0.1", "objective.kl_estimator=k1"),
    "blocks": (
        *("objective.importance_sampling_level=block", "objective.ratio_normalizer=length", "objective.delta=1.3"),
        *("objective.beta=0.1", "objective.kl_level=sequence", "objective.kl_to=behavior"),
    ),
    "trajectories": (
        *("objective.likelihood=trajectory", "objective.importance_sampling_level=sequence"),
        *("objective.ratio_normalizer=length", "objective.beta=0.01", "objective.kl_level=sequence"),
    ),
    "every level": (
        *("objective.views=masks", "objective.mask_levels=every", "objective.importance_sampling_level=block"),
        *("objective.full_mask_share=0.3", "objective.beta=0.1"),
    ),
    "pairs alike": (
        *("objective.views=masks", "objective.complementary=true", "objective.mask_weights=none"),
        *("objective.mask_levels=interval", "objective.importance_sampling_level=token"),
    ),
    "means": ("objective.views=masks", "objective.mask_weights=mean", "objective.num_masks=2", "objective.beta=0.1"),
    "one of a token's two": ("objective.score=masked", "objective.importance_sampling_level=token"),
    "truncated": ("objective=gspo", "objective.mask_truncated_completions=true"),
    "dual clip": ("objective=cj_grpo", "objective.delta=1.21", "objective.epsilon_high=0.2"),
    "uniform steps": ("objective=egspo", "objective.step_sampling=uniform", "objective.steps_per_completion=2"),
    "values of steps": ("objective=tracerl_value", "objective.gae_lambda=0.8", "objective.gae_gamma=0.9"),
    "values with holds": (
        *("objective=tracerl_value", "objective.gae_lambda=0.5", "objective.gae_gamma=0.9"),
        "objective.likelihood=trajectory",
    ),
    "sandwich of every level": ("objective=spg", "objective.mask_levels=every", "objective.num_masks=1"),
}


RARE = ("part, nll", "entropy of masks", "pairs alike", "truncated", "dual clip", "sandwich of every level", "entropy")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.matrix if name in RARE else []) for name in OTHERS]
)
def test_other_values(name: str) -> None:
    assert_same_steps(*OTHERS[name], is_cut=name in ("blocks", "trajectories", "values with holds"))


@cache
def on_policy(*overrides: str) -> Tensor:
    config = config_of([*overrides, "num_iterations=1"])
    (step,) = taken_steps(trainer_of(config), groups_of(config))
    return step.gradient


LEVELS = {"replay": ("token", "step", "block", "sequence"), "masks": ("token", "block", "sequence")}


@pytest.mark.parametrize("normalizer", ["none", "length"])
@pytest.mark.parametrize("views", LEVELS)
def test_on_policy_every_level_has_the_same_gradient(views: str, normalizer: str) -> None:
    scored = (f"objective.views={views}", "objective.num_masks=2")
    expected = on_policy(*scored, "objective.importance_sampling_level=action")
    for level in LEVELS[views]:
        found = on_policy(
            *scored, f"objective.importance_sampling_level={level}", f"objective.ratio_normalizer={normalizer}"
        )
        assert float((found - expected).norm()) <= 1e-6 * float(expected.norm()), level


@pytest.mark.matrix
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize(
    ("views", "level", "normalizer", "surrogate"),
    [
        (views, level, normalizer, surrogate)
        for views, levels in LEVELS.items()
        for level, normalizer, surrogate in itertools.product(
            ("action", *levels), ("none", "length"), ("clip", "cispo", "reinforce")
        )
    ],
)
def test_every_level_with_every_surrogate(
    views: str, level: str, normalizer: str, surrogate: str, is_cut: bool
) -> None:
    values = {
        "views": views,
        "importance_sampling_level": level,
        "ratio_normalizer": normalizer,
        "surrogate": surrogate,
        "num_masks": 2,
        "epsilon": 0.05,
        "epsilon_high": 0.1,
        "loss_type": "grpo",
    }
    assert_same_steps(*(f"objective.{key}={value}" for key, value in values.items()), is_cut=is_cut)


@pytest.mark.matrix
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize(
    ("views", "estimator", "level", "to"),
    itertools.product(("replay", "masks"), ("k1", "k2", "k3"), ("token", "sequence"), ("reference", "behavior")),
)
def test_every_kl(views: str, estimator: str, level: str, to: str, is_cut: bool) -> None:
    values = {"views": views, "beta": 0.3, "kl_estimator": estimator, "kl_level": level, "kl_to": to, "num_masks": 2}
    assert_same_steps(*(f"objective.{key}={value}" for key, value in values.items()), is_cut=is_cut)
