"""Every objective the slow obvious way: one forward pass per state, then loops over completions, levels and actions.

    D_g = Z sum over i in g of w_i (l_i - l_i of the behaviour policy),  rho_g = exp D_g
    J   = sum over g of c_g s(rho_g, A_g)  -  beta sum c KL  +  entropy_coef sum c H  +  nll_coef mean l,   loss = -J

Of the package only `model(input_ids)` and random draws are used: which masks and which steps were drawn. What they
count is worked out here, from the papers' formulas.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dirl.diffusion.packing import Views
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rollout_group import RolloutGroup
from dirl.rollout.engine import Completion, SamplingConfig
from tests.oracle import state_logits


@dataclass(frozen=True)
class Row:
    """One action: what happened, or is asked about, at a masked position of one state of one block."""

    view: int  # of its completion
    block: int
    noisy: tuple[int, ...]  # (B,) ids the model reads
    lane: int
    weight: float  # of its log-probability in that of the completion
    shown: tuple[int, ...]  # lanes that were revealed in this state
    is_reveal: bool = True
    is_visited: bool = False  # the decoder did this here
    importance: float = 1.0  # 1 over how often its view was expected to be drawn


@dataclass(frozen=True)
class State:
    """A replayed state: `shown` are the lanes to reveal, `first` those of them that the decoder revealed here."""

    block: int
    noisy: tuple[int, ...]
    shown: tuple[int, ...]
    first: tuple[int, ...]
    held: tuple[int, ...]


def replayed_states(completion: Completion, block_length: int, mask: int, shrink: int) -> Iterator[State]:
    clean = completion.prompt_ids + completion.token_ids
    steps = [0] * len(completion.prompt_ids) + completion.step_map
    for block in range(len(completion.prompt_ids) // block_length, len(clean) // block_length):
        tokens, at = (x[block * block_length : (block + 1) * block_length] for x in (clean, steps))
        for step in range(1, max(at) + 1, shrink):
            yield State(
                block=block,
                noisy=tuple(mask if s >= step else token for token, s in zip(tokens, at, strict=True)),
                shown=tuple(lane for lane, s in enumerate(at) if step <= s < step + shrink),
                first=tuple(lane for lane, s in enumerate(at) if s == step),
                held=tuple(lane for lane, s in enumerate(at) if s >= step + shrink),
            )


def replay_rows(completion: Completion, objective: ObjectiveConfig, drawn: Views, mask: int) -> list[Row]:
    block_length = drawn.token_ids_VB.shape[1]
    states = list(replayed_states(completion, block_length, mask, objective.shrink))
    importance = step_importance(completion, states, objective, drawn)
    rows = []
    for view, state in enumerate(states):
        if view not in importance:
            continue
        here = Row(view, state.block, state.noisy, 0, 1.0, state.shown, importance=importance[view])
        scored = sorted(state.shown + state.held) if objective.score == "masked" else state.shown
        weight = len(completion.token_ids) / (len(states) * len(scored)) if objective.score == "masked" else 1.0
        for lane in scored:
            rows.append(replace(here, lane=lane, weight=weight, is_visited=lane in state.first))
        if objective.likelihood == "trajectory":
            rows += [replace(here, lane=lane, is_reveal=False, is_visited=True) for lane in state.held]
    return rows


def step_importance(
    completion: Completion, states: Sequence[State], objective: ObjectiveConfig, drawn: Views
) -> dict[int, float]:
    """1 / expected number of draws, times the draws, of each state that was drawn."""
    num_steps, num_states = objective.steps_per_completion, len(states)
    if num_steps == 0 or num_states <= num_steps:
        return dict.fromkeys(range(num_states), 1.0)
    share = [1 / num_states] * num_states
    if objective.step_sampling == "surprisal":
        assert completion.logprobs is not None
        first = len(completion.prompt_ids)
        block_length = drawn.token_ids_VB.shape[1]
        nats = [
            -sum(completion.logprobs[state.block * block_length + lane - first] for lane in state.shown)
            for state in states
        ]
        share = [0.9 * x / sum(nats) + 0.1 / num_states for x in nats]
    kept = list(zip(drawn.block_V.tolist(), map(tuple, drawn.token_ids_VB.tolist()), strict=True))
    found, num_drawn = {}, 0
    for view, state in enumerate(states):
        if (state.block, state.noisy) in kept:
            place = kept.index((state.block, state.noisy))
            expected = share[view] * num_steps
            count = round(float(drawn.importance_V[place]) * expected)  # the random part
            assert abs(count - expected) < 1, "a draw at even distances"
            found[view], num_drawn = count / expected, num_drawn + count
    assert num_drawn == num_steps and len(found) == len(kept)
    return found


def mask_rows(completion: Completion, objective: ObjectiveConfig, drawn: Views, mask: int) -> list[Row]:
    block_length, share = drawn.token_ids_VB.shape[1], objective.full_mask_share
    rows, view = [], 0
    for block in sorted(set(drawn.block_V.tolist())):
        num_maskable = min(block_length, (block + 1) * block_length - len(completion.prompt_ids))
        here = [v for v in range(len(drawn)) if int(drawn.block_V[v]) == block]
        for number, v in enumerate(here):
            noisy = tuple(drawn.token_ids_VB[v].tolist())
            lanes = tuple(lane for lane, token in enumerate(noisy) if token == mask)
            if share > 0 and number == len(here) - 1:
                assert len(lanes) == num_maskable, "the full mask"
                weight = share
            else:
                given = float(drawn.weight_VB[v, 0]) / (1 - share)
                weight = (1 - share) * mask_weight(objective, num_maskable, len(lanes), number, given)
            rows += [Row(view, block, noisy, lane, weight, lanes) for lane in lanes]
            view += 1
    return rows


def mask_weight(objective: ObjectiveConfig, m: int, k: int, number: int, given: float) -> float:
    """What a token counts in a draw that masks k of m.

    Args:
        number: of the draw in its block, counting those that mask anything.
        given: the package's, in which the random level of an `interval` is.
    """
    num_draws = m if objective.mask_levels == "every" else objective.num_masks
    halves = 2 if objective.complementary else 1
    if objective.mask_weights == "none":
        return 1 / num_draws
    if objective.mask_weights == "mean":
        return 1 / (k * num_draws * halves)
    if objective.mask_levels == "interval":
        level = 1 / (given * num_draws * halves)
        low, high = objective.mask_level_min, objective.mask_level_max
        assert low - 1e-6 <= level <= high + 1e-6 or (halves == 2 and low - 1e-6 <= 1 - level <= high + 1e-6)
        return 1 / (level * num_draws * halves)
    if objective.mask_levels == "gauss":
        return float(np.polynomial.legendre.leggauss(num_draws)[1][number]) / 2 * m / k
    return (m + 1) / (2 * k * num_draws) if objective.complementary else m / (k * num_draws)


@dataclass
class SlowModel:
    """A model with a way to sample -> what it gives single actions, in float64."""

    model: BlockDiffusionModel
    sampling: SamplingConfig
    logits: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # of the states met so far, (B, V)
    plain: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # log-probabilities under temperature alone

    def confidences(self, completion: Completion, row: Row) -> Tensor:
        """Log-probabilities under temperature alone; (B, V)."""
        block_length = self.model.config.block_size
        clean = (completion.prompt_ids + completion.token_ids)[: row.block * block_length]
        state = (*clean, *row.noisy)
        if state not in self.logits:
            self.logits[state] = state_logits(self.model, clean, row.block, list(row.noisy))
        if state not in self.plain:
            logits_BV = self.logits[state].double() / self.sampling.temperature
            allowed_V = torch.arange(logits_BV.shape[1]) < self.model.config.tokenizer_length
            allowed_V[self.model.config.mask_token_id] = False
            self.plain[state] = torch.stack([log_softmax(row_V, allowed_V) for row_V in logits_BV])
        return self.plain[state]

    def sampled(self, completion: Completion, row: Row) -> Tensor:
        """Log-probabilities at the row's lane after top-k; what was revealed there was possible; (V,)."""
        plain_V = self.confidences(completion, row)[row.lane]
        if self.sampling.top_k == 0:
            return plain_V
        kept_V = torch.zeros(len(plain_V), dtype=torch.bool)
        kept_V[plain_V.detach().sort(descending=True).indices[: self.sampling.top_k]] = True
        if row.is_reveal:
            kept_V[self.token(completion, row, row.lane)] = True
        return log_softmax(plain_V, kept_V)

    def token(self, completion: Completion, row: Row, lane: int) -> int:
        return (completion.prompt_ids + completion.token_ids)[row.block * self.model.config.block_size + lane]

    def logprob(self, completion: Completion, row: Row) -> Tensor:
        if not row.is_reveal:
            return self.hold(completion, row)
        token_V = self.sampled(completion, row) if row.is_visited else self.confidences(completion, row)[row.lane]
        return token_V[self.token(completion, row, row.lane)]

    def hold(self, completion: Completion, row: Row) -> Tensor:
        """That the lane draws a token less confident than what was revealed, or than the threshold."""
        if self.sampling.unmasking_strategy != "low_confidence_dynamic":
            return torch.zeros((), dtype=torch.float64)
        confidence_BV = self.confidences(completion, row).detach().exp()
        revealed = [float(confidence_BV[lane, self.token(completion, row, lane)]) for lane in row.shown]
        bar = min(self.sampling.confidence_threshold, *revealed)
        below_V = confidence_BV[row.lane] < bar
        return self.sampled(completion, row).exp()[below_V].sum().log()

    def entropy(self, completion: Completion, row: Row) -> Tensor:
        logprob_V = self.sampled(completion, row)
        possible_V = logprob_V[logprob_V > -math.inf]
        return -(possible_V.exp() * possible_V).sum()


