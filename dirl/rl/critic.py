"""A value for each action -> its advantage, by GAE over denoising steps, and the clipped loss that trains the values.

The critic is the policy's model with a scalar head in place of lm_head, read at the action's own position in the packed
views. That position is masked there: the value of an action never depends on the token it revealed, so it is a baseline
that leaves the gradient unbiased (for gae_lambda = 1; below it trades bias for variance).

Steps t = 1, 2, ... of a completion are its views in the order of decoding: block, then step. With r_i the outcome on
the actions of the last step and 0 before, and stars for means over the reveals of a step,

    step t       R*_t = r*_t + gamma R*_{t+1}    A*_t = (r*_t - V*_t) + gamma V*_{t+1} + gamma lambda A*_{t+1}
    its action i  R_i = r_i  + gamma R*_{t+1}     A_i = (r_i - V_i)   + gamma V*_{t+1} + gamma lambda A*_{t+1}

A hold has the value V*_t of its view, and so A*_t.

Shapes: T actions, S steps of all completions together, N completions, D hidden.
Source: TraceRL (arXiv 2509.06949), section 4.2; the clipped loss: PPO as in TRL.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dirl.config import Config, bounded
from dirl.diffusion.packing import PackedViews
from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.flex_attention import AttentionName
from dirl.model.logprobs import hidden_at_actions
from dirl.rl.actions import PolicyBatch, scores_of
from dirl.training.distributed import Distributed
from dirl.training.optimizer import Learner, Loss, OptimizerConfig, StepOutcome, check_schedule


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Config):
    """The value model of objective.advantage=gae, and how it is trained; other keys are the policy's."""

    # copy: a model of its own; shared: with LoRA, the policy's frozen weights and adapters of its own
    backbone: Literal["copy", "shared"] = "copy"
    learning_rate: float = bounded(5e-6, least=0)
    lr_scheduler_type: str = "cosine"
    warmup_steps: int = bounded(0, least=0)
    weight_decay: float = bounded(0.0, least=0)  # on matrices only, not on norms
    max_grad_norm: float = bounded(1.0, least=0)  # 0: no clipping
    clip_range: float = bounded(0.2, least=0)  # how far a value moves from that before the update; 0: any distance
    critic_only_steps: int = bounded(0, least=0)  # first optimizer steps, in which the policy does not move

    def check(self) -> None:
        check_schedule(self.lr_scheduler_type)

    def optimizer(self, policy: OptimizerConfig) -> OptimizerConfig:
        """The policy's settings with the critic's in their place."""
        return replace(
            policy,
            learning_rate=self.learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            lr_scheduler_kwargs={},  # those of the policy's schedule
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )


class _ValueHead(nn.Linear):
    """One float32 number a position, whatever the weights' precision and autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(input.float(), self.weight.float(), self.bias.float()).squeeze(1)


class ValueModel(nn.Module):
    """A backbone whose head gives the actions of a pack their values; before training all are 0.

    Args:
        budget: the most packed tokens there will be; padding does not go beyond it. 0: not known.
    """

    def __init__(self, backbone: nn.Module, hidden_size: int, attention: AttentionName = "auto", budget: int = 0):
        super().__init__()
        self.backbone, self.attention, self.budget = backbone, attention, budget
        self.head = _ValueHead(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, packed: PackedViews) -> Tensor:
        """Values (T,) of the pack's actions, float32."""
        return self.head(hidden_at_actions(self.backbone, packed, self.attention, self.budget))


def value_model_of(
    policy: BlockDiffusionModel,
    config: CriticConfig,
    distributed: Distributed,
    *,
    attention: AttentionName = "auto",
    budget: int = 0,
) -> ValueModel:
    """A critic that begins as the policy is, before it is sharded, and trains what it trains: weights, or adapters.

    Raises:
        UserError: a backbone cannot be shared where its weights are sharded.
    """
    shared: dict[int, object] = {}
    if config.backbone == "shared":
        if distributed.is_sharded:
            raise UserError(
                f"critic.backbone=shared cannot share weights that {distributed.backend} shards; use "
                "critic.backbone=copy, or launch with ddp, zero1 or zero2"
            )
        shared = {id(parameter): parameter for parameter in policy.parameters() if not parameter.requires_grad}
    backbone = copy.deepcopy(policy.model, shared)
    return ValueModel(backbone, policy.config.hidden_size, attention, budget)


