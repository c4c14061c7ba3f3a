"""Held-out rows by hash and near-duplicates by 13 words: against the slow obvious way, and at their edges."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dirl.data.questions import EvaluationQuestions, Overlap, Overlaps, kept_apart, question_key

WORDS = [f"w{n}" for n in range(40)]
LONG = " ".join(WORDS[:20])


def shares_13_words(first: str, second: str) -> bool:
    """Slowly: every 13 words of the one looked for in the other."""
    ours, theirs = first.split(), f" {second} "
    return any(f" {' '.join(ours[i : i + 13])} " in theirs for i in range(len(ours) - 12))


def test_it_is_the_slow_obvious_way() -> None:
    rng = random.Random(0)
    asked = [" ".join(rng.choices(WORDS, k=rng.randint(13, 60))) for _ in range(8)]
    index, num_found = EvaluationQuestions(asked), 0
    for row in range(400):
        words, before = rng.choices(WORDS, k=20), rng.randrange(20)
        start, length = rng.randrange(40), rng.randint(10, 16)
        text = " ".join(words[:before] + rng.choice(asked).split()[start : start + length] + words[before:])
        found = index.find("p", row, text)
        assert (found is not None) == any(shares_13_words(text, question) for question in asked)
        num_found += found is not None
        if found is not None:
            assert shares_13_words(found.words, text) and shares_13_words(found.words, found.evaluation)
    assert 50 < num_found < 350


@pytest.mark.parametrize(
    ("asked", "text", "is_found"),
    [
        (LONG, " ".join(WORDS[5:18]), True),
        (LONG, " ".join(WORDS[5:17]), False),  # 12 words are a short text: whole or not at all
        (LONG, LONG.upper().replace(" ", ", "), True),
        ("9+7=", "9+7 =", True),
        ("9+7=", "9-7=", False),
        ("9+7=", "9+7=?", False),
        (f"é {LONG}", LONG.replace(" ", "\u00a0"), True),  # not ASCII: the other way to find words
        ("Who?", "who?", True),
        ("\uff11 + 1", "1 + 1", True),  # a wide digit
    ],
)
def test_what_is_the_same(asked: str, text: str, is_found: bool) -> None:
    assert (EvaluationQuestions([asked]).find("p", 1, text) is not None) == is_found


def test_a_template_tells_nothing_but_what_is_filled_in_does() -> None:
    template = " ".join(f"t{n}" for n in range(12))
    asked = [f"{' '.join(f'{word}{n}' for word in WORDS[:14])} weeks {template}" for n in range(3)]
    index = EvaluationQuestions(asked)
    assert index.find("p", 1, f"how many weeks {template}") is None
    assert EvaluationQuestions(asked[1:]).find("p", 1, f"how many weeks {template}") is not None  # two may be chance
    found = index.find("p", 1, f"so: {asked[2]}")
    assert found is not None and found.evaluation == asked[2]
    filled_in = [f"has {n} {template}" for n in range(3)]  # nothing else: the same as a whole
    assert EvaluationQuestions(filled_in).find("p", 1, f"Has 1  {template}") is not None
    assert EvaluationQuestions(filled_in).find("p", 1, f"has 7 {template}") is None


def test_rows_of_one_question_stay_together_and_new_rows_move_none() -> None:
    keys = [question_key(f"question {n % 700}") for n in range(1000)]
    apart = kept_apart(keys, 0.2)
    assert 0.15 < len(apart) / 1000 < 0.25
    assert {keys[row] for row in apart}.isdisjoint(key for row, key in enumerate(keys) if row not in set(apart))
    more = [question_key(f"new {n}") for n in range(50)] + keys
    assert [row - 50 for row in kept_apart(more, 0.2) if row >= 50] == apart
    assert len({keys[row] for row in kept_apart(keys, 30)}) <= 30 <= len(kept_apart(keys, 30)) <= 31
    assert len(kept_apart(keys, 5000)) == 1000
    assert question_key("who is it?") != question_key("who is he?")


def test_what_is_found_is_listed_and_counted(tmp_path: Path) -> None:
    found = [Overlap("a.jsonl", 7, "9+7=", "9+7=")]
    line = Overlaps(found, 50, is_dropped=False).write(str(tmp_path))
    assert (
        line.startswith("1 of 50 training rows share a question, or 13 words") and "decontaminate=drop leaves" in line
    )
    (row,) = (tmp_path / "contaminated_rows.jsonl").read_text().splitlines()
    assert json.loads(row) == {"path": "a.jsonl", "row": 7, "words": "9+7=", "evaluation": "9+7="}
    assert Overlaps([], 50, is_dropped=True).write(str(tmp_path)) == ""
    assert not (tmp_path / "contaminated_rows.jsonl").exists()
