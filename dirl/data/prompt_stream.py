"""A number of items -> an endless reshuffled stream of their indices that can be saved and continued exactly.

Every rank goes through the same stream and takes its share, so that what is trained on does not depend on their number.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Any

from dirl.errors import UserError


def fingerprint(items: Iterable[object]) -> str:
    """A short digest of data, to tell on resuming whether they are still the same."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr(item).encode())
    return digest.hexdigest()[:16]


class PromptStream:
    """Each epoch is a fresh permutation, a function of (seed, epoch); the state is two numbers.

    Args:
        data_fingerprint: what the items are; a saved position is worth nothing among others.
    """

    is_amid = False  # its whole state is a position

    def __init__(self, num_items: int, seed: int, data_fingerprint: str = "") -> None:
        if num_items < 1:
            raise ValueError("a prompt stream needs at least one item, got none")
        self.num_items, self.seed, self.data_fingerprint = num_items, seed, data_fingerprint
        self.epoch, self.position = 0, 0
        self._order = self._permutation(0)

    def take(self, count: int) -> list[int]:
        """The next `count` indices; an epoch that ends in the middle is followed by the next one."""
        taken: list[int] = []
        while len(taken) < count:
            if self.position == self.num_items:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation(self.epoch)
            piece = self._order[self.position : self.position + count - len(taken)]
            self.position += len(piece)
            taken += piece
        return taken

    @property
    def last(self) -> int:
        """The index that was taken last."""
        return self._order[self.position - 1]

    def state_dict(self) -> dict[str, Any]:
        names = ("num_items", "seed", "data_fingerprint", "epoch", "position")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            ValueError: the state belongs to other data or another seed.
        """
        for key in ("num_items", "seed", "data_fingerprint"):
            if state[key] != getattr(self, key):
                raise UserError(
                    f"the checkpoint's data stream has {key}={state[key]}, this run {getattr(self, key)}; resume with "
                    "the same data and seed, or set resume_from_checkpoint=none"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation(self.epoch)

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(self.num_items))
        random.Random(f"prompt stream {self.seed} {epoch}").shuffle(order)
        return order