class Critic:
    """A value model that learns beside the policy."""

    def __init__(self, learner: Learner, config: CriticConfig, *, gamma: float, lam: float) -> None:
        self.learner, self.config, self.gamma, self.lam = learner, config, gamma, lam

    def is_alone(self, step: int) -> bool:
        """Whether in this optimizer step, counted from 0 over the run, the policy does not move."""
        return step < self.config.critic_only_steps

    def judge(self, batches: Sequence[PolicyBatch], filler: PackedViews) -> list[PolicyBatch]:
        """The tables of a minibatch with values, returns, and advantages in place of each completion's outcome.

        One pass without gradient, to be made before the first update.

        Args:
            filler: a pack for the passes that only keep other ranks company.
        """
        packs = [batch.packed for batch in batches]
        values = scores_of(packs, self.learner.module, filler, self.learner.distributed)
        return with_gae(batches, values, gamma=self.gamma, lam=self.lam)

    def update(self, batches: Sequence[PolicyBatch], filler: PackedViews) -> StepOutcome:
        """One optimizer step towards the returns."""
        losses = [partial(self._loss, batch) for batch in batches]
        return self.learner.update(losses, lambda: self._loss(PolicyBatch.blank(filler)).nothing())

    def _loss(self, batch: PolicyBatch) -> Loss:
        return value_loss(self.learner.module(batch.packed), batch, self.config.clip_range)


def with_gae(
    batches: Sequence[PolicyBatch], values: Sequence[Tensor], *, gamma: float, lam: float
) -> list[PolicyBatch]:
    """The tables with what GAE makes of values and of the outcomes that stand in `advantage_T`; float32.

    A completion may lie in several of them, cut between blocks. The recursion runs on the host.

    Args:
        values: (T,) float32 for each table.
    """
    if not batches:
        return []
    keys_T3 = torch.cat([_order(batch) for batch in batches]).cpu()
    is_reveal_T, outcome_T, value_T = (
        torch.cat(columns).cpu()
        for columns in (
            [batch.packed.actions.is_reveal_T for batch in batches],
            [batch.advantage_T for batch in batches],
            list(values),
        )
    )
    estimate = gae_over_steps(keys_T3, is_reveal_T, value_T, outcome_T, gamma=gamma, lam=lam)
    lengths = [len(value) for value in values]
    columns = [column_T.float().to(batches[0].advantage_T.device).split(lengths) for column_T in estimate]
    return [
        replace(batch, value_T=value, return_T=return_, advantage_T=advantage)
        for batch, value, return_, advantage in zip(batches, *columns, strict=True)
    ]


def _order(batch: PolicyBatch) -> Tensor:
    """Completion, block and view of each action (T, 3): equal in a step, ascending from step to step."""
    return torch.stack([batch.completion_T, batch.packed.actions.block_T, batch.packed.actions.view_T], dim=1)


class Estimate(NamedTuple):
    """What GAE gives each action; float64."""

    value_T: Tensor  # a hold's is that of its step
    return_T: Tensor
    advantage_T: Tensor


def gae_over_steps(
    keys_T3: Tensor, is_reveal_T: Tensor, value_T: Tensor, outcome_T: Tensor, *, gamma: float, lam: float
) -> Estimate:
    """Generalised advantage estimation over the denoising steps of completions; see the head of this module.

    Args:
        keys_T3: int64, completion, and two numbers that order its steps; in any order of rows.
        outcome_T: the outcome of each action's completion, at all of its actions.
    Source: GAE (arXiv 1506.02438); TraceRL (arXiv 2509.06949).
    """
    keys_S3, step_T = torch.unique(keys_T3, dim=0, return_inverse=True)  # sorted: completion, then time
    completion_S = keys_S3[:, 0]
    is_last_S = torch.ones_like(completion_S, dtype=torch.bool)
    is_last_S[:-1] = completion_S[1:] != completion_S[:-1]
    value_T, outcome_T = value_T.double(), outcome_T.double()

    def mean_of(column_T: Tensor) -> Tensor:
        sum_S = torch.zeros(len(is_last_S), dtype=torch.float64).index_add(0, step_T, column_T * is_reveal_T)
        count_S = torch.zeros_like(sum_S).index_add(0, step_T, is_reveal_T.double())
        return sum_S / count_S.clamp(min=1)

    def after(column_S: Tensor) -> Tensor:
        """At each action, what the step after its own has; 0 after the last."""
        return column_S.roll(-1).masked_fill(is_last_S, 0.0)[step_T]

    reward_T = outcome_T * is_last_S[step_T]
    reward_S, value_S = mean_of(reward_T), mean_of(value_T)
    delta_S = reward_S - value_S + gamma * value_S.roll(-1).masked_fill(is_last_S, 0.0)
    return_S = _discounted(reward_S, completion_S, gamma)
    advantage_S = _discounted(delta_S, completion_S, gamma * lam)
    value_T = torch.where(is_reveal_T, value_T, value_S[step_T])
    ahead_T = gamma * after(value_S) + gamma * lam * after(advantage_S)
    return Estimate(value_T, reward_T + gamma * after(return_S), reward_T - value_T + ahead_T)


