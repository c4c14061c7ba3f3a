"""LiveCodeBench's tests: decoded without executing a pickle, and compared as its own runner does."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from dirl.reward import contest_tests
from dirl.reward.contest_tests import prints_same, read_cases, text_in_pickle
from tests.published_rows import contest_row, packed

CASES = [{"input": "1\n2", "output": "3", "testtype": "stdin"}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("text", ["", "short", "\u00e9\u2713 \\n\n", "x" * 300, "x" * 70_000])
def test_a_text_is_read_from_every_pickle_of_it(text: str, protocol: int) -> None:
    assert text_in_pickle(pickle.dumps(text, protocol=protocol)) == text


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


def test_nothing_else_is_read_and_nothing_is_executed(tmp_path: Path) -> None:
    for value in (["a"], b"a", 1, None, ("a", "b"), {"a": "b"}, Evil(tmp_path / "made")):
        with pytest.raises(ValueError, match=r"a pickle (that does more than say a text|of 0 texts)"):
            text_in_pickle(pickle.dumps(value))
    assert not (tmp_path / "made").exists()
    for data in (b"", b"\x80\x04", b"\x80\x04\x8c\x05ab", b"garbage"):
        with pytest.raises(ValueError):
            text_in_pickle(data)


def test_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    row = contest_row([("1", "2")], [("3", "4")])
    assert read_cases(row) == [("1", "2"), ("3", "4")]
    assert read_cases({**row, "private_test_cases": json.dumps(CASES)}) == [("1", "2"), ("1\n2", "3")]
    evil = base64.b64encode(zlib.compress(pickle.dumps([1]))).decode()
    for value in ("?", "AAAA", evil, packed(CASES)[:-8], base64.b64encode(zlib.compress(b"x")[:-6]).decode()):
        with pytest.raises(ValueError, match="private_test_cases holds no tests in the form of LiveCodeBench"):
            read_cases({**row, "private_test_cases": value})
    monkeypatch.setattr(contest_tests, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        read_cases({**row, "private_test_cases": packed(CASES * 100)})


@pytest.mark.parametrize(
    ("printed", "expected", "is_same"),
    [
        ("3\n", "3", True),
        ("  a b \n c\n\n", "a b\nc", True),
        ("1.50 2", "1.5 2.0", True),
        ("a 1.0", "a 1", False),
        ("1 2", "1\n2", False),
        ("50000000000000000", "50000000000000001", False),
        ("", "", True),
        ("nan", "NaN", False),
    ],
)
def test_lines(printed: str, expected: str, is_same: bool) -> None:
    assert prints_same(printed, expected) == is_same