def log_softmax(logits_V: Tensor, allowed_V: Tensor) -> Tensor:
    shifted_V = (logits_V - logits_V.detach()[allowed_V].max()).masked_fill(~allowed_V, -torch.inf)
    return shifted_V - shifted_V.exp().sum().log()


def slow_advantages(groups: Sequence[RolloutGroup], objective: ObjectiveConfig) -> list[list[float]]:
    everything = [reward for group in groups for reward in group.rewards]
    found = []
    for group in groups:
        rewards, size = group.rewards, len(group.rewards)
        centred = [reward - statistics.fmean(rewards) for reward in rewards]
        if objective.advantage == "leave_one_out":
            centred = [reward - (sum(rewards) - reward) / (size - 1) for reward in rewards]
        scale = {"none": 1.0, "group": statistics.stdev(rewards) + 1e-4, "batch": statistics.stdev(everything) + 1e-4}
        scaled = [x / scale[objective.scale_rewards] for x in centred]
        if objective.advantage == "softmax":
            good, bad = sum(math.exp(x) for x in scaled), sum(math.exp(-x) for x in scaled)
            scaled = [math.exp(x) / good - math.exp(-x) / bad for x in scaled]
        found.append(scaled)
    return found


def gae(
    completion: Completion, rows: Sequence[Row], critic: BlockDiffusionModel, outcome: float, objective: ObjectiveConfig
) -> list[float]:
    """The advantage of each action: denoising steps backwards, the outcome at the last one.

    Args:
        critic: a model with one number in place of logits.
    """
    clean, block_length = completion.prompt_ids + completion.token_ids, critic.config.block_size
    gamma, lam = objective.gae_gamma, objective.gae_lambda
    with torch.no_grad():
        values = [
            float(state_logits(critic, clean[: row.block * block_length], row.block, list(row.noisy))[row.lane, 0])
            for row in rows
        ]
    found, reward, next_value, next_advantage = [0.0] * len(rows), outcome, 0.0, 0.0
    for members in reversed(by(rows, "step")):
        value = statistics.fmean(values[i] for i in members if rows[i].is_reveal)
        later = gamma * next_value + gamma * lam * next_advantage
        for i in members:
            found[i] = reward - (values[i] if rows[i].is_reveal else value) + later
        reward, next_value, next_advantage = 0.0, value, reward - value + later
    return found


