"""Losses of micro-batches -> one optimizer step over the global batch."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from dirl.config import Config, bounded
from dirl.errors import UserError, one_line
from dirl.training.distributed import Distributed


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """AdamW and its schedule, under the names of transformers."""

    max_steps: int = bounded(-1, least=-1)  # optimizer steps; -1: as num_train_epochs says, or 100 without it
    num_train_epochs: float = bounded(0.0, least=0)  # in place of max_steps: passes over the data; see docs/data.md
    learning_rate: float = bounded(1e-5, least=0)
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit"] = "adamw_torch"  # 8 bit: needs bitsandbytes
    offload_optimizer: bool = False  # keep optimizer states in main memory; DeepSpeed ZeRO only
    lr_scheduler_type: str = "cosine"
    lr_scheduler_kwargs: dict[str, float] = field(default_factory=dict)  # such as min_lr_rate for cosine_with_min_lr
    warmup_steps: int = bounded(0, least=0)
    weight_decay: float = bounded(0.0, least=0)  # on matrices only, not on norms
    adam_beta1: float = bounded(0.9, least=0, below=1)
    adam_beta2: float = bounded(0.999, least=0, below=1)
    adam_epsilon: float = bounded(1e-8, least=0)
    max_grad_norm: float = bounded(1.0, least=0)  # 0: no clipping
    bf16: bool = False  # autocast the forward pass to bfloat16; logits and losses stay float32
    # packed tokens (clean + views) of one forward pass: the memory knob
    max_tokens_per_micro_batch: int = bounded(8192, least=1)

    def check(self) -> None:
        if self.max_steps == 0:
            raise UserError("max_steps must be at least 1, got 0")
        if self.max_steps > 0 and self.num_train_epochs > 0:
            raise UserError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs:g} are both given; keep one "
                "(max_steps=-1 is none)"
            )
        if self.max_steps < 0 and not self.num_train_epochs:
            object.__setattr__(self, "max_steps", 100)
        check_schedule(self.lr_scheduler_type, self.lr_scheduler_kwargs)


def check_schedule(name: str, arguments: Mapping[str, float] = MappingProxyType({})) -> None:
    """Whether transformers has such a schedule that is a function of the step, and with these arguments.

    Raises:
        UserError: it has not.
    """
    # One waits for a loss that stops falling, the other looks for it itself.
    names = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
    if name not in names:
        raise UserError(f"lr_scheduler_type must be one of {', '.join(names)}, got {name!r}")
    parameter = nn.Parameter(torch.zeros(1))
    try:
        build_schedule(torch.optim.SGD([parameter], lr=1.0), name, arguments, warmup_steps=1, max_steps=2)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"lr_scheduler_kwargs={dict(arguments)} do not suit lr_scheduler_type={name}: {one_line(error)}"
        ) from error


def build_schedule(
    optimizer: torch.optim.Optimizer, name: str, arguments: Mapping[str, float], *, warmup_steps: int, max_steps: int
) -> LambdaLR:
    """The learning rate of each step, as a schedule of transformers gives it."""
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup_steps,
        num_training_steps=max_steps,
        scheduler_specific_kwargs=dict(arguments) or None,
    )


# Bytes of AdamW's two moments per trained parameter.
OPTIMIZER_BYTES: Mapping[str, float] = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "adamw_bnb_8bit": 2.0}


class TrainingDiverged(UserError):
    """Three optimizer steps in a row had no finite gradient."""


@dataclass(frozen=True)
class Loss:
    """What one micro-batch adds to an optimizer step. Everything stays on the device until the step ends."""

    value: Tensor  # scalar with gradient, already divided by the global denominator
    num_tokens: int  # packed tokens, for who shows progress
    sums: Mapping[str, Tensor] = field(default_factory=dict)  # scalars that metrics are made of, added over all ranks
    largest: Mapping[str, Tensor] = field(default_factory=dict)  # scalars of which the largest counts
    samples: Mapping[str, Tensor] = field(default_factory=dict)  # one dimension, of which quantiles are taken

    def nothing(self) -> Loss:
        """The same without weight: zero, with a gradient of zero for every parameter."""
        return Loss(
            self.value * 0.0,
            0,
            {name: torch.zeros_like(value) for name, value in self.sums.items()},
            {name: torch.full_like(value, -math.inf) for name, value in self.largest.items()},
            {name: value[:0] for name, value in self.samples.items()},
        )


@dataclass(frozen=True)
class StepOutcome:
    """One optimizer step, over all ranks."""

    metrics: dict[str, float]  # loss, grad_norm, learning_rate, skipped_steps
    sums: dict[str, float]
    largest: dict[str, float]
    samples: Mapping[str, Tensor] = field(default_factory=dict)  # of this rank alone, on the device


class _Totals:
    """Losses added up, on the device."""

    def __init__(self) -> None:
        self.names: tuple[list[str], list[str]] = ([], [])
        self._added: Tensor | None = None
        self._largest: Tensor | None = None
        self._samples: list[Mapping[str, Tensor]] = []

    def add(self, loss: Loss) -> None:
        added = torch.stack([value.detach().double() for value in (loss.value, *loss.sums.values())])
        self._added = added if self._added is None else self._added + added
        if loss.largest:
            largest = torch.stack([value.detach().double() for value in loss.largest.values()])
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)
        self._samples.append(loss.samples)
        self.names = (["loss", *loss.sums], list(loss.largest))

    @property
    def samples(self) -> dict[str, Tensor]:
        return {name: torch.cat([of_loss[name] for of_loss in self._samples]) for name in self._samples[0]}

    def numbers(self) -> Tensor:
        """All of them in one row, float64."""
        assert self._added is not None
        return self._added if self._largest is None else torch.cat([self._added, self._largest])

    def over_ranks(self, rows: Sequence[Sequence[float]]) -> tuple[dict[str, float], dict[str, float]]:
        """What the rows of all ranks come to."""
        added, largest = self.names
        columns = list(zip(*rows, strict=True))
        sums = {name: math.fsum(column) for name, column in zip(added, columns, strict=False)}
        return sums, {name: max(column) for name, column in zip(largest, columns[len(added) :], strict=True)}


def _never(*_: object) -> None:
    """Nobody looks on."""


class Learner:
    """A module with its optimizer and schedule; one `update` is one optimizer step.

    Args:
        on_micro_batch: told how many micro-batches of a step are done, of how many, and the tokens of the last one.
        on_skip: called on every rank when a step was skipped.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        distributed: Distributed,
        *,
        on_micro_batch: Callable[[int, int, int], None] = _never,
        on_skip: Callable[[], None] = _never,
    ) -> None:
        optimizer = build_optimizer(module, config)
        schedule = build_schedule(
            optimizer,
            config.lr_scheduler_type,
            config.lr_scheduler_kwargs,
            warmup_steps=config.warmup_steps,
            max_steps=config.max_steps,
        )
        self._schedule = schedule
        self._started_from = digest_of_start(module)
        self._settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
        self.config, self.distributed = config, distributed
        self._plain_optimizer = optimizer  # the schedule's; prepared ones share its groups
        self.module, self.optimizer, self.scheduler = distributed.prepare(
            module,
            optimizer,
            schedule,
            max_grad_norm=config.max_grad_norm,
            offload_optimizer=config.offload_optimizer,
        )
        self._on_micro_batch, self._on_skip = on_micro_batch, on_skip
        self._skipped_in_a_row = 0

    def update(self, losses: Sequence[Callable[[], Loss]], empty_loss: Callable[[], Loss]) -> StepOutcome:
        """One optimizer step on the sum of all ranks' losses. The host waits for the device once, at its end.

        Args:
            losses: each computes one micro-batch's loss, already divided by the global denominator. Called one after
                another, so that only one graph is alive.
            empty_loss: a zero that touches every parameter, for ranks with fewer micro-batches than others: every
                rank must take part in every collective.
        Returns:
            `skipped_steps` is 1 where a loss or gradient was not finite on any rank. Without losses on any rank nothing
            but the schedule moves.
        Raises:
            TrainingDiverged: no finite gradient three times in a row; such steps change nothing.
        """
        learning_rate = float(self.scheduler.get_last_lr()[0])
        num_micro_batches = int(self.distributed.max(len(losses)))
        if num_micro_batches == 0:
            self._advance_schedule()
            nothing = {"loss": 0.0, "grad_norm": 0.0, "learning_rate": learning_rate, "skipped_steps": 0.0}
            return StepOutcome(nothing, {}, {})
        padded = [*losses, *[empty_loss] * (num_micro_batches - len(losses))]
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)  # what an interrupted step (Ctrl-C in a notebook) left
        totals = _Totals()
        self._on_micro_batch(0, num_micro_batches, 0)
        for index, compute_loss in enumerate(padded):
            accumulation = self.distributed.accumulation(self.module, is_last=index == len(padded) - 1)
            with accumulation, torch.enable_grad():  # whatever a reward function left behind
                loss = compute_loss()
                # A loss that is not finite spoils the whole gradient, so that every backend and rank skips the step.
                spoil = torch.where(loss.value.detach().isfinite(), 1.0, math.nan)
                self.distributed.backward(self.module, loss.value * spoil)
            totals.add(loss)
            self._on_micro_batch(index + 1, num_micro_batches, loss.num_tokens)
        grad_norm, is_applied, rows = self.distributed.step(
            self.module, self.optimizer, self.config.max_grad_norm, totals.numbers()
        )
        self._count_skipped(is_applied)
        self._advance_schedule()
        sums, largest = totals.over_ranks(rows)
        metrics = {
            "loss": sums.pop("loss"),
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_steps": float(not is_applied),
        }
        return StepOutcome(metrics, sums, largest, totals.samples)

    def state_dict(self) -> dict[str, Any]:
        """What is neither weights nor optimizer: the schedule, and the steps skipped in a row."""
        return {"schedule": self.scheduler.state_dict(), "skipped_in_a_row": self._skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The place in the schedule; the schedule itself, like all the optimizer is told, is this run's."""
        self._skipped_in_a_row = state["skipped_in_a_row"]
        self._schedule.load_state_dict({**state["schedule"], "base_lrs": self._schedule.base_lrs})
        factors = [factor(self._schedule.last_epoch) for factor in self._schedule.lr_lambdas]
        rates = [base * factor for base, factor in zip(self._schedule.base_lrs, factors, strict=True)]
        self._schedule._last_lr = rates
        for group, settings, rate in zip(self._plain_optimizer.param_groups, self._settings, rates, strict=True):
            group.update(settings, lr=rate)

    def identity(self) -> dict[str, Any]:
        """What weights and optimizer states in a checkpoint belong to."""
        named = self.distributed.unwrap(self.module).named_parameters()
        shapes = {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named}
        listed = json.dumps(sorted(shapes.items()))
        num_parameters = sum(math.prod(shape) for shape in shapes.values())
        trained = sum(p.requires_grad for p in self.module.parameters())
        return {
            "num_parameters": num_parameters,
            "num_trained_tensors": trained,
            "parameters_digest": hashlib.sha256(listed.encode()).hexdigest()[:16],
            "started_from": self._started_from,
        }

    def _advance_schedule(self) -> None:
        with warnings.catch_warnings():
            # A skipped step looks to the schedule like a forgotten one.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def _count_skipped(self, is_applied: bool) -> None:
        self._skipped_in_a_row = 0 if is_applied else self._skipped_in_a_row + 1
        if not is_applied:
            self._on_skip()
        if self._skipped_in_a_row == 3:
            raise TrainingDiverged(
                "loss or gradient was not finite in three steps in a row; lower learning_rate or look at the data"
            )


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW as `optim` names it.

    Raises:
        UserError: it is not installed.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    groups = list(parameter_groups(module, config.weight_decay))
    if config.optim != "adamw_bnb_8bit":
        return torch.optim.AdamW(groups, fused=config.optim == "adamw_torch_fused", **settings)
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("optim=adamw_bnb_8bit needs the bitsandbytes package: pip install bitsandbytes") from error
    return bitsandbytes.optim.AdamW8bit(groups, **settings)


def digest_of_start(module: nn.Module) -> str:
    """Some values of each parameter, evenly spaced: other weights of the same shapes have another digest."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        digest.update(name.encode())
        digest.update(values[:: max(values.numel() // 1024, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def parameter_groups(module: nn.Module, weight_decay: float) -> Iterable[dict[str, object]]:
    """Matrices are decayed, vectors (norms) are not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
