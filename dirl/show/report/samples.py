"""completions/*.jsonl -> a few completions worth looking at, with what is needed to play them.

Of a few steps, evenly spaced, and of a few groups of each, the best and the worst completion. The files of a large run
hold gigabytes: only their first megabytes are read, and long completions are cut to what a page can hold.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

MAX_FILES = 6
GROUPS_PER_FILE = 3
BYTES_PER_FILE = 8_000_000  # read of a file
MAX_TOKENS = 90_000  # in a report: about 2 MB

Decode = Callable[[Sequence[int]], list[str]]  # token ids -> the text of each


def choose_samples(run_dir: Path, decode: Decode | None, block_length: int) -> list[dict[str, Any]]:
    """Samples of a run, newest step first.

    Args:
        decode: texts of the tokens of rows that do not bring them; None: their numbers are shown.
        block_length: tokens per block of rows that do not say; 0: such rows cannot be played and are left out.
    """
    files = sorted((run_dir / "completions").glob("step_*.jsonl"))
    count = min(MAX_FILES, len(files))
    chosen = [files[round(i * (len(files) - 1) / max(count - 1, 1))] for i in range(count)]
    samples: list[dict[str, Any]] = []
    for file in reversed(chosen):
        room = MAX_TOKENS // count
        for label, row in _best_and_worst(_read_groups(file)):
            sample = play_data(row, label=f"step {_step(file)}, {label}", decode=decode, block_length=block_length)
            if sample is None or room <= 0:
                continue
            _cut(sample, room)
            room -= len(sample["texts"])
            samples.append(sample)
    return samples


def play_data(row: Mapping[str, Any], *, label: str, decode: Decode | None, block_length: int) -> dict[str, Any] | None:
    """What the player wants of one completion; None where its blocks are not known."""
    block_length = row.get("block_length") or block_length
    if not block_length:
        return None
    ids: Sequence[int] = row["token_ids"]
    texts = row.get("token_texts") or (decode(ids) if decode else [f"<{token}>" for token in ids])
    logprobs = row.get("logprobs")
    return {
        "label": label,
        "question": str(row.get("question", "")),
        "answer": str(row.get("answer", "")),
        "reward": row.get("reward"),
        "rewards": dict(row.get("rewards") or {}),
        "prompt_length": len(row["prompt_ids"]),
        "block_length": block_length,
        "tail": row.get("tail", len(row["prompt_ids"]) % block_length),
        "completion_length": row["completion_length"],
        "texts": list(texts),
        "steps": list(row["step_map"]),
        "confidence": None if logprobs is None else [round(math.exp(min(value, 0.0)), 3) for value in logprobs],
        "is_cut": False,
    }


def _step(file: Path) -> int:
    match = re.search(r"\d+", file.stem)
    return int(match[0]) if match else 0


def _read_groups(file: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Whole groups from the beginning of a file; a group that the byte limit or a kill cut is left out."""
    rows: list[dict[str, Any]] = []
    with file.open("rb") as opened:
        size = 0
        for line in opened:
            size += len(line)
            if size > BYTES_PER_FILE or not line.endswith(b"\n"):
                rows = [row for row in rows if row["group"] != rows[-1]["group"]] or rows
                break
            rows.append(json.loads(line))
    for number, members in groupby(rows, key=lambda row: int(row["group"])):
        yield number, list(members)


def _best_and_worst(groups: Iterator[tuple[int, list[dict[str, Any]]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Groups whose rewards differ come first: they are what is learned from."""

    def spread(group: tuple[int, list[dict[str, Any]]]) -> float:
        rewards = [row["reward"] for row in group[1]]
        return max(rewards) - min(rewards)

    # Sorting is stable: among equals, those the file names first.
    for number, rows in sorted(groups, key=lambda group: spread(group) <= 0)[:GROUPS_PER_FILE]:
        ordered = sorted(rows, key=lambda row: -row["reward"])
        yield f"group {number}: best, reward {ordered[0]['reward']:g}", ordered[0]
        if len(ordered) > 1:
            yield f"group {number}: worst, reward {ordered[-1]['reward']:g}", ordered[-1]


def _cut(sample: dict[str, Any], room: int) -> None:
    """Keep whole blocks of at most `room` tokens (one block at least)."""
    block_length, tail = sample["block_length"], sample["tail"]
    kept = max((room + tail) // block_length, 1) * block_length - tail
    if len(sample["texts"]) > kept:
        for name in ("texts", "steps", "confidence"):
            if sample[name] is not None:
                sample[name] = sample[name][:kept]
        sample["is_cut"] = True
