"""A prompt -> the confidence threshold that a completion of it is decoded with: a small policy, learned with the model.

A high threshold spends denoising steps, a low one saves them, and a reward that counts both answers and steps wants
them spent where they help. The choice is one more action of a completion, drawn before its tokens and given the
completion's own advantage:

    p(k | prompt) = softmax(W h + b)_k
    J = 1/N sum over completions of min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A),   loss = -J

with h the last hidden state of the prompt's last token (detached, scaled to length 1: then one learning rate fits
models of every width), N the completions of the global batch, and rho the ratio of p now and when the threshold was
drawn. W and b begin at zero: all thresholds are equally likely. Every rank has the whole head; gradients are summed
over ranks, and all take the same step.

Shapes: P prompts, G completions a group, N completions of this rank, K thresholds, D hidden, B block length.
Source: DiFFPO's idea of a sampler whose threshold a head chooses for each prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dirl.config import Config, bounded
from dirl.diffusion.packing import DiffusionScheme, ViewedDocument, Views, pack
from dirl.errors import UserError
from dirl.model.logprobs import PackedScorer
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rollout_group import RolloutGroup, ThresholdChoice
from dirl.training.balance import split_by_budget
from dirl.training.distributed import Distributed
from dirl.training.seeds import stable_seed

Prompts = Sequence[Sequence[int]]  # token ids

_CHOICE = 1  # tells the seed of a completion's threshold from that of its tokens


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(Config):
    """The thresholds that a learned policy chooses from."""

    # confidence thresholds, one of which is chosen for each completion; empty: all have confidence_threshold
    threshold_policy: list[float] = field(default_factory=list, metadata={"above": 0, "most": 1})
    threshold_policy_learning_rate: float = bounded(1e-2, above=0)  # Adam's, of the head that chooses

    def check(self) -> None:
        choices = self.threshold_policy
        if choices and (len(choices) < 2 or len(set(choices)) < len(choices)):
            raise UserError(f"threshold_policy needs at least two thresholds, all different, got {choices}")


class ThresholdPolicy:
    """The head, its optimizer, and what both are used for.

    Args:
        states_of: prompts -> (P, D) float32 on the host, what the head reads.
    """

    def __init__(
        self,
        config: ThresholdConfig,
        states_of: Callable[[Prompts], Tensor],
        objective: ObjectiveConfig,
        distributed: Distributed,
        *,
        hidden_size: int,
    ) -> None:
        self.thresholds, self.states_of = list(config.threshold_policy), states_of
        self.objective, self.distributed = objective, distributed
        self.weight_KD = torch.zeros(len(self.thresholds), hidden_size, requires_grad=True)
        self.bias_K = torch.zeros(len(self.thresholds), requires_grad=True)
        self._parameters = (self.weight_KD, self.bias_K)
        # This epsilon keeps Adam from making whole steps of what rounding leaves of a gradient that is zero.
        self._optimizer = torch.optim.Adam(self._parameters, lr=config.threshold_policy_learning_rate, eps=1e-5)

    def logprobs(self, state_PD: Tensor) -> Tensor:
        """Log-probability of each threshold for each prompt, in nats; (P, K)."""
        return (state_PD @ self.weight_KD.T + self.bias_K).log_softmax(dim=1)

    @torch.no_grad()
    def draw(self, prompts: Prompts, seeds: Sequence[int], num_generations: int) -> list[ThresholdChoice]:
        """A threshold for each completion of each prompt; a draw depends on its prompt, seed and place only."""
        state_PD = self.states_of(prompts)
        if not bool(state_PD.isfinite().all()):
            raise UserError("rollout.threshold_policy: the model's hidden states are not finite; training has diverged")
        choices = []
        for state_D, logprob_K, seed in zip(state_PD, self.logprobs(state_PD), seeds, strict=True):
            cumulative_K = logprob_K.double().exp().cumsum(0)
            uniforms = [stable_seed(seed, sample, _CHOICE) / 2**63 for sample in range(num_generations)]
            uniform_G = torch.tensor(uniforms, dtype=torch.float64) * cumulative_K[-1]
            index_G = torch.searchsorted(cumulative_K, uniform_G, right=True).clamp(max=len(self.thresholds) - 1)
            choices.append(ThresholdChoice(index_G.tolist(), logprob_K[index_G].tolist(), state_D.tolist()))
        return choices

    @torch.no_grad()
    def best(self, prompts: Prompts) -> list[float]:
        """The most probable threshold for each prompt; of equally probable ones the first."""
        return [self.thresholds[index] for index in self.logprobs(self.states_of(prompts)).argmax(dim=1).tolist()]

    def update(
        self, groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], num_iterations: int = 1
    ) -> dict[str, float]:
        """A step of the head for each pass over a batch of rollouts, and its metrics; collective.

        Args:
            advantages: (G,) float32 for each group.
        """
        chosen = _Chosen.of(groups, advantages, self.weight_KD.shape[1])
        (count,) = self.distributed.sum(len(chosen.index_N))
        norm = entropy = 0.0
        for _ in range(num_iterations):
            norm, entropy = self._step(chosen, max(count, 1.0))
        (total,) = self.distributed.sum(sum(self.thresholds[index] for index in chosen.index_N.tolist()))
        return {"threshold/mean": total / max(count, 1.0), "threshold/entropy": entropy, "threshold/grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the head is tiny."""
        moments = [
            {name: value.tolist() for name, value in self._optimizer.state.get(parameter, {}).items()}
            for parameter in self._parameters
        ]
        return {**self.as_row(), "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        with torch.no_grad():
            for parameter, name in zip(self._parameters, ("weight", "bias"), strict=True):
                parameter.copy_(torch.tensor(state[name]))
        moments = {
            number: {name: torch.tensor(value) for name, value in of_parameter.items()}
            for number, of_parameter in enumerate(state["moments"])
            if of_parameter
        }
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})

    def as_row(self) -> dict[str, Any]:
        """The head: all it takes to choose."""
        weight, bias = self.weight_KD.tolist(), self.bias_K.tolist()
        return {"thresholds": self.thresholds, "weight": weight, "bias": bias}

    def _step(self, chosen: _Chosen, count: float) -> tuple[float, float]:
        """One optimizer step; the norm of its gradient, and the entropy (nats) before it."""
        logprob_NK = self.logprobs(chosen.state_ND)
        loss = threshold_loss(logprob_NK, chosen.index_N, chosen.behavior_N, chosen.advantage_N, self.objective)
        gradients = torch.autograd.grad(loss / count, self._parameters)
        entropy = float(-(logprob_NK.detach().exp() * logprob_NK.detach()).sum())
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.tensor([entropy])])
        *summed, entropy_1 = self.distributed.summed(flat).split([*map(torch.numel, gradients), 1])
        norm = float(torch.cat(summed).norm())
        for parameter, gradient in zip(self._parameters, summed, strict=True):
            parameter.grad = gradient.float().view_as(parameter)
        self._optimizer.step()
        return norm, float(entropy_1) / count


