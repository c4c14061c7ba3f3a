"""One process or many: ranks, collectives and backward passes behind the few calls a loop needs.

The only file that knows accelerate and torch.distributed. All sums are float64: counts of tokens stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Item = TypeVar("Item")


class Distributed:
    """The processes of a run."""

    def __init__(self, *, bf16: bool = False) -> None:
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if bf16 else "no",
            # The loops step the scheduler once per optimizer step; accelerate would step it once per process.
            step_scheduler_with_optimizer=False,
            # The buffers are constants, and ranks score without gradients different numbers of packs: a broadcast in
            # each forward pass would wait for a rank that has none.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def prepare(
        self, module: nn.Module, optimizer: Optimizer, scheduler: LRScheduler
    ) -> tuple[nn.Module, Optimizer, LRScheduler]:
        """Wrap a module and its optimizer for this set of processes."""
        return self.accelerator.prepare(module, optimizer, scheduler)

    def unwrap(self, module: nn.Module) -> Any:
        return self.accelerator.unwrap_model(module)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's contiguous part of a list all ranks hold; parts differ by at most one item."""
        start, end = (len(items) * (self.rank + i) // self.world_size for i in (0, 1))
        return items[start:end]

    def sum(self, *values: float) -> list[float]:
        """Each number summed over ranks."""
        return self._reduce(values, "sum").tolist()

    def max(self, value: float) -> float:
        return float(self._each(value).max())

    def min(self, value: float) -> float:
        return float(self._each(value).min())

    def gather(self, items: list[Item]) -> list[Item]:
        """The lists of all ranks, one after another, on every rank."""
        return gather_object(items)

    def from_main(self, item: Item) -> Item:
        """The main rank's object, on every rank."""
        return broadcast_object_list([item])[0]

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def accumulation(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Gradients are exchanged between ranks in the last micro-batch of a step only."""
        return nullcontext() if is_last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradient. Ranks' gradients are summed, not averaged: losses carry the global denominator."""
        self.accelerator.backward(loss * self.world_size)

    def clip_grad_norm(self, module: nn.Module, max_norm: float) -> float:
        """Global gradient norm before clipping to `max_norm` (0: only measured)."""
        norm = self.accelerator.clip_grad_norm_(module.parameters(), max_norm or float("inf"))
        return float(norm) if norm is not None else 0.0

    def save_state(self, directory: Path) -> None:
        """Weights, optimizer, scheduler and every rank's RNG, in the form of the backend in use."""
        self.accelerator.save_state(str(directory), safe_serialization=True)

    def load_state(self, directory: Path) -> None:
        self.accelerator.load_state(str(directory))

    def close(self) -> None:
        self.accelerator.end_training()

    def _each(self, value: float) -> Tensor:
        return self.accelerator.gather(torch.tensor([value], dtype=torch.float64, device=self.device))

    def _reduce(self, values: Sequence[float], how: str) -> Tensor:
        return self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), reduction=how)
