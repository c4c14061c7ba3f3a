"""Every decoding path of a tabular model, enumerated: the trajectory likelihood is the probability of what happened.

The model is a table: logits of every position in every state of (finished blocks, current block). A step's true
outcome probabilities come from drawing every joint sample of the masked positions (and, for `random`, every order of
them), as the decoder draws them, asking `reference_reveal` what is shown, and adding up; nothing of the likelihood's
formula is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import permutations, product
from math import comb, prod
from typing import get_args

import pytest
import torch
from torch import Tensor

from dirl.diffusion.distribution import Confidence, TokenDistribution
from dirl.diffusion.likelihood import Likelihood, ScoringRule, action_logprobs
from dirl.diffusion.packing import DiffusionScheme, PackedViews
from dirl.diffusion.unmasking import UnmaskingRule, UnmaskingStrategy
from dirl.diffusion.views import placeholder_pack
from dirl.model.logprobs import ActionScores
from dirl.rl.actions import PolicyBatch
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.policy_loss import policy_loss
from tests.documents import action_table
from tests.oracle import reference_reveal, sorted_and_cut

SCHEME = DiffusionScheme(block_length=1, mask_token_id=0)
MASK = -1
State = tuple[int, ...]  # finished tokens, then the current block with MASK where it is masked
Path = list["Outcome"]


@dataclass(frozen=True)
class Outcome:
    """A step that can happen: which lanes are revealed as what."""

    state: State
    tokens: tuple[tuple[int, int], ...]  # (lane of the whole sequence, token), revealed
    probability: Tensor  # float64, by adding up joint samples, with gradient


@dataclass(frozen=True)
class Table:
    """A tabular model with a way to decode."""

    num_blocks: int
    block_length: int
    vocabulary: int
    unmasking: UnmaskingRule
    distribution: TokenDistribution
    seed: int

    @cached_property
    def logits(self) -> Tensor:
        """Float64 logits of every (state, lane, token): the parameters."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (len(self.states), self.length, self.vocabulary)
        return (torch.randn(shape, generator=generator) * 1.5).double().requires_grad_()

    @property
    def length(self) -> int:
        return self.num_blocks * self.block_length

    @cached_property
    def states(self) -> dict[State, int]:
        every = product(range(MASK, self.vocabulary), repeat=self.length)
        return {state: index for index, state in enumerate(every)}

    def logits_at(self, state: State) -> tuple[list[int], Tensor]:
        """Masked lanes of the current block, and their logits; (M,), (M, V)."""
        first = state.index(MASK) // self.block_length * self.block_length
        lanes = [lane for lane in range(first, first + self.block_length) if state[lane] == MASK]
        return lanes, self.logits[self.states[state], lanes]

    def outcomes(self, state: State) -> list[Outcome]:
        """All that the next step can do, from every joint sample of the masked lanes."""
        if state not in self._outcomes:
            self._outcomes[state] = self._find_outcomes(state)
        return self._outcomes[state]

    @cached_property
    def _outcomes(self) -> dict[State, list[Outcome]]:
        return {}

    def _find_outcomes(self, state: State) -> list[Outcome]:
        lanes, logits_MV = self.logits_at(state)
        first = lanes[0] // self.block_length * self.block_length
        plain = (logits_MV / self.distribution.temperature).softmax(-1)
        sampled = torch.stack([sorted_and_cut(row, self.distribution.top_k, self.distribution.top_p) for row in plain])
        compared = {"processed": sampled, "tempered": plain, "untempered": logits_MV.softmax(-1)}
        compared_MV = compared[self.distribution.confidence].detach()
        entropy = [float(-(row[row > 0] * row[row > 0].log()).sum()) for row in sampled.detach()]
        masked = [first + lane in lanes for lane in range(self.block_length)]
        # Uniform numbers matter by their order only, and all orders are equally likely.
        is_random = self.unmasking.strategy == "random"
        orders = list(permutations(map(float, range(self.block_length)))) if is_random else [(0.0,) * self.block_length]
        found: dict[tuple[tuple[int, int], ...], list[Tensor]] = {}
        for drawn in product(range(self.vocabulary), repeat=len(lanes)):
            probabilities = [sampled[i, token] for i, token in enumerate(drawn)]
            if not all(map(float, [p.detach() for p in probabilities])):
                continue
            confidence, uncertainty = [0.0] * self.block_length, [0.0] * self.block_length
            for i, (lane, token) in enumerate(zip(lanes, drawn, strict=True)):
                confidence[lane - first], uncertainty[lane - first] = float(compared_MV[i, token]), entropy[i]
            for order in orders:
                shown = reference_reveal(self.unmasking, masked, confidence, uncertainty, order)
                tokens = tuple((lane, t) for lane, t in zip(lanes, drawn, strict=True) if shown[lane - first])
                part = prod(probabilities[1:], start=probabilities[0]) / len(orders)
                found.setdefault(tokens, []).append(part)
        return [Outcome(state, tokens, torch.stack(parts).sum()) for tokens, parts in found.items()]

    def paths(self, state: State) -> Iterator[Path]:
        if MASK not in state:
            yield []
            return
        for outcome in self.outcomes(state):
            for rest in self.paths(after(outcome)):
                yield [outcome, *rest]

    def scores(self, outcome: Outcome, likelihood: Likelihood) -> Tensor:
        """What the package says of each action of this step; (T,)."""
        lanes, logits_MV = self.logits_at(outcome.state)
        revealed = dict(outcome.tokens)
        if likelihood == "reveal":
            kept = [i for i, lane in enumerate(lanes) if lane in revealed]
            lanes, logits_MV = [lanes[i] for i in kept], logits_MV[kept]
        actions = action_table(
            target_T=torch.tensor([revealed.get(lane, 0) for lane in lanes]),
            is_reveal_T=torch.tensor([lane in revealed for lane in lanes]),
            view_T=torch.ones(len(lanes), dtype=torch.int64),
        )
        suppressed_V = torch.zeros(self.vocabulary, dtype=torch.bool)
        rule = ScoringRule(self.distribution, self.unmasking, suppressed_V)
        return action_logprobs(logits_MV, actions, rule)[0].double()

    def chance(self, outcome: Outcome) -> float:
        """The step's probability by the package, with the factor of `random` that no weight changes and it leaves out.

        That factor is the chance of these positions among all sets of as many masked ones.
        """
        num_masked, num_revealed = len(self.logits_at(outcome.state)[0]), len(outcome.tokens)
        num_sets = comb(num_masked, num_revealed) if self.unmasking.strategy == "random" else 1
        return float(self.scores(outcome, "trajectory").sum().exp()) / num_sets


