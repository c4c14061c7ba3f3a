"""Questions -> which rows are kept apart to evaluate on, and which training rows ask what the evaluation asks.

Two texts ask the same where they share 13 words in a row, whatever their case and punctuation, or are the same as a
whole, up to case and spaces. 13 words tell nothing where five of them are a template: they stand in a row in a tenth of
the evaluation questions, such as "please reason step by step".

Source: Language Models are Few-Shot Learners (GPT-3), appendix C, for the 13 words.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dirl.files import write_whole

NUM_WORDS = 13
PART_WORDS = 7  # 13 words in a row, wherever they begin, hold 7 that begin at a multiple of 7
TEMPLATE_WORDS = 5
TEMPLATE_SHARE, TEMPLATE_LEAST = 0.1, 2  # of the evaluation questions: in more than both, words are a template
FILE = "contaminated_rows.jsonl"
_WORD = re.compile(r"\w+")
_GAPS = bytes(code if _WORD.match(chr(code)) else ord(" ") for code in range(128)).ljust(256)
_SPACES = bytes(code for code in range(128) if chr(code).isspace())


@dataclass(frozen=True)
class Overlap:
    """A training row that asks what the evaluation asks."""

    path: str
    row: int  # as people count
    words: str  # that it shares
    evaluation: str  # the question that has them too


def question_key(question: str) -> int:
    """64 bits that the question alone decides."""
    return int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big")


def kept_apart(keys: Sequence[int], amount: float) -> list[int]:
    """The indices of the rows that are kept apart, the lowest key first: rows of one question stay together.

    Args:
        keys: `question_key` of each row.
        amount: below 1 a share of all possible keys, so that rows that are added move no other; else a number of rows
            (or more, where the last question has several).
    """
    order = sorted(range(len(keys)), key=keys.__getitem__)
    last = amount * 2**64 if amount < 1 else keys[order[min(int(amount), len(order)) - 1]] + 1
    return [row for row in order if keys[row] < last]


class EvaluationQuestions:
    """What an evaluation asks, to be looked up by the words of a training row."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._questions = list(dict.fromkeys(questions))
        self._asked_by: dict[tuple[str, ...], int] = {}  # words in a row -> number of the first question with them
        words_of = [_words(_plain(text)) for text in self._questions]
        counts = Counter(part for words in words_of for part in set(_in_rows(words, TEMPLATE_WORDS)))
        most = max(TEMPLATE_LEAST, TEMPLATE_SHARE * len(self._questions))
        template = {part for part, count in counts.items() if count > most}
        for number, question in enumerate(self._questions):
            for words in _told(question):
                if template.isdisjoint(_in_rows(words, TEMPLATE_WORDS)):
                    self._asked_by.setdefault(words, number)
        self._parts = {part for words in self._asked_by for part in _in_rows(words, PART_WORDS)}

    def find(self, path: str, row: int, question: str) -> Overlap | None:
        """What this question of a row shares with them; None: nothing."""
        plain = _plain(question)
        words = _words(plain)
        parts = zip(*[iter(words)] * PART_WORDS, strict=False)  # those that begin at a multiple of so many words
        if self._parts.isdisjoint(parts) and _whole(plain) not in self._asked_by:  # in C: few rows share anything
            return None
        shared = next((words for words in _told(question) if words in self._asked_by), None)
        if shared is None:
            return None
        return Overlap(path, row, " ".join(shared), self._questions[self._asked_by[shared]])


@dataclass(frozen=True)
class Overlaps:
    """All of a run's, and what became of them."""

    found: Sequence[Overlap]
    num_rows: int  # that were looked at
    is_dropped: bool

    def write(self, output_dir: str) -> str:
        """List them beside the run; a line that counts them, empty where there are none."""
        file = Path(output_dir, FILE)
        if not self.found:
            file.unlink(missing_ok=True)  # of a run that trained on other rows
            return ""
        rows = [{"path": o.path, "row": o.row, "words": o.words, "evaluation": o.evaluation} for o in self.found]
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows))
        done = "left out" if self.is_dropped else "trained on; data.decontaminate=drop leaves them out"
        return (
            f"{len(self.found)} of {self.num_rows} training rows share a question, or {NUM_WORDS} words of one in a "
            f"row, with the evaluation data: {done} (listed in {file})"
        )


def _told(text: str) -> Iterable[tuple[str, ...]]:
    """A text as a whole, punctuation too (9+7 is not 9-7), and every 13 words in a row."""
    plain = _plain(text)
    return itertools.chain([_whole(plain)], _in_rows(_words(plain), NUM_WORDS))


def _whole(plain: str) -> tuple[str, ...]:
    if not plain.isascii():
        return ("".join(plain.split()),)
    return (plain.encode().translate(None, _SPACES).decode(),)  # the same in a third of the time


def _in_rows(words: Sequence[str], count: int) -> Iterable[tuple[str, ...]]:
    """Every so many words that follow one another."""
    return zip(*(words[start:] for start in range(count)), strict=False)


def _words(plain: str) -> list[str]:
    if not plain.isascii():
        return _WORD.findall(plain)
    return plain.encode().translate(_GAPS).decode().split()  # the same in a quarter of the time


def _plain(text: str) -> str:
    return (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
