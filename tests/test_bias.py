"""The measure of bias: exact methods come out exact, and masks as a formula written here says."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import bias_of_objectives as bias  # noqa: E402
from decoding_paths import LENGTH, cosine  # noqa: E402
from objective_tables import between  # noqa: E402

from tests.parity.test_enumeration import MASK  # noqa: E402

LINES = ROOT / "docs/benchmarks/bias.jsonl"


def elbo(toy: Any, text: tuple[int, ...]) -> Tensor:
    """Sum over k of 1/k times the mean, over sets of k masked tokens, of what the model gives these."""
    total = torch.zeros((), dtype=torch.float64)
    for k in range(1, LENGTH + 1):
        sets = list(combinations(range(LENGTH), k))
        for masked in sets:
            state = tuple(MASK if lane in masked else token for lane, token in enumerate(text))
            logprob_LV = toy.logits[toy.states[state]].log_softmax(-1)
            total = total + sum(logprob_LV[lane, text[lane]] for lane in masked) / k / len(sets)
    return total


def elbo_gradient(model: bias.Model) -> Tensor:
    """Of the sum over texts of probability, reward minus its mean, and ELBO."""
    share_N, reward_N = model.texts.share_N, model.texts.reward_N
    advantage_N = reward_N - (share_N * reward_N).sum()
    bounds = torch.stack([elbo(model.policy, text) for text in bias.TEXTS])
    objective = (share_N * advantage_N * bounds).sum()
    return torch.autograd.grad(objective, model.policy.parameters, retain_graph=True)[0].flatten()


@pytest.mark.parametrize("scenario", ["left to right", "random order"])
def test_replay_is_exact_where_positions_do_not_look_at_tokens(scenario: str) -> None:
    for is_shared in (True, False):
        model = bias.Model(bias.replace(bias.SCENARIOS[scenario], is_shared=is_shared), seed=0)
        figures = model.figures(bias.measured_objective("dipo"))
        assert (figures["cosine"], figures["norm_ratio"]) == pytest.approx((1, 1), abs=1e-4)


@pytest.mark.parametrize("scenario", list(bias.SCENARIOS))
def test_holds_make_it_exact_on_policy(scenario: str) -> None:
    model = bias.Model(bias.SCENARIOS[scenario], seed=1)
    figures = model.figures(bias.measured_objective("dipo_exact"))
    assert model.paths.share_N.sum() == pytest.approx(1, abs=1e-9)
    assert model.texts.share_N.sum() == pytest.approx(1, abs=1e-9)
    if scenario != "off policy":
        assert (figures["cosine"], figures["norm_ratio"]) == pytest.approx((1, 1), abs=1e-3)
    assert figures["variance"] > 0


def test_ratios_off_policy() -> None:
    """One ratio of a whole path, never clipped, is importance sampling: exact. One of each action is not.

    Where a threshold decides, other paths are possible after a move, and no ratio makes up for those never sampled.
    """
    moved = bias.replace(bias.SCENARIOS["random order"], shift=0.2)
    model = bias.Model(moved, seed=2)
    wide = {"epsilon": 0.999, "epsilon_high": 1e6}
    exact = bias.replace(bias.measured_objective("dipo_exact"), importance_sampling_level="sequence", **wide)
    figures = model.figures(exact)
    assert (figures["cosine"], figures["norm_ratio"]) == pytest.approx((1, 1), abs=2e-3)
    by_action = model.figures(bias.replace(exact, importance_sampling_level="action"))
    assert by_action["cosine"] < 1 - 1e-4


def test_a_bound_is_followed_as_its_formula_says() -> None:
    for scenario in ("random order", "threshold 0.5", "table static"):
        model = bias.Model(bias.SCENARIOS[scenario], seed=3)
        expected = elbo_gradient(model)
        figures = model.figures(bias.measured_objective("ebpo"))
        assert figures["cosine"] == pytest.approx(cosine(expected, model.truth), abs=0.02)
        assert figures["norm_ratio"] == pytest.approx(float(expected.norm() / model.truth.norm()), rel=0.03)


@pytest.mark.parametrize(("preset", "least"), [("agrpo", 0.98), ("tracerl_value", 0.9999), ("c3po", 0.9999)])
def test_what_is_unbiased_in_a_random_order(preset: str, least: float) -> None:
    objective = bias.measured_objective(preset)
    assert bias.Model(bias.SCENARIOS["random order"], seed=4).figures(objective)["cosine"] > least


def test_levels_and_clips_say_nothing_on_policy() -> None:
    model = bias.Model(bias.SCENARIOS["threshold 0.5"], seed=5)
    found = [model.figures(bias.measured_objective(name)) for name in ("dipo", "gspo", "cispo", "cj_grpo", "just_grpo")]
    for figures in found[1:]:
        assert figures == pytest.approx(found[0], rel=1e-4)


def test_the_table_joins_presets_that_are_alike() -> None:
    def line(preset: str, cosine: float) -> dict[str, Any]:
        numbers = {"cosine": cosine, "lowest_cosine": 0.5, "norm_ratio": 1.0, "variance": 2.0}
        return {"preset": preset, "scenario": "static", **numbers}

    text = bias.bias_tables([line("a", 0.75), line("b", 0.75), line("c", 0.5), line("a", 0.75)])
    assert "| preset | static |\n| --- | --- |\n| `a`, `b` | 0.75 (0.50) |\n| `c` | 0.50 (0.50) |" in text
    assert "| `a`, `b`, `c` | 1.00; 2.0 |" in text
    assert bias.bias_tables([]) == ""


def test_the_page_has_the_tables_of_the_lines() -> None:
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    assert between((ROOT / "docs/objectives.md").read_text(), "bias") == bias.bias_tables(lines)
    presets = {path.stem for path in bias.PRESETS.glob("*.yaml")}
    assert not lines or {line["preset"] for line in lines} == presets
