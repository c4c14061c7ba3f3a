"""A model small enough to enumerate: every path its decoder can take, the true policy gradient, and every action's own.

One block of three masked positions, three tokens, a random reward for each text. Parameters are either shared by all
states (a logit is a sum over pairs of positions, as in a network) or one logit an entry (as in a table). Enumeration is
that of tests/parity/test_enumeration.py: a step's probability is a sum over all joint samples, by the words of the
strategy; no formula of a likelihood is in it.

Shapes: N completions, T actions, U distinct actions, D parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from dirl.diffusion.likelihood import ScoringRule, action_logprobs
from dirl.diffusion.packing import Actions, PackedViews
from dirl.rollout.engine import Completion

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.documents import action_table
from tests.parity.test_enumeration import MASK, State, Table, after, probability
from tests.parity.test_enumeration import Path as Steps

LENGTH, VOCABULARY = 3, 3
MASK_ID = VOCABULARY
PROMPT = [0] * LENGTH  # one block, which nothing here reads: the completion's is the next
_SPREAD = 1.5  # standard deviation of a logit


@dataclass(frozen=True)
class Toy(Table):
    """A model and a way to decode."""

    is_shared: bool = True  # parameters: of pairs of positions, or of (state, position, token)
    shift: float = 0.0  # standard deviation of what its parameters differ by from those of the model that sampled

    @cached_property
    def parameters(self) -> Tensor:
        """Float64, any shape, with gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        pairs, entries = (LENGTH, VOCABULARY, LENGTH, VOCABULARY + 1), (len(self.states), LENGTH, VOCABULARY)
        shape = pairs if self.is_shared else entries
        spread = _SPREAD / LENGTH**0.5 if self.is_shared else _SPREAD
        drawn, moved = (torch.randn(shape, generator=generator).double() for _ in range(2))
        return (drawn * spread + moved * self.shift).requires_grad_()

    @cached_property
    @torch.enable_grad()
    def logits(self) -> Tensor:  # type: ignore[override]
        """Float64 logits of every (state, lane, token)."""
        if not self.is_shared:
            return self.parameters
        token_SL = torch.tensor(list(self.states)) % (VOCABULARY + 1)  # MASK is the last
        seen = torch.nn.functional.one_hot(token_SL, VOCABULARY + 1).double()
        return torch.einsum("lvjx,sjx->slv", self.parameters, seen)

    @cached_property
    def all_paths(self) -> list[Steps]:
        return list(self.paths((MASK,) * LENGTH))

    @cached_property
    def reward_of(self) -> Tensor:
        """Of every text, (V, V, V) float64."""
        generator = torch.Generator().manual_seed(self.seed + 1000)
        return torch.randn((VOCABULARY,) * LENGTH, generator=generator).double()

    def reward(self, steps: Steps) -> float:
        return float(self.reward_of[after(steps[-1])])

    def true_gradient(self) -> Tensor:
        """Of the expected reward; (D,) float64."""
        terms = [self.reward(steps) * probability(steps) for steps in self.all_paths]
        return torch.autograd.grad(torch.stack(terms).sum(), self.parameters, retain_graph=True)[0].flatten()

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """Of every path; (N,) float64."""
        return torch.stack([probability(steps) for steps in self.all_paths])

    def value(self, state: State) -> float:
        """The expected reward from a state on."""
        if MASK not in state:
            return float(self.reward_of[state])
        return sum(float(step.probability.detach()) * self.value(after(step)) for step in self.outcomes(state))

    def completion(self, steps: Steps) -> Completion:
        """The path as an engine returns it."""
        number, logprobs = [0] * LENGTH, [0.0] * LENGTH
        for index, step in enumerate(steps, start=1):
            scores = self.scores(step, "reveal").tolist()
            for (lane, _), logprob in zip(step.tokens, scores, strict=True):
                number[lane], logprobs[lane] = index, logprob
        return as_completion(after(steps[-1]), number, logprobs)

    def logprobs(self, actions: DistinctActions) -> Tensor:
        """What the package gives each of these actions, with gradient; (U,) float64."""
        rows = torch.tensor([self.states[state] for state in actions.states])
        logits_UV = self.logits[rows, torch.tensor(actions.lanes)]
        rule = ScoringRule(self.distribution, self.unmasking, torch.zeros(VOCABULARY, dtype=torch.bool))
        return action_logprobs(logits_UV, actions.table, rule)[0].double()

    def logprob_gradients(self, actions: DistinctActions) -> Tensor:
        """(U, D) float64."""
        logprob_U = self.logprobs(actions)
        rows = torch.eye(len(logprob_U), dtype=torch.float64)
        (found,) = torch.autograd.grad(logprob_U, self.parameters, rows, is_grads_batched=True, retain_graph=True)
        return found.flatten(1)


def as_completion(tokens: Sequence[int], step_map: Sequence[int], logprobs: list[float] | None = None) -> Completion:
    """A text and the steps at which its tokens were revealed."""
    return Completion(
        prompt_ids=PROMPT,
        token_ids=list(tokens),
        step_map=list(step_map),
        logprobs=logprobs,
        completion_length=LENGTH,
        finish_reason="length",
        num_denoising_steps=max(step_map),
        text="",
    )


@dataclass(frozen=True)
class DistinctActions:
    """The actions of a pack, each once: the same thing done in the same state is one."""

    states: list[State]  # (U,) MASK where masked
    lanes: list[int]  # (U,)
    table: Actions  # the package's table of them, (U,)
    which_T: Tensor  # int64, which of them an action of the pack is

    @classmethod
    def of(cls, packed: PackedViews) -> DistinctActions:
        tokens, actions = packed.tokens, packed.actions
        view_VL = tokens.token_ids_L[tokens.view_L > 0].view(-1, LENGTH)
        place_T, lane_T = actions.view_T - 1, tokens.position_L[actions.index_T] % LENGTH
        kind_T = torch.where(actions.is_reveal_T, 1 + actions.is_visited_T.long(), 3)
        target_T = torch.where(actions.is_reveal_T, actions.target_T, 0)
        # A view, and what is done in it at each lane.
        done_VL = torch.zeros_like(view_VL)
        done_VL[place_T, lane_T] = kind_T * VOCABULARY + target_T
        unique, inverse_V = torch.cat([view_VL, done_VL], dim=1).unique(dim=0, return_inverse=True)
        done = unique[:, LENGTH:]
        view_U, lane_U = done.nonzero(as_tuple=True)
        number = torch.full_like(done, -1)
        number[view_U, lane_U] = torch.arange(len(view_U))
        kind_U, target_U = done[view_U, lane_U] // VOCABULARY, done[view_U, lane_U] % VOCABULARY
        states = [tuple(MASK if token == MASK_ID else token for token in row) for row in unique[:, :LENGTH].tolist()]
        return cls(
            [states[view] for view in view_U.tolist()],
            lane_U.tolist(),
            action_table(target_U, kind_U < 3, view_U + 1, is_visited_T=kind_U != 1),
            number[inverse_V[place_T], lane_T],
        )


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))
