"""One process or many: ranks, collectives, and one optimizer step under DDP, DeepSpeed ZeRO-1/2/3 and FSDP2.

The only file that knows accelerate and torch.distributed; which engine shards what is the launch's choice
(configs/accelerate/). All sums are float64: counts of tokens stay exact.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as load_shards
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dirl.errors import UserError

Item = TypeVar("Item")

_NO_PATIENCE_LIMIT = timedelta(days=7)  # a run that is told not to watch the clock


class Distributed:
    """The processes of a run.

    Args:
        bf16: autocast forward passes to bfloat16. Weights and optimizer keep their dtype.
        timeout_seconds: how long a rank waits for the others in a collective; 0: without limit.
    """

    def __init__(self, *, bf16: bool = False, timeout_seconds: float = 0) -> None:
        self._uses_deepspeed = _is_set("ACCELERATE_USE_DEEPSPEED")
        self._bf16 = bf16
        has_cuda = torch.cuda.is_available()
        timeout = timedelta(seconds=timeout_seconds) if timeout_seconds else _NO_PATIENCE_LIMIT
        process_group: dict[str, Any] = {"timeout": timeout}
        # accelerate turns every configuration into DDP where it is told `cpu`.
        is_plain = not (self._uses_deepspeed or _is_set("ACCELERATE_USE_FSDP"))
        if not has_cuda and not is_plain:
            _prepare_for_cpu(process_group)
        self.accelerator = Accelerator(
            cpu=is_plain and not has_cuda,
            # Elsewhere autocast is ours: accelerate's precision is the whole process's, and set once.
            mixed_precision="bf16" if bf16 and _is_set("ACCELERATE_USE_FSDP") else "no",
            # The loops step the scheduler once per optimizer step; accelerate would step it once per process.
            step_scheduler_with_optimizer=False,
            # The buffers are constants, and ranks score without gradients different numbers of packs: a broadcast in
            # each forward pass would wait for a rank that has none.
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(**process_group),
            ],
        )
        self._check_topology()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # accelerate would round what forward passes return, logprobs and values, to bfloat16.
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

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

    @property
    def backend(self) -> str:
        """What shards what: plain, ddp, zero1, zero2, zero3 or fsdp2."""
        kind = self.accelerator.distributed_type
        if kind == DistributedType.DEEPSPEED:
            return f"zero{self.accelerator.deepspeed_plugin.zero_stage}"
        if kind == DistributedType.FSDP:
            return "fsdp2"
        return "ddp" if self.world_size > 1 else "plain"

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass gathers weights from other ranks: every rank must then run as many as the others."""
        return self.backend in ("zero3", "fsdp2")

    def prepare(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        *,
        max_grad_norm: float = 0.0,
        offload_optimizer: bool = False,
    ) -> tuple[nn.Module, Optimizer, LRScheduler]:
        """Wrap a module and its optimizer for this set of processes; checkpoints number modules as they are prepared.

        Raises:
            UserError: the backend cannot keep optimizer states in main memory, or train weights of this precision.
        """
        if not self._uses_deepspeed:
            self._check_precision(module, offload_optimizer)
        if self.backend == "fsdp2":
            # The layers of the model inside, whatever their class is called.
            inner = next((m for m in module.modules() if getattr(m, "_no_split_modules", None)), None)
            names = sorted(inner._no_split_modules) if inner is not None else []  # type: ignore[arg-type]
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = names
        else:
            module = self.placed(module)
        # The schedule is the loop's: accelerate would tie it to its own idea of a step.
        with self._deepspeed_settings(module, max_grad_norm, offload_optimizer):
            wrapped, wrapped_optimizer = self.accelerator.prepare(module, optimizer)
        if self.backend == "ddp":  # checkpoints name parameters as one process does, whatever their number
            self.accelerator._models[-1] = module
        return wrapped, wrapped_optimizer, scheduler

    def placed(self, module: nn.Module) -> nn.Module:
        """A module on this device, its forward pass in the precision of this run."""
        if self._bf16:
            module.forward = torch.autocast(self.device.type, torch.bfloat16)(module.forward)  # type: ignore[method-assign]
        return module.to(self.device)

    def unwrap(self, module: nn.Module) -> Any:
        return self.accelerator.unwrap_model(module)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This rank's contiguous share of a list that all ranks have; shares differ by at most one item."""
        start, end = (len(items) * (self.rank + i) // self.world_size for i in (0, 1))
        return items[start:end]

    def sum(self, *values: float) -> list[float]:
        """Each number summed over ranks."""
        return self.summed(torch.tensor(values, dtype=torch.float64)).tolist()

    def summed(self, values_N: Tensor) -> Tensor:
        """A tensor of the host summed over ranks, where it then is the same to the last bit; float64."""
        if self.world_size == 1:  # nobody to ask, and no device to wait for
            return values_N.double()
        return self.accelerator.reduce(values_N.to(self.device, torch.float64), reduction="sum").cpu()

    def max(self, value: float) -> float:
        return max(self._of_each(value))

    def min(self, value: float) -> float:
        return min(self._of_each(value))

    def gather(self, items: list[Item]) -> list[Item]:
        """The lists of all ranks, one after another, on every rank."""
        return gather_object(items)

    def from_main(self, item: Item) -> Item:
        """The main rank's object, on every rank."""
        return from_main(item)

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def evened(self, items: Sequence[Item], filler: Item) -> list[Item]:
        """The items, filled up to the number that the rank with most has, where forward passes are collective."""
        if not self.is_sharded:
            return list(items)
        return [*items, *[filler] * (int(self.max(len(items))) - len(items))]

    def accumulation(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """What a micro-batch's forward and backward stand in: the optimizer's step comes after the last one only."""
        if self._uses_deepspeed:
            # Otherwise each backward counts as a whole batch: the engine would step on every micro-batch.
            module.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
            return nullcontext()
        # FSDP2 reduces every micro-batch: without it, whole gradients would pile up on each rank.
        return nullcontext() if is_last or self.is_sharded else self.accelerator.no_sync(module)

    def backward(self, module: nn.Module, loss: Tensor) -> None:
        """Add a loss's gradient. Ranks' gradients are summed, not averaged: losses carry the global denominator."""
        if self._uses_deepspeed:
            engine: Any = module
            engine.backward(loss * self.world_size, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss * self.world_size)

    def step(
        self, module: nn.Module, optimizer: Optimizer, max_grad_norm: float, numbers_N: Tensor
    ) -> tuple[float, bool, list[list[float]]]:
        """Clip to `max_grad_norm` (0: not at all) and take the optimizer's step, unless the gradient is not finite.

        Args:
            numbers_N: float64 on the device, what this rank wants to tell the others and the host.
        Returns:
            The global gradient norm before clipping, whether the step was taken (the same on every rank), and the
            numbers of every rank: one collective, and one wait for the device.
        """
        if self._uses_deepspeed:
            engine: Any = module
            engine.step()  # skips a gradient that is not finite by itself, on all ranks
            norm = torch.tensor(float(engine.get_global_grad_norm()) if engine.was_step_applied() else float("nan"))
        else:
            # Not accelerate's, which compares the parameters of all modules it has prepared, number by number.
            norm = nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm or float("inf"))
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        told = torch.cat([norm.detach().double().reshape(1).to(numbers_N.device), numbers_N])
        rows = self.accelerator.gather(told[None]).tolist()
        is_applied = all(math.isfinite(row[0]) for row in rows)
        if not self._uses_deepspeed:
            if is_applied:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        grad_norm = rows[self.rank][0] if is_applied or not self._uses_deepspeed else float("nan")
        return grad_norm, is_applied, [row[1:] for row in rows]

    def save_state(self, directory: Path) -> None:
        """Weights, optimizer and every rank's RNG, in the form of the backend in use."""
        self.accelerator.save_state(str(directory), safe_serialization=True)

    def load_state(self, directory: Path) -> None:
        self.accelerator.load_state(str(directory))

    def close(self) -> None:
        self.accelerator.end_training()

    @contextmanager
    def _deepspeed_settings(self, module: nn.Module, max_grad_norm: float, offload_optimizer: bool) -> Iterator[None]:
        """What the DeepSpeed file cannot know: it comes from the run's configuration. Each engine has its own copy."""
        if not self._uses_deepspeed:
            yield
            return
        plugin = self.accelerator.deepspeed_plugin
        in_file = plugin.deepspeed_config
        config = plugin.deepspeed_config = plugin.hf_ds_config.config = copy.deepcopy(in_file)
        config["gradient_clipping"] = max_grad_norm
        if offload_optimizer:
            pin_memory = self.device.type == "cuda"
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
        if next(module.parameters()).dtype == torch.bfloat16:
            # float32 master weights in the sharded optimizer, and gradients added up in float32.
            config["bf16"] = {"enabled": True}
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        self.accelerator.deepspeed_engine_wrapped = None  # whose backward we never call; a second one brings a warning
        try:
            yield
        finally:
            plugin.deepspeed_config = plugin.hf_ds_config.config = in_file

    def _check_precision(self, module: nn.Module, offload_optimizer: bool) -> None:
        """Without float32 master weights most steps of a small learning rate round to nothing."""
        if offload_optimizer:
            raise UserError(
                f"offload_optimizer=true needs DeepSpeed, this run is launched as {self.backend}: set "
                "ACCELERATE_CONFIG to zero1, zero2 or zero3"
            )
        trained = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
        if torch.bfloat16 in trained:
            raise UserError(
                f"model.dtype=bfloat16 has no float32 master weights under {self.backend}, and small updates round to "
                "nothing: set ACCELERATE_CONFIG=zero1, zero2 or zero3, or model.dtype=float32 with bf16=true"
            )
        if self.backend == "fsdp2" and len({parameter.dtype for parameter in module.parameters()}) > 1:
            raise UserError("lora under fsdp2 needs one dtype: set model.dtype=float32 with bf16=true, or use zero3")

    def _check_topology(self) -> None:
        """Several launchers silently start one process, or several that do not know each other."""
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        running = self.accelerator.num_processes
        if asked != running:
            raise RuntimeError(f"WORLD_SIZE={asked}, but {running} processes run; use scripts/launch.sh")
        if self._uses_deepspeed and not self.backend.startswith("zero"):
            raise RuntimeError("a DeepSpeed configuration was launched as DDP; unset ACCELERATE_USE_CPU")

    def _of_each(self, value: float) -> list[float]:
        return [float(value)] if self.world_size == 1 else self.accelerator.gather(self._numbers(value)).tolist()

    def _numbers(self, *values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.device)


def first_to_fail() -> str | None:
    """What the message of an error begins with: the rank's name, if it is one of several; None: it is not wanted.

    What ranks meet after the first has failed is that this one is gone. Before they know each other they fail alike:
    then the first of each machine speaks for all.
    """
    if not torch.distributed.is_initialized():
        return "" if os.environ.get("LOCAL_RANK", "0") == "0" else None
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        has_spoken = store.add("dirl/failed ranks", 1) > 1
    except (RuntimeError, ValueError):  # who kept count is gone
        has_spoken = False
    return None if has_spoken else f"rank {torch.distributed.get_rank()}: "


def from_main(item: Item) -> Item:
    """The main rank's object, on every rank of the run that this process is in, if it is in one."""
    return broadcast_object_list([item])[0] if torch.distributed.is_initialized() else item


def read_shards(directory: Path) -> dict[str, Tensor]:
    """The tensors that FSDP2 saved in parts, whole, in any one process."""
    reader = FileSystemReader(directory)
    described = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(of.size, dtype=of.properties.dtype) for name, of in described.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process reads it, as is meant
        load_shards(state, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _prepare_for_cpu(process_group: dict[str, Any]) -> None:
    """DeepSpeed and FSDP2 run on CPUs over gloo, for tests; accelerate does not lead there by itself."""
    process_group["backend"] = "gloo"
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # A shared-memory collective that would be compiled for more than a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        return
    if PartialState._shared_state:  # an earlier trainer of this process has led there
        return
    state = PartialState(**process_group)
    # accelerate looks for FSDP among the processes of accelerators only; PyTorch's own runs on any device.
    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
