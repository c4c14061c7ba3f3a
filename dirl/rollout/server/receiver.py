"""Whose weights a server's module holds, and how pushed ones come into it.

A push is announced whole, by names, dtypes and shapes, before anything is written, so that what does not fit is refused
while the weights of before are there still. From then on until all of it has come the module holds no weights: neither
a push that was cut off nor one with a number that is not finite is ever decoded with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from safetensors.torch import load as read_safetensors
from torch import Tensor

from dirl.errors import one_line
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.engine import RolloutEngine, RolloutError
from dirl.rollout.server.line import Conflict
from dirl.rollout.server.wire import (
    LEASE_SECONDS,
    LOST,
    NO_GROUP,
    NOT_YET,
    TAKEN,
    Hold,
    Join,
    Push,
    PushedPart,
    trainer_of,
)
from dirl.rollout.weights import check_shapes, kind_of
from dirl.training.broadcast import BroadcastGroup, Meeting, hardware_of

_NOT_FINITE = "weights: {} has numbers that are not finite; nothing is decoded with them"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class _Coming:
    """A push that is under way."""

    push: Push
    missing: set[str]
    next_part: int = 0
    heard_at: float = field(default_factory=time.monotonic)

    def is_others(self, push: Push) -> bool:
        """Whether another process of the same trainer is at it."""
        ours, theirs = (push.pusher, trainer_of(push.weights)), (self.push.pusher, trainer_of(self.push.weights))
        is_heard = time.monotonic() < self.heard_at + LEASE_SECONDS
        return is_heard and ours[0] != theirs[0] and ours[1] == theirs[1]


class WeightsReceiver:
    """The weights behind a server. All but `hold` is called by the engine's thread.

    Args:
        weights: the name of those that the module is built with; None: they mean nothing.
    """

    def __init__(self, model: BlockDiffusionModel, engine: RolloutEngine, weights: str | None) -> None:
        self.weights = weights
        self._engine, self._model, self._parameters = engine, model, dict(model.named_parameters())
        self._coming: _Coming | None = None
        self._holder, self._held_until = "", 0.0
        self._group: BroadcastGroup | None = None

    @property
    def num_bytes(self) -> int:
        """Of all parameters in the widest type they may be pushed in, float32."""
        return 4 * sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def hardware(self) -> str:
        """That the module is on."""
        return hardware_of(next(iter(self._parameters.values())).device)

    def hold(self, asked: Hold) -> dict[str, str]:
        """
        Raises:
            Conflict: another trainer holds this server.
        """
        if self._is_taken(asked.trainer):
            raise Conflict("it serves another trainer; give each trainer servers of its own", TAKEN)
        self._holder, self._held_until = asked.trainer, time.monotonic() + min(asked.seconds, LEASE_SECONDS)
        return {}

    def why_not(self, wanted: str | None) -> Conflict | None:
        """Why nothing can be decoded with these weights now; None: it can.

        Args:
            wanted: None: whatever is there.
        """
        if self.weights is not None and wanted in (None, self.weights):
            return None
        if wanted is None:
            return Conflict("no weights are here", NOT_YET)
        trainer, here = trainer_of(wanted), self.weights or (self._coming.push.weights if self._coming else "none")
        if self._is_taken(trainer):
            return Conflict("it serves another trainer; give each trainer servers of its own", TAKEN)
        reason = f"weights {wanted} are asked for, {here} are here"
        return Conflict(reason, NOT_YET if trainer_of(here) == trainer else LOST)

    def begin(self, push: Push) -> dict[str, str | None]:
        """Make ready for a push; the name of the weights that are there, which may be those.

        Raises:
            Conflict: another trainer's server, or another process of this one pushes the same.
            ValueError: the push does not fit; nothing has changed.
        """
        self.hold(Hold(trainer_of(push.weights), LEASE_SECONDS))
        if self.weights != push.weights:
            if self._coming and self._coming.is_others(push):
                raise Conflict(f"weights {self._coming.push.weights} are being pushed", NOT_YET)
            self._check(push)
            self.weights, self._coming = None, _Coming(push, set(push.tensors))
        return {"weights": self.weights}

    def take(self, body: bytes, sent: PushedPart) -> dict[str, str | None]:
        """Write one bucket. A part that arrives twice, because its answer was lost, is written twice.

        Raises:
            Conflict: it is not of the push that is under way, or not its next part.
            ValueError: it is not what was announced, or not finite; the push is then over.
        """
        if self.weights != sent.weights:
            coming = self._of(sent)
            coming.next_part, coming.heard_at = sent.part + 1, time.monotonic()
            self._coming = None  # should it fail
            self._write(read_safetensors(body), coming)
            self._end(coming)
        return {"weights": self.weights}

    def join(self, asked: Join) -> dict[str, str]:
        """
        Raises:
            Conflict: another trainer's server, or the others did not come.
        """
        self.hold(Hold(asked.trainer, LEASE_SECONDS))
        self._group = None  # an older one
        try:
            self._group = BroadcastGroup(Meeting(**asked.meeting), asked.member)
        except (RuntimeError, OSError) as error:
            raise Conflict(f"no group was formed: {one_line(error, 200)}", NO_GROUP) from error
        return {}

    def receive(self, sent: PushedPart) -> dict[str, str | None]:
        """Everything that was announced, through the group.

        Raises:
            Conflict: it is not of the push that is under way, or there is no group.
            RolloutError: the group broke; ValueError: a number is not finite. The push is then over.
        """
        if self.weights != sent.weights:
            coming, group, self._group = self._of(sent), self._group, None  # should it fail
            if group is None:
                raise Conflict("this server is in no group", NO_GROUP)
            self._coming = None
            self._receive(group, coming)
            self._group = group
            self._end(coming)
        return {"weights": self.weights}

    def _of(self, sent: PushedPart) -> _Coming:
        coming = self._coming
        if coming is None or (coming.push.weights, coming.push.pusher) != (sent.weights, sent.pusher):
            raise Conflict(f"no push of {sent.weights} is under way; start again", LOST)
        if sent.part not in (coming.next_part, coming.next_part - 1):
            raise Conflict(f"part {sent.part} of a push while part {coming.next_part} is awaited; start again", LOST)
        return coming

    def _end(self, coming: _Coming) -> None:
        """Of a part; of the push where nothing is missing."""
        if coming.missing:
            self._coming = coming
            return
        self._engine.update_weights(self._model)
        self.weights = coming.push.weights

    def _receive(self, group: BroadcastGroup, coming: _Coming) -> None:
        broken = ""
        with torch.no_grad():
            for name, (dtype, shape) in coming.push.tensors.items():
                ours = self._parameters[name]
                is_alike = kind_of(ours)[0] == dtype and ours.device.type == group.device.type and ours.is_contiguous()
                tensor = ours if is_alike else torch.empty(shape, dtype=getattr(torch, dtype), device=group.device)
                try:
                    group.broadcast(tensor)
                except RuntimeError as error:
                    group.close()
                    reason = f"the broadcast of {coming.push.weights} broke off at {name}: {one_line(error, 200)}"
                    raise RolloutError(reason) from error
                if not tensor.isfinite().all():
                    broken = broken or name
                if tensor is not ours:
                    ours.copy_(tensor)
        if broken:
            raise ValueError(_NOT_FINITE.format(broken))
        coming.missing.clear()

    def _write(self, tensors: Mapping[str, Tensor], coming: _Coming) -> None:
        for name, tensor in tensors.items():
            found, announced = kind_of(tensor), coming.push.tensors.get(name)
            if announced is None or found != (announced[0], list(announced[1])):
                raise ValueError(f"weights: {name} comes as {found}, {announced or 'nothing'} was announced")
            if not tensor.isfinite().all():
                raise ValueError(_NOT_FINITE.format(name))
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._parameters[name].copy_(tensor)
        coming.missing -= tensors.keys()

    def _check(self, push: Push) -> None:
        shapes = {name: tuple(shape) for name, (_, shape) in push.tensors.items()}
        check_shapes(shapes, {name: tuple(parameter.shape) for name, parameter in self._parameters.items()})
        for name, (dtype, _) in push.tensors.items():
            if dtype not in _DTYPES:
                raise ValueError(f"weights: {name} is pushed as {dtype}; push one of {', '.join(_DTYPES)}")

    def _is_taken(self, trainer: str) -> bool:
        return self._holder != trainer and time.monotonic() < self._held_until