def threshold_loss(
    logprob_NK: Tensor, index_N: Tensor, behavior_N: Tensor, advantage_N: Tensor, objective: ObjectiveConfig
) -> Tensor:
    """Minus the clipped surrogate of the choices, summed; the caller divides by the global number of completions.

    Args:
        index_N: int64, which threshold.
        behavior_N: float32 nats, its log-probability when it was drawn.
    """
    ratio_N = (logprob_NK.gather(1, index_N[:, None]).squeeze(1) - behavior_N).exp()
    clipped_N = ratio_N.clamp(1 - objective.epsilon, 1 + objective.epsilon_high)
    return -torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N).sum()


@dataclass(frozen=True)
class _Chosen:
    """The choices of a batch of rollouts."""

    state_ND: Tensor  # float32
    index_N: Tensor  # int64
    behavior_N: Tensor  # float32, nats
    advantage_N: Tensor  # float32

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], advantages: Sequence[Tensor], hidden_size: int) -> _Chosen:
        choices = [choice for group in groups if (choice := group.threshold_choice)]
        states = [choice.state for choice in choices for _ in choice.indices]
        return cls(
            torch.tensor(states, dtype=torch.float32).view(-1, hidden_size),
            torch.tensor([index for choice in choices for index in choice.indices], dtype=torch.int64),
            torch.tensor([logprob for choice in choices for logprob in choice.logprobs], dtype=torch.float32),
            torch.cat([torch.zeros(0), *(advantage_G.cpu() for advantage_G in advantages)]),
        )


def build_threshold_policy(
    config: ThresholdConfig,
    scorer: PackedScorer,
    objective: ObjectiveConfig,
    distributed: Distributed,
    *,
    budget: int,
    bf16: bool,
) -> ThresholdPolicy | None:
    """The policy over the states of the model that is trained; None where none is asked for.

    Raises:
        UserError: the model is sharded.
    """
    if not config.threshold_policy:
        return None
    if distributed.is_sharded:
        raise UserError(
            f"rollout.threshold_policy reads prompts on each rank by itself, and under {distributed.backend} none has "
            "whole weights; set ACCELERATE_CONFIG to zero1 or zero2"
        )
    states_of = partial(prompt_states, scorer, budget=budget, bf16=bf16)
    hidden_size = scorer.model.config.hidden_size
    return ThresholdPolicy(config, states_of, objective, distributed, hidden_size=hidden_size)


@torch.no_grad()
def prompt_states(scorer: PackedScorer, prompts: Prompts, *, budget: int, bf16: bool = False) -> Tensor:
    """What a head reads of each prompt; (P, D) float32 on the host.

    The last hidden state of its last token, with nothing after it, scaled to length 1. Each distinct prompt is read
    once, in passes of at most `budget` tokens.
    """
    scheme, device = scorer.model.scheme, next(scorer.model.parameters()).device
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    lengths = [len(prompt) for prompt in distinct]
    was_training = scorer.training
    found: dict[tuple[int, ...], Tensor] = {}
    scorer.eval()
    try:
        for members in split_by_budget(lengths, max([budget, *lengths])):
            documents = [ViewedDocument(torch.tensor(distinct[i]), [_no_views(scheme, lengths[i])]) for i in members]
            tokens = pack(documents, scheme.block_length).tokens.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                hidden_LD = scorer.hidden_states(tokens)
            last_M = torch.tensor([lengths[i] for i in members]).cumsum(0) - 1
            state_MD = torch.nn.functional.normalize(hidden_LD[last_M.to(device)].float(), dim=1).cpu()
            found |= {distinct[i]: state_D for i, state_D in zip(members, state_MD, strict=True)}
    finally:
        scorer.train(was_training)
    nothing_0D = torch.zeros(0, scorer.model.config.hidden_size)
    return torch.cat([nothing_0D, *(found[tuple(prompt)][None] for prompt in prompts)])


def _no_views(scheme: DiffusionScheme, prompt_length: int) -> Views:
    """A completion of nothing: its branch holds the prompt's tail, the tokens of its last block."""
    ids, lanes = torch.zeros(0, dtype=torch.int64), torch.zeros(0, scheme.block_length, dtype=torch.int64)
    nowhere = lanes.bool()
    nothing = torch.zeros(0), scheme.lead(prompt_length), lanes.float()
    return Views(ids, ids, lanes, lanes, nowhere, nowhere, lanes.float(), nowhere, *nothing)