@dataclass(frozen=True)
class Scored:
    """One completion with what three policies give its actions."""

    completion: Completion
    rows: list[Row]
    policy: list[Tensor]
    behavior: list[Tensor]
    reference: list[Tensor]
    advantages: list[float]  # of each action; one number, but for a critic's

    @property
    def length(self) -> int:
        return len(self.completion.token_ids)

    def advantage(self, members: Sequence[int]) -> float:
        (advantage,) = {self.advantages[i] for i in members}
        return advantage


def by(rows: Sequence[Row], level: str) -> list[list[int]]:
    """Which rows share a ratio."""
    keys = {
        "action": lambda i: i,
        "token": lambda i: (rows[i].block, rows[i].lane),
        "step": lambda i: rows[i].view,
        "block": lambda i: rows[i].block,
        "sequence": lambda i: 0,
    }
    found: dict[object, list[int]] = {}
    for i in range(len(rows)):
        found.setdefault(keys[level](i), []).append(i)
    return list(found.values())


def surrogate(scored: Scored, objective: ObjectiveConfig) -> Tensor:
    """Sum over the levels' sets of s(rho, A), before the completion's coefficient."""
    rows = scored.rows
    if objective.surrogate == "sandwich":
        return sandwich(scored, objective)
    terms = []
    for members in by(rows, objective.importance_sampling_level):
        advantage = scored.advantage(members)
        z = 1 / scored.length if objective.ratio_normalizer == "length" else 1.0
        difference = sum(rows[i].weight * (scored.policy[i] - scored.behavior[i]) for i in members)
        ratio = torch.exp(z * torch.as_tensor(difference))
        loglikelihood = torch.as_tensor(sum(rows[i].weight * scored.policy[i] for i in members))
        if objective.surrogate == "reinforce":
            term = advantage * loglikelihood
        elif objective.surrogate == "cispo":
            term = min(float(ratio.detach()), 1 + objective.epsilon_high) * advantage * loglikelihood
        else:
            term = clipped(ratio, advantage, objective) / z
        (importance,) = {rows[i].importance for i in members}
        terms.append(importance * term)
    return torch.stack(terms).sum()