def _discounted(column_S: Tensor, completion_S: Tensor, factor: float) -> Tensor:
    """y_t = x_t + factor y_{t+1} over the steps of each completion, which are consecutive and ascending in time."""
    completions, number_S = torch.unique_consecutive(completion_S, return_inverse=True)
    first_N = torch.searchsorted(number_S, torch.arange(len(completions)))
    time_S = torch.arange(len(column_S)) - first_N[number_S]
    most = int(time_S.max()) + 1 if len(time_S) else 0
    sum_TN = torch.zeros(most, len(completions), dtype=column_S.dtype)
    sum_TN[time_S, number_S] = column_S
    for time in range(most - 2, -1, -1):
        sum_TN[time] += factor * sum_TN[time + 1]
    return sum_TN[time_S, number_S]


def value_loss(value_T: Tensor, batch: PolicyBatch, clip_range: float) -> Loss:
    """Half the squared error of the reveals, weighed as the policy's; clipped, it is the larger of two.

        0.5 max((V - R)^2, (clip(V, V_old - clip_range, V_old + clip_range) - R)^2)

    What the metrics need is of the values before the update: after it they know these returns.
    """
    is_reveal_T = batch.packed.actions.is_reveal_T
    error_T = (value_T - batch.return_T).square()
    worst_T = error_T
    if clip_range > 0:
        near_T = value_T.clamp(batch.value_T - clip_range, batch.value_T + clip_range)  # within it the very same number
        worst_T = torch.maximum(error_T, (near_T - batch.return_T).square())

    def total(column_T: Tensor) -> Tensor:
        return (column_T.double() * is_reveal_T).sum()

    residual_T = (batch.return_T - batch.value_T).double()
    sums = {
        "reveals": is_reveal_T.sum(),
        "clipped": total(worst_T.detach() > error_T.detach()),
        "value": total(batch.value_T),
        "return": total(batch.return_T),
        "return_squared": total(batch.return_T.double().square()),
        "residual": total(residual_T),
        "residual_squared": total(residual_T.square()),
    }
    value = 0.5 * (batch.coefficient_T * is_reveal_T * worst_T).sum()
    return Loss(value, len(batch.packed), sums)


def critic_metrics(steps: Sequence[StepOutcome]) -> dict[str, float]:
    """Means over the critic's optimizer steps on a batch of rollouts, and over the reveals of all ranks."""
    moved = [step for step in steps if step.sums]  # with fewer groups than steps some have none
    total = {name: sum(step.sums[name] for step in moved) for name in (moved[0].sums if moved else ())}
    reveals = max(total.get("reveals", 0.0), 1.0)
    mean = {name: total.get(name, 0.0) / reveals for name in ("value", "return", "return_squared")}
    spread = mean["return_squared"] - mean["return"] ** 2
    left = total.get("residual_squared", 0.0) / reveals - (total.get("residual", 0.0) / reveals) ** 2
    return {
        "critic/loss": sum(step.metrics["loss"] for step in steps) / len(steps),
        "critic/explained_variance": 1.0 - left / spread if spread > 1e-12 else 0.0,
        "critic/value_mean": mean["value"],
        "critic/clip_fraction": total.get("clipped", 0.0) / reveals,
        "critic/grad_norm": sum(step.metrics["grad_norm"] for step in steps) / len(steps),
        "critic/learning_rate": steps[-1].metrics["learning_rate"],
    }
