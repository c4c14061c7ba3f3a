"""Numbers that name a piece of work -> its seed, the same in every process and for every number of ranks."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: int) -> int:
    """A 63-bit seed that depends on these numbers and on nothing else."""
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