def clipped(ratio: Tensor, advantage: float, objective: ObjectiveConfig) -> Tensor:
    bounded = min(max(float(ratio.detach()), 1 - objective.epsilon), 1 + objective.epsilon_high)
    inside = ratio if bounded == float(ratio.detach()) else torch.tensor(bounded, dtype=ratio.dtype)
    term = min(ratio * advantage, inside * advantage, key=lambda x: float(x.detach()))
    floor = objective.delta * advantage
    if objective.delta > 0 and advantage < 0 and float(term.detach()) < floor:
        return torch.tensor(floor, dtype=ratio.dtype)
    return term


def sandwich(scored: Scored, objective: ObjectiveConfig) -> Tensor:
    lower = torch.stack([row.weight * x for row, x in zip(scored.rows, scored.policy, strict=True)]).sum()
    advantage = scored.advantage(range(len(scored.rows)))
    if advantage > 0:
        return advantage * lower
    beta = objective.sandwich_beta
    uppers = [
        torch.stack([scored.rows[i].weight * scored.policy[i].exp() ** beta for i in members]).sum().log() / beta
        for members in by(scored.rows, "token")
    ]
    upper = torch.stack(uppers).mean() * scored.length
    share = objective.sandwich_weight
    return advantage * (share * upper + (1 - share) * lower)


def kl(scored: Scored, objective: ObjectiveConfig) -> Tensor:
    """Of each action of a replay, of each token in its masks together, or of the completion."""
    estimate = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: torch.exp(-d) + d - 1,
    }[objective.kl_estimator]
    rows, others = scored.rows, scored.behavior if objective.kl_to == "behavior" else scored.reference
    differences = [mine - other for mine, other in zip(scored.policy, others, strict=True)]
    if objective.kl_level == "token" and objective.views == "replay":
        return torch.stack(
            [r.importance * r.weight * estimate(d) for r, d in zip(rows, differences, strict=True)]
        ).sum()
    sets = by(rows, objective.kl_level)
    return torch.stack(
        [estimate(torch.stack([rows[i].weight * differences[i] for i in members]).sum()) for members in sets]
    ).sum()


