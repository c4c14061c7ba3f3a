"""How far each preset's expected gradient is from the true policy gradient, and how much one completion varies.

    python scripts/bias_of_objectives.py [--presets dipo,espo] [--models 12] >> docs/benchmarks/bias.jsonl
    python scripts/bias_of_objectives.py --lines docs/benchmarks/bias.jsonl --table
    python scripts/bias_of_objectives.py --lines docs/benchmarks/bias.jsonl --docs docs/objectives.md
    python scripts/bias_of_objectives.py --lines docs/benchmarks/bias.jsonl --picture docs/pictures/objectives_bias.png

Everything is enumerated in a model small enough for it (decoding_paths.py), for several ways to decode. A preset's own
code makes views, ratios and surrogate: `pack_groups` and `policy_loss` are called as in training, with every path as
often as its probability says. Random masks and drawn steps are averaged over many draws.

Measured is what follows from states, weights, ratios and surrogate. So the rest is made ideal: groups are infinite (the
baseline is the expected reward; its deviation, a mere factor, is left out), completions are equally long (normalisers
say nothing), a critic knows the truth, and KL, anchor and entropy bonus, which pull elsewhere on purpose, are off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from decoding_paths import LENGTH, MASK_ID, PROMPT, VOCABULARY, DistinctActions, Toy, as_completion, cosine
from torch import Tensor

from dirl.config import load_config
from dirl.data.problems import Problem
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.packing import DiffusionScheme
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.model.logprobs import ActionScores
from dirl.rl.actions import PolicyBatch
from dirl.rl.critic import with_gae
from dirl.rl.micro_batches import Layout, pack_groups
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.policy_loss import policy_loss
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollout_group import Prompt, RolloutGroup
from dirl.rollout.engine import Completion

Line = dict[str, Any]
PRESETS = Path(__file__).resolve().parents[1] / "configs/objectives"
NUM_DRAWS = {"masks": 200, "replay": 10}  # of masks of a text; of steps of a path
# A block of three tokens takes three steps at most: presets that draw some of many draw two of them here.
NUM_STEPS = 2


PLAIN = TokenDistribution()


@dataclass(frozen=True)
class Scenario:
    """A kind of model and a way to decode it."""

    unmasking: UnmaskingRule
    distribution: TokenDistribution = PLAIN
    is_shared: bool = True
    shift: float = 0.0  # of the parameters since the rollouts

    def toy(self, seed: int, *, is_moved: bool = False) -> Toy:
        shape = (1, LENGTH, VOCABULARY, self.unmasking, self.distribution, seed)
        return Toy(*shape, is_shared=self.is_shared, shift=self.shift if is_moved else 0.0)


HALF = UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.5)
STATIC = UnmaskingRule("low_confidence_static")
SCENARIOS = {
    "left to right": Scenario(UnmaskingRule("sequential")),
    "random order": Scenario(UnmaskingRule("random")),
    "static": Scenario(STATIC),
    "threshold 0.5": Scenario(HALF),
    "threshold 0.9": Scenario(UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.9)),
    "temperature 0.7": Scenario(HALF, TokenDistribution(temperature=0.7)),
    "top-k 2": Scenario(HALF, TokenDistribution(top_k=2)),
    "off policy": Scenario(HALF, shift=0.1),
    "table static": Scenario(STATIC, is_shared=False),
}


@dataclass(frozen=True)
class Sampled:
    """Completions that stand for everything a decoder can do, and what each is."""

    completions: list[Completion]  # (N,)
    share_N: Tensor  # float64, how often it happens; they add up to 1
    reward_N: Tensor  # float64


class Model:
    """One random model in a scenario: what is true of it, and what a preset makes of it."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario = scenario
        self.sampler = scenario.toy(seed)  # what rollouts came from
        self.policy = scenario.toy(seed, is_moved=True) if scenario.shift else self.sampler

    @cached_property
    def truth(self) -> Tensor:
        """(D,) float64."""
        return self.policy.true_gradient()

    @cached_property
    def paths(self) -> Sampled:
        """Every path of the decoder."""
        steps = self.sampler.all_paths
        rewards = [self.sampler.reward(path) for path in steps]
        completions = [self.sampler.completion(path) for path in steps]
        return Sampled(completions, self.sampler.probabilities(), torch.tensor(rewards, dtype=torch.float64))

    @cached_property
    def texts(self) -> Sampled:
        """Every text, whatever path led to it: all that random masks look at."""
        share: dict[tuple[int, ...], float] = dict.fromkeys(TEXTS, 0.0)
        for completion, chance in zip(self.paths.completions, self.paths.share_N.tolist(), strict=True):
            share[tuple(completion.token_ids)] += chance
        rewards = [float(self.sampler.reward_of[text]) for text in TEXTS]
        shares, rewards_N = (torch.tensor(x, dtype=torch.float64) for x in (list(share.values()), rewards))
        return Sampled([as_completion(text, [1] * LENGTH) for text in TEXTS], shares, rewards_N)

    def figures(self, objective: ObjectiveConfig) -> Line:
        """Cosine and length of the expected gradient against the truth, and the variance of one completion's."""
        sampled = self.texts if objective.views == "masks" else self.paths
        batch, distinct, num_draws = tables_of(sampled, objective)
        with torch.no_grad():
            logprob_U, behavior_U = self.policy.logprobs(distinct), self.sampler.logprobs(distinct)
        share_N = sampled.share_N.repeat_interleave(num_draws) / num_draws
        reward_N = sampled.reward_N.repeat_interleave(num_draws)
        batch = replace(batch, advantage_T=reward_N[batch.completion_T].float())
        batch = self._with_advantages(batch, objective, share_N, distinct)
        batch = replace(batch, coefficient_T=(share_N[batch.completion_T] * batch.packed.actions.importance_T).float())
        if self.scenario.shift:
            batch = replace(batch, behavior_logprob_T=behavior_U.float()[distinct.which_T])
        weight_T = gradient_weights(logprob_U[distinct.which_T], batch, objective)
        gradient_UD = self.policy.logprob_gradients(distinct)
        # Of each completion, its own gradient: with the share that its coefficient has taken away again.
        weight_NU = torch.zeros(len(share_N), len(gradient_UD), dtype=torch.float64)
        weight_NU.index_put_((batch.completion_T, distinct.which_T), weight_T, accumulate=True)
        expected = weight_NU.sum(dim=0) @ gradient_UD
        happens_N = share_N > 0
        each_ND = (weight_NU[happens_N] / share_N[happens_N, None]) @ gradient_UD
        second_moment = float((share_N[happens_N] * each_ND.square().sum(dim=1)).sum())
        squared = float(expected.square().sum())
        return {
            "cosine": cosine(expected, self.truth),
            "norm_ratio": float(expected.norm() / self.truth.norm()),
            "variance": second_moment / squared - 1,
        }

    def _with_advantages(
        self, batch: PolicyBatch, objective: ObjectiveConfig, share_N: Tensor, distinct: DistinctActions
    ) -> PolicyBatch:
        """The table, in which rewards stand for advantages, with those of an infinite group."""
        if objective.advantage == "gae":
            value_of = {state: self.sampler.value(state) for state in set(distinct.states)}
            value_U = torch.tensor([value_of[state] for state in distinct.states])
            gae = {"gamma": objective.gae_gamma, "lam": objective.gae_lambda}
            return with_gae([batch], [value_U[distinct.which_T]], **gae)[0]
        reward_N = torch.zeros_like(share_N).index_put((batch.completion_T,), batch.advantage_T.double())
        advantage_N = ideal_advantages(reward_N, share_N, objective)
        return replace(batch, advantage_T=advantage_N[batch.completion_T].float())