def after(outcome: Outcome) -> State:
    revealed = dict(outcome.tokens)
    return tuple(revealed.get(lane, token) for lane, token in enumerate(outcome.state))


RULES = {
    "dynamic": UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.5),
    "dynamic_low": UnmaskingRule("low_confidence_dynamic", confidence_threshold=0.25),
    "static": UnmaskingRule("low_confidence_static"),
    "static_two": UnmaskingRule("low_confidence_static", denoising_steps=2),
    "sequential": UnmaskingRule("sequential"),
    "entropy_bounded": UnmaskingRule("entropy_bounded", entropy_bound=0.8),
    "random": UnmaskingRule("random"),
    "random_two": UnmaskingRule("random", denoising_steps=2),
}
DISTRIBUTIONS = {"plain": TokenDistribution(), "cut": TokenDistribution(0.8, 3, 0.9)}
SHAPES = {"one_block": (1, 3, 4), "two_blocks": (2, 2, 3)}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    return SHAPES[request.param]


@pytest.fixture(params=DISTRIBUTIONS)
def distribution(request: pytest.FixtureRequest) -> TokenDistribution:
    return DISTRIBUTIONS[request.param]


def test_every_strategy_is_enumerated() -> None:
    assert {rule.strategy for rule in RULES.values()} == set(get_args(UnmaskingStrategy))


@pytest.mark.parametrize("rule", RULES)
def test_each_outcome_has_its_true_probability(
    shape: tuple[int, int, int], rule: str, distribution: TokenDistribution
) -> None:
    table = Table(*shape, RULES[rule], distribution, seed=1)
    start: State = (MASK,) * table.length
    with torch.no_grad():
        total = sum(prod(map(table.chance, path)) for path in table.paths(start))
        for state, outcomes in table._outcomes.items():
            for outcome in outcomes:
                found = table.chance(outcome)
                assert found == pytest.approx(float(outcome.probability), abs=1e-6), (state, outcome.tokens)
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("confidence", get_args(Confidence))
@pytest.mark.parametrize("rule", ["dynamic", "static_two"])
def test_each_outcome_has_its_true_probability_whatever_confidence_is(confidence: Confidence, rule: str) -> None:
    table = Table(*SHAPES["one_block"], RULES[rule], TokenDistribution(0.6, 3, 0.9, confidence), seed=1)
    with torch.no_grad():
        total = sum(prod(map(table.chance, path)) for path in table.paths((MASK,) * table.length))
        for outcome in (o for outcomes in table._outcomes.values() for o in outcomes):
            assert table.chance(outcome) == pytest.approx(float(outcome.probability), abs=1e-6), outcome.tokens
    assert total == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("holds", [True, False])
def test_tokens_of_just_the_threshold(holds: bool) -> None:
    """Logits of 0 or 1 out of 4 tokens, and a threshold that many tokens have to the last bit."""
    table = Table(*SHAPES["one_block"], UnmaskingRule(confidence_threshold=0.25), TokenDistribution(), seed=5)
    table = replace(table, unmasking=replace(table.unmasking, holds_at_threshold=holds))
    with torch.no_grad():
        table.logits[::3] = 0.0  # every third state: all four tokens alike
        table.logits[:, 1] = 0.0  # the middle lane always
        total = sum(prod(map(table.chance, path)) for path in table.paths((MASK,) * table.length))
        for outcome in (o for outcomes in table._outcomes.values() for o in outcomes):
            assert table.chance(outcome) == pytest.approx(float(outcome.probability), abs=1e-6), outcome
    assert total == pytest.approx(1.0, abs=1e-6)


