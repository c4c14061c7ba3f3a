"""A seed -> short stories with a number at their end, told in words, and their working: a task for a pretrained model.

Two to four events change what somebody has. It needs no download, every answer can be checked, and a model of 135 M
parameters that knows English can learn it within an hour on two cores.

    question       Ben has 14 apples. He finds 9 more. He gives 5 to Ruth. How many apples does Ben have now?
    demonstration  14 + 9 = 23. 23 - 5 = 18. \\boxed{18}
"""

from __future__ import annotations

import hashlib
import random
from typing import Literal

from dirl.data.problems import Problem
from dirl.data.rows import DataError

HELDOUT_PERCENT = 10  # of all stories, by their text
NUM_EVENTS = (2, 3, 4)
LARGEST = 60  # that anybody ever has
_PEOPLE = (
    *(("Ben", "He"), ("Ruth", "She"), ("Omar", "He"), ("Lena", "She"), ("Ravi", "He"), ("Mei", "She")),
    *(("Tom", "He"), ("Ana", "She"), ("Yusuf", "He"), ("Ida", "She"), ("Noah", "He"), ("Zoe", "She")),
)
_THINGS = ("apples", "coins", "books", "shells", "stamps", "cards", "marbles", "pens", "eggs", "stones")
_GAINS = ("{who} finds {n} more.", "{who} buys {n} more.", "{other} gives {name} {n}.", "{who} wins {n}.")
_LOSSES = ("{who} gives {n} to {other}.", "{who} loses {n}.", "{who} sells {n}.", "{other} borrows {n}.")


def word_sums_demonstrations(num: int, seed: int) -> list[dict[str, str]]:
    """`num` rows {"prompt", "completion"} on training stories; their working is right."""
    rng = random.Random(f"word_sums demonstrations {seed}")
    return [
        {"prompt": question, "completion": _working(start, changes)}
        for question, start, changes in (_story(rng, "train", i) for i in range(num))
    ]


def word_sums_problems(num: int, seed: int, split: Literal["train", "heldout"] = "train") -> list[Problem]:
    """`num` stories with their answers; held-out ones never occur in training.

    Raises:
        DataError: an unknown split.
    """
    if split not in ("train", "heldout"):
        raise DataError(f"the task word_sums has the splits train and heldout, got {split!r}")
    rng = random.Random(f"word_sums {split} {seed}")
    return [
        Problem(question=question, answer=str(start + sum(changes)), columns={"num_events": len(changes)})
        for question, start, changes in (_story(rng, split, i) for i in range(num))
    ]


def _story(rng: random.Random, split: str, index: int) -> tuple[str, int, list[int]]:
    """A story of the split, what its hero has at first, and what each event changes."""
    while True:
        start, changes = rng.randint(5, 30), []
        (name, who), (other, _) = rng.sample(_PEOPLE, 2)
        thing, has, sentences = rng.choice(_THINGS), start, []
        for _ in range(NUM_EVENTS[index % len(NUM_EVENTS)]):
            gains = has < 5 or (has <= LARGEST - 5 and rng.random() < 0.5)
            number = rng.randint(2, min(20, LARGEST - has) if gains else min(20, has))
            sentences.append(rng.choice(_GAINS if gains else _LOSSES).format(who=who, name=name, other=other, n=number))
            changes.append(number if gains else -number)
            has += changes[-1]
        told = " ".join([f"{name} has {start} {thing}.", *sentences])
        question = f"{told} How many {thing} does {name} have now?"
        if _is_heldout(question) == (split == "heldout"):
            return question, start, changes


def _is_heldout(question: str) -> bool:
    """Decided by the text alone, so that no seed, count or Python version can move one across."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % 100 < HELDOUT_PERCENT


def _working(has: int, changes: list[int]) -> str:
    """One equation an event, and the answer."""
    steps = []
    for change in changes:
        steps.append(f"{has} {'+' if change > 0 else '-'} {abs(change)} = {has + change}.")
        has += change
    return " ".join([*steps, f"\\boxed{{{has}}}"])