TEXTS = [(a, b, c) for a in range(VOCABULARY) for b in range(VOCABULARY) for c in range(VOCABULARY)]
Tables = tuple[PolicyBatch, DistinctActions, int]
_of_masks: dict[str, Tables] = {}


def tables_of(sampled: Sampled, objective: ObjectiveConfig) -> Tables:
    """The package's table of all these completions' actions, what they are, and how often each completion is there."""
    is_random = objective.views == "masks" or objective.steps_per_completion > 0
    num_draws = NUM_DRAWS[objective.views] if is_random else 1
    key = f"{objective.scored_as} {num_draws}"
    if objective.views == "masks" and key in _of_masks:  # they are the same whatever the model
        return _of_masks[key]
    completions = [completion for completion in sampled.completions for _ in range(num_draws)]
    group = RolloutGroup(
        prompt=Prompt(Problem(question="", answer="", columns={}), PROMPT),
        completions=completions,
        rewards=[0.0] * len(completions),
        reward_parts={},
    )
    (batch,) = pack_groups(
        [group], objective, Layout(DiffusionScheme(block_length=LENGTH, mask_token_id=MASK_ID), budget=10**9)
    )
    tables = batch, DistinctActions.of(batch.packed), num_draws
    if objective.views == "masks":
        _of_masks[key] = tables
    return tables


def ideal_advantages(reward_N: Tensor, share_N: Tensor, objective: ObjectiveConfig) -> Tensor:
    """What advantages become as a group grows, each completion as often as its share says; (N,) float64."""
    centred_N = reward_N - (share_N * reward_N).sum()
    if objective.advantage != "softmax":
        return centred_N
    up_N, down_N = centred_N.exp(), (-centred_N).exp()
    return up_N / (share_N * up_N).sum() - down_N / (share_N * down_N).sum()


