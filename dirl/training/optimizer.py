"""Losses of micro-batches -> one optimizer step over the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import SchedulerType, get_scheduler

from dirl.training.distributed import Distributed


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its schedule, under the names of transformers."""

    max_steps: int = 100  # optimizer steps
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, float] = field(default_factory=dict)  # such as min_lr_rate for cosine_with_min_lr
    warmup_steps: int = 0
    weight_decay: float = 0.0  # on matrices only, not on norms
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    bf16: bool = False  # autocast the forward pass to bfloat16; logits and losses stay float32
    max_tokens_per_micro_batch: int = 8192  # packed tokens (clean + views) of one forward pass: the memory knob

    def __post_init__(self) -> None:
        for key, least in (("max_steps", 1), ("warmup_steps", 0), ("max_tokens_per_micro_batch", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, got {getattr(self, key)}")
        for key in ("learning_rate", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"{key} must be a finite number >= 0, got {getattr(self, key)}")
        schedules = [kind.value for kind in SchedulerType]
        if self.lr_scheduler_type not in schedules:
            raise ValueError(f"lr_scheduler_type must be one of {', '.join(schedules)}, got {self.lr_scheduler_type!r}")


class TrainingDiverged(RuntimeError):
    """Three optimizer steps in a row had no finite gradient."""


class Learner:
    """A module with its optimizer and schedule; one `update` is one optimizer step."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, distributed: Distributed) -> None:
        optimizer = torch.optim.AdamW(
            parameter_groups(module, config.weight_decay),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=config.max_steps,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs) or None,
        )
        self.config, self.distributed = config, distributed
        self.module, self.optimizer, self.scheduler = distributed.prepare(module, optimizer, scheduler)
        self.on_micro_batch: Callable[[int, int], None] = lambda done, total: None  # for who shows progress
        self._skipped_in_a_row = 0

    def update(self, losses: Sequence[Callable[[], Tensor]], empty_loss: Callable[[], Tensor]) -> dict[str, float]:
        """One optimizer step on the sum of all ranks' losses.

        Args:
            losses: each computes one micro-batch's loss, already divided by the global denominator. Called one after
                another, so that only one graph is alive.
            empty_loss: a zero that touches every parameter, for ranks with fewer micro-batches than others: every
                rank must take part in every collective.
        Returns:
            `loss`, `grad_norm` and `learning_rate` of the step.
        Raises:
            TrainingDiverged: no finite gradient three times in a row; such steps change nothing.
        """
        num_micro_batches = int(self.distributed.max(max(len(losses), 1)))
        padded = [*losses, *[empty_loss] * (num_micro_batches - len(losses))]
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)  # what an interrupted step (Ctrl-C in a notebook) left
        total = 0.0
        self.on_micro_batch(0, num_micro_batches)
        for index, compute_loss in enumerate(padded):
            with self.distributed.accumulation(self.module, is_last=index == len(padded) - 1):
                loss = compute_loss()
                self.distributed.backward(loss)
                total += float(loss.detach())
            self.on_micro_batch(index + 1, num_micro_batches)
        learning_rate = self.scheduler.get_last_lr()[0]
        grad_norm = self.distributed.clip_grad_norm(self.module, self.config.max_grad_norm)
        (loss_sum,) = self.distributed.sum(total)
        is_finite = self.distributed.min(float(math.isfinite(grad_norm) and math.isfinite(loss_sum))) > 0
        if is_finite:
            self.optimizer.step()
        self._count_skipped(is_finite)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "loss": loss_sum,
            "grad_norm": grad_norm,
            "learning_rate": float(learning_rate),
            "skipped_steps": float(not is_finite),
        }

    def _count_skipped(self, is_finite: bool) -> None:
        self._skipped_in_a_row = 0 if is_finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == 3:
            raise TrainingDiverged(
                "loss or gradient was not finite in three steps in a row; lower learning_rate or look at the data"
            )


def parameter_groups(module: nn.Module, weight_decay: float) -> Iterable[dict[str, object]]:
    """Matrices are decayed, vectors (norms) are not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def split_by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of items in as few bins of at most `budget` tokens as first-fit decreasing finds.

    Raises:
        ValueError: an item is longer than the budget.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > budget:
            raise ValueError(
                f"a document takes {length} packed tokens, max_tokens_per_micro_batch is {budget}; raise it, or "
                "shorten documents (data.max_length, rollout.max_completion_length)"
            )
        place = next((i for i, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([])
            room.append(budget)
            place = -1
        bins[place].append(index)
        room[place] -= length
    return bins
