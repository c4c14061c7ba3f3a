"""The letter a completion names, by the published rule of each benchmark."""

from __future__ import annotations

import re
import time

import pytest

from dirl.reward.choices import CHOICE_RULES, choice, find_choice


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("It is B.\nAnswer: C", "C"),
        ("ANSWER :\t$D$", "D"),
        ("Answer: A\nNo. Answer: B", "A"),
        ("Answer: b", "b"),  # found, and right for nothing
        ("Answer: Because", "B"),
        ("Answer: E", None),
        ("Answer:\nA", None),
        ("The answer is (A)", None),
        ("", None),
    ],
)
def test_simple_evals(text: str, letter: str | None) -> None:
    assert find_choice("simple-evals", text) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A or B? Therefore the answer is (J).", "J"),
        ("the answer is C, or the answer is (D)", "C"),
        ("Answer: B. Thus the answer is (A).", "A"),
        ("first\nanswer: A, I mean Answer:\nF\nAnswer: G", "F"),
        ("It is not A, it is C.\nOr so. I", "I"),
        ("Cats are B-rated", "B"),
        ("AB CD k", None),
        ("", None),
    ],
)
def test_mmlu_pro(text: str, letter: str | None) -> None:
    assert find_choice("mmlu-pro", text) == letter
    # Each pattern as its authors write it; they are the same, but for the time they take.
    theirs = (r"answer is \(?([A-J])\)?", r".*[aA]nswer:\s*([A-J])", r"(?s)\b([A-J])\b(?!.*\b[A-J]\b)")
    assert next((found[1] for pattern in theirs if (found := re.search(pattern, text))), None) == letter


def test_rewards() -> None:
    columns = {"answer": ["A", "A", "C", "7"], "choice_rule": ["simple-evals", "simple-evals", "mmlu-pro", None]}
    assert choice([""] * 4, ["Answer: A", "Answer: a", "the answer is (C)", "7"], **columns) == [1.0, 0.0, 1.0, None]
    assert choice([""], ["Answer: A"], answer=["A"]) == [None]
    with pytest.raises(ValueError, match="choice_rule='x'; expected one of simple-evals, mmlu-pro"):
        choice([""], ["A"], answer=["A"], choice_rule=["x"])


def test_long_texts_take_no_time() -> None:
    start = time.perf_counter()
    for rule in CHOICE_RULES:
        for text in ("a" * 200_000, "\n" * 200_000, "answer: " * 30_000, " " * 200_000):
            find_choice(rule, text)
    assert time.perf_counter() - start < 2