def gradient_weights(logprob_T: Tensor, batch: PolicyBatch, objective: ObjectiveConfig) -> Tensor:
    """What the objective's gradient takes of the gradient of each action's log-probability; (T,) float64."""
    logprob_T = logprob_T.float().requires_grad_()
    loss = policy_loss(ActionScores(logprob_T, torch.zeros_like(logprob_T)), batch, objective)
    return -torch.autograd.grad(loss.value, logprob_T)[0].double()


def measured_objective(preset: str) -> ObjectiveConfig:
    """A preset without what pulls elsewhere on purpose."""
    objective = load_config(RLConfig, None, [f"objective={preset}"]).objective
    num_steps = min(objective.steps_per_completion, NUM_STEPS)
    return replace(objective, beta=0.0, nll_coef=0.0, entropy_coef=0.0, steps_per_completion=num_steps)


def measure(presets: Sequence[str], scenarios: Sequence[str], num_models: int) -> Iterator[Line]:
    """A line for each preset and scenario."""
    for name in scenarios:
        models = [Model(SCENARIOS[name], seed) for seed in range(num_models)]
        for preset in presets:
            objective = measured_objective(preset)
            found = [model.figures(objective) for model in models]
            cosines = [figures["cosine"] for figures in found]
            yield {
                "benchmark": "bias",
                "preset": preset,
                "scenario": name,
                "models": num_models,
                "cosine": round(fmean(cosines), 4),
                "lowest_cosine": round(min(cosines), 4),
                "norm_ratio": round(fmean(figures["norm_ratio"] for figures in found), 3),
                "variance": round(fmean(figures["variance"] for figures in found), 2),
            }


def bias_tables(lines: Sequence[Line]) -> str:
    """Direction, then length and variance; presets with equal rows share one."""
    if not lines:
        return ""
    last = {(line["preset"], line["scenario"]): line for line in lines}
    scenarios = [name for name in SCENARIOS if any(name == scenario for _, scenario in last)]
    words = {
        "Cosine to the policy gradient, mean over random models (lowest)": _direction,
        "Length over that of the policy gradient; variance of one completion over its squared mean": _size,
    }
    return "\n\n".join(f"{title}:\n\n{_table(last, scenarios, cell)}" for title, cell in words.items())


def _direction(line: Line) -> str:
    return f"{line['cosine']:.2f} ({line['lowest_cosine']:.2f})"


def _size(line: Line) -> str:
    return f"{line['norm_ratio']:.2f}; {line['variance']:.1f}"


def _table(last: dict[tuple[str, str], Line], scenarios: Sequence[str], cell: Any) -> str:
    rows: dict[tuple[str, ...], list[str]] = {}
    for preset in dict.fromkeys(preset for preset, _ in last):
        found = [last.get((preset, scenario)) for scenario in scenarios]
        rows.setdefault(tuple(cell(line) if line else "" for line in found), []).append(f"`{preset}`")
    table = [("preset", *scenarios), ("---",) * (1 + len(scenarios))]
    table += [(", ".join(presets), *cells) for cells, presets in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", help="comma-separated; default: all of configs/objectives")
    parser.add_argument("--scenarios", help=f"of {','.join(SCENARIOS)}; default all")
    parser.add_argument("--models", type=int, default=12, help="random models a scenario")
    parser.add_argument("--lines", type=Path, help="what was measured, for --table and --docs")
    parser.add_argument("--table", action="store_true", help="print the tables of the lines; measure nothing")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="put them into this page; measure nothing")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw them; measure nothing")
    options = parser.parse_args()
    if options.table or options.docs or options.picture:
        show(parser, options)
        return
    from bench_setup import provenance

    presets = options.presets.split(",") if options.presets else sorted(path.stem for path in PRESETS.glob("*.yaml"))
    scenarios = options.scenarios.split(",") if options.scenarios else list(SCENARIOS)
    if unknown := [name for name in scenarios if name not in SCENARIOS]:
        parser.error(f"--scenarios: {', '.join(unknown)} is none of {', '.join(SCENARIOS)}")
    place = provenance()
    for line in measure(presets, scenarios, options.models):
        print(json.dumps({**line, "commit": place["commit"], "date": place["date"]}), flush=True)


def show(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    from objective_tables import draw_bias, write_between

    if options.lines is None:
        parser.error("--table, --docs and --picture need --lines")
    lines = [json.loads(line) for line in options.lines.read_text(encoding="utf-8").splitlines()]
    tables = bias_tables(lines)
    if options.picture:
        kinds = {preset: measured_objective(preset).views for preset in {line["preset"] for line in lines}}
        draw_bias([{**line, "views": kinds[line["preset"]]} for line in lines], options.picture)
    if options.table:
        print(tables)
    if options.docs:
        write_between(options.docs, "bias", tables)


if __name__ == "__main__":
    sys.exit(main())
