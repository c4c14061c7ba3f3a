"""Stories with sums: answers from their words, the same for the same seed, held-out ones apart."""

from __future__ import annotations

import re

import pytest

from dirl.data.rows import DataError
from dirl.data.tasks import find_task
from dirl.data.word_sums import LARGEST, word_sums_demonstrations, word_sums_problems


def answer_by_words(question: str) -> int:
    """What the sentences say, read one by one."""
    name = question.split()[0]
    told = question.split(" How many")[0]
    first, *events = re.findall(r"[^.]+\.", told)
    has = int(re.findall(r"\d+", first)[0])
    for event in events:
        number = int(re.findall(r"\d+", event)[0])
        gained = re.search(rf"finds|buys|wins|gives {name} \d", event) is not None
        has += number if gained else -number
        assert 0 <= has <= LARGEST
    return has


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_answer_is_what_the_story_says(split: str) -> None:
    problems = word_sums_problems(300, 1, split)  # type: ignore[arg-type]
    assert [problem.answer for problem in problems] == [str(answer_by_words(p.question)) for p in problems]
    assert {problem.columns["num_events"] for problem in problems} == {2, 3, 4}


def test_the_working_is_right() -> None:
    for row in word_sums_demonstrations(200, 0):
        *steps, boxed = re.split(r"\. ", row["completion"])
        for step in steps:
            left, sign, right, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", step).groups()  # type: ignore[union-attr]
            assert int(result) == int(left) + int(right) * (1 if sign == "+" else -1)
        assert boxed == f"\\boxed{{{answer_by_words(row['prompt'])}}}"


def test_splits_are_apart_and_seeds_are_the_same_everywhere() -> None:
    train, heldout = (word_sums_problems(2000, 0, split) for split in ("train", "heldout"))  # type: ignore[arg-type]
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert word_sums_problems(5, 3) == word_sums_problems(9, 3)[:5] != word_sums_problems(5, 4)
    assert find_task("task:word_sums").num_heldout == 256
    with pytest.raises(DataError, match=r"word_sums has the splits train and heldout, got 'test'"):
        word_sums_problems(1, 0, "test")  # type: ignore[arg-type]