@dataclass(frozen=True)
class Batch:
    """The completions of an optimizer step, and what decides how much each counts."""

    groups: list[RolloutGroup]
    objective: ObjectiveConfig
    max_completion_length: int
    ranks: list[list[int]]  # numbers of the completions that each process has
    kept: list[int]  # numbers of those that are trained on: a token budget may leave some out

    @property
    def completions(self) -> list[Completion]:
        return [completion for group in self.groups for completion in group.completions]

    def is_trained(self, number: int) -> bool:
        return not (self.objective.mask_truncated_completions and self.completions[number].finish_reason == "length")

    def coefficient(self, number: int) -> float:
        if not self.is_trained(number):
            return 0.0
        lengths = {n: len(c.token_ids) for n, c in enumerate(self.completions) if self.is_trained(n)}
        rank = next(members for members in self.ranks if number in members)
        return {
            "dapo": 1 / sum(lengths.values()),
            "grpo": 1 / len(lengths) / lengths[number],
            "dr_grpo": 1 / (len(lengths) * self.max_completion_length),
            "bnpo": 1 / len(self.ranks) / sum(lengths[n] for n in rank if n in lengths),
            "luspo": 1 / len(lengths),
        }[self.objective.loss_type]

    def nll_shares(self) -> dict[int, float]:
        """1 / tokens of all completions that anchor, for each of these."""
        right = [
            (parts or 0) > 0 for group in self.groups for parts in group.reward_parts.get("accuracy", group.rewards)
        ]
        anchors = [n for n in range(len(right)) if right[n] or self.objective.nll_on == "all"]
        num_tokens = sum(len(self.completions[n].token_ids) for n in anchors)
        return dict.fromkeys(anchors, 1 / num_tokens)


def slow_loss(
    batch: Batch,
    rows: list[list[Row]],
    *,
    policy: SlowModel,
    behavior: SlowModel | None,
    reference: SlowModel,
    critic: BlockDiffusionModel,
) -> Tensor:
    """The loss of one optimizer step.

    Args:
        rows: of each completion.
        behavior: None: the policy itself.
        critic: gives one number in place of logits; read with advantage=gae.
    """
    objective, total = batch.objective, torch.zeros((), dtype=torch.float64)
    advantages = [a for of_group in slow_advantages(batch.groups, objective) for a in of_group]
    factor = len(batch.completions) / len(batch.kept)
    for number in batch.kept:
        completion = batch.completions[number]

        def scores(model: SlowModel, completion: Completion = completion, number: int = number) -> list[Tensor]:
            return [model.logprob(completion, row) for row in rows[number]]

        own = scores(policy)
        with torch.no_grad():
            scored = Scored(
                completion,
                rows[number],
                policy=own,
                behavior=[x.detach() for x in own] if behavior is None else scores(behavior),
                reference=scores(reference) if objective.beta else [],
                advantages=(
                    gae(completion, rows[number], critic, advantages[number], objective)
                    if objective.advantage == "gae"
                    else [advantages[number]] * len(own)
                ),
            )
        value = surrogate(scored, objective)
        if objective.beta:
            value = value - objective.beta * kl(scored, objective)
        if objective.entropy_coef:
            for row in rows[number]:
                if row.is_reveal:
                    part = row.importance * row.weight * policy.entropy(completion, row)
                    value = value + objective.entropy_coef * part
        total = total - batch.coefficient(number) * factor * value
        if objective.nll_coef and number in batch.nll_shares():
            likelihood = sum(row.importance * row.weight * x for row, x in zip(rows[number], own, strict=True))
            total = total - objective.nll_coef * factor * batch.nll_shares()[number] * likelihood
    return total
