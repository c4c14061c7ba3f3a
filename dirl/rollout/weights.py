"""A trainer's module -> named tensors as a checkpoint has them, in buckets of bounded size: what a push sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dirl.training.balance import consecutive
from dirl.training.full_parameters import full_parameter_kinds

NamedTensors = Iterable[tuple[str, Tensor]]

BUCKET_BYTES = 512 << 20


def checkpoint_tensors(named: NamedTensors) -> Iterator[tuple[str, Tensor]]:
    """Names and shapes of a checkpoint: transformers keeps the experts of a layer in one tensor, checkpoints do not.

    Source: transformers' mapping for Qwen3-MoE: gate_up_proj (experts, 2 x width, hidden) is gate over up,
    down_proj is (experts, hidden, width).
    """
    for name, tensor in named:
        stem, _, kind = name.rpartition(".")
        if not stem.endswith("mlp.experts") or tensor.ndim != 3:
            yield name, tensor
            continue
        for expert, weight in enumerate(tensor):
            if kind == "gate_up_proj":
                gate, up = weight.chunk(2)
                yield f"{stem}.{expert}.gate_proj.weight", gate
                yield f"{stem}.{expert}.up_proj.weight", up
            else:
                yield f"{stem}.{expert}.{kind}.weight", weight


def buckets(named: NamedTensors, max_bytes: int = BUCKET_BYTES) -> Iterator[list[tuple[str, Tensor]]]:
    """Copies of consecutive tensors, of at most `max_bytes` together; a larger one goes alone.

    Copies, because a parameter that was gathered from shards is gone when the next one is.
    """
    copies = ((name, tensor.clone()) for name, tensor in named)
    return consecutive(copies, lambda item: item[1].nbytes, max_bytes)


class ShapeCheck:
    """Refuses a push that is not the same set of parameters as the engine was built with."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self.expected = expected

    def watched(self, named: NamedTensors) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each checked as it passes, and their number at the end.

        Raises:
            ValueError: naming a parameter that is missing, unknown or of another shape.
        """
        seen = set()
        for name, tensor in named:
            _check_shape(name, tuple(tensor.shape), self.expected.get(name))
            seen.add(name)
            yield name, tensor
        check_shapes({name: self.expected[name] for name in seen}, self.expected)


def check_shapes(pushed: Mapping[str, tuple[int, ...]], ours: Mapping[str, tuple[int, ...]]) -> None:
    """
    Raises:
        ValueError: naming a parameter that is missing, unknown or of another shape.
    """
    for name in (*pushed, *ours):
        _check_shape(name, pushed.get(name), ours.get(name))


def kinds_of(model: nn.Module) -> dict[str, tuple[str, list[int]]]:
    """What a push of a model consists of: name -> dtype and shape, as JSON has them."""
    return {name: (_dtype_name(dtype), list(shape)) for name, (dtype, shape) in full_parameter_kinds(model).items()}


def kind_of(tensor: Tensor) -> tuple[str, list[int]]:
    return _dtype_name(tensor.dtype), list(tensor.shape)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_shape(name: str, pushed: tuple[int, ...] | None, ours: tuple[int, ...] | None) -> None:
    if pushed != ours:
        raise ValueError(
            f"update_weights: {name} is {pushed or 'absent'} in the pushed model and {ours or 'absent'} in the engine; "
            "push a model of the same configuration"
        )