def probability(path: Path) -> Tensor:
    return torch.stack([outcome.probability for outcome in path]).prod()


def expected_reward_gradient(table: Table, paths: list[Path], reward: Callable[[Path], float]) -> Tensor:
    """Autograd through sum over paths of probability times reward."""
    expectation = torch.stack([reward(path) * probability(path) for path in paths]).sum()
    return torch.autograd.grad(expectation, table.logits)[0]


def dipo_gradient(
    table: Table,
    paths: list[Path],
    advantages: list[float],
    likelihood: Likelihood,
    critic: Callable[[State], float] = lambda state: 0.0,
) -> Tensor:
    """Where DiPO's objective leads on policy, when every path is rolled out as often as its probability says.

    Args:
        critic: its value of each step's state is taken off that step's advantages.
    """
    scores = {id(o): table.scores(o, likelihood) for path in paths for o in path}
    logprobs = [torch.cat([scores[id(o)] for o in path]) for path in paths]
    path_T = torch.arange(len(paths)).repeat_interleave(torch.tensor([len(actions) for actions in logprobs]))
    value_T = torch.tensor([critic(o.state) for path in paths for o in path for _ in scores[id(o)]])
    advantage_T = torch.tensor(advantages, dtype=torch.float64)[path_T] - value_T
    with torch.no_grad():
        probability_T = torch.stack([probability(path) for path in paths])[path_T]
    logprob_T = torch.cat(logprobs)
    actions = action_table(torch.zeros_like(path_T), torch.ones_like(path_T, dtype=torch.bool), path_T)
    batch = replace(
        PolicyBatch.blank(PackedViews(placeholder_pack(SCHEME).tokens, actions)),
        behavior_logprob_T=logprob_T.detach(),
        advantage_T=advantage_T,
        coefficient_T=probability_T,
    )
    loss = policy_loss(ActionScores(logprob_T, torch.zeros_like(advantage_T)), batch, ObjectiveConfig())
    return -torch.autograd.grad(loss.value, table.logits)[0]


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("rule", RULES)
def test_dipo_with_trajectory_scores_follows_the_true_policy_gradient(
    shape: tuple[int, int, int],
    rule: str,
    distribution: TokenDistribution,
    record_property: Callable[[str, object], None],
) -> None:
    # Cut, the tables of seed 2 leave next to nothing to chance.
    table = Table(*shape, RULES[rule], distribution, seed=3 if distribution.top_k else 2)
    paths = list(table.paths((MASK,) * table.length))
    rewards = torch.randn((table.vocabulary,) * table.length, generator=torch.Generator().manual_seed(3))

    def reward(path: Path) -> float:
        return float(rewards[after(path[-1])])

    with torch.no_grad():
        mean = sum(reward(path) * float(probability(path)) for path in paths)
    truth = expected_reward_gradient(table, paths, reward)
    figures: dict[str, float] = {}
    for likelihood in get_args(Likelihood):
        for name, baseline in (("no_baseline", 0.0), ("mean_baseline", mean)):
            found = dipo_gradient(table, paths, [reward(path) - baseline for path in paths], likelihood)
            figures[f"{likelihood}/{name}/cosine"] = cosine(found, truth)
            figures[f"{likelihood}/{name}/norm_ratio"] = float(found.norm() / truth.norm())
    for key, value in figures.items():
        record_property(key, value)
    print(
        f"\n{rule}, {distribution}, {shape}, {len(paths)} paths:",
        {key: round(value, 4) for key, value in figures.items()},
    )
    looks_at_tokens = RULES[rule].strategy.startswith("low_confidence")
    for name in ("no_baseline", "mean_baseline"):
        assert figures[f"trajectory/{name}/cosine"] >= 0.9999
        assert figures[f"trajectory/{name}/norm_ratio"] == pytest.approx(1.0, abs=1e-3)
        if looks_at_tokens:
            assert figures[f"trajectory/{name}/cosine"] > figures[f"reveal/{name}/cosine"] + 1e-4
        else:  # holds say nothing: the two are the same
            assert figures[f"reveal/{name}/cosine"] >= 0.9999


@pytest.mark.parametrize("rule", RULES)
def test_a_critic_that_ignores_the_token_changes_no_expectation(rule: str, distribution: TokenDistribution) -> None:
    """Any number for each state, taken off the advantages of the step that leaves it."""
    table = Table(*SHAPES["two_blocks"], RULES[rule], distribution, seed=3)
    paths = list(table.paths((MASK,) * table.length))
    generator = torch.Generator().manual_seed(4)
    rewards = torch.randn((table.vocabulary,) * table.length, generator=generator)
    values = dict(zip(table.states, torch.randn(len(table.states), generator=generator).tolist(), strict=True))
    advantages = [float(rewards[after(path[-1])]) for path in paths]
    without = dipo_gradient(table, paths, advantages, "trajectory")
    found = dipo_gradient(table, paths, advantages, "trajectory", values.__getitem__)
    assert float(without.abs().max()) > 1e-3
    torch.testing.assert_close(found, without, atol=1e-6, rtol=0)
