"""A row of LiveCodeBench -> its tests, decoded as they are needed: all at once they would fill gigabytes.

`private_test_cases` is JSON, or JSON in a pickle in zlib in base64. No pickle is executed: its operations are read, and
one that does more than say a text is refused. Printed lines are compared as LiveCodeBench's own runner does.
"""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

MAX_BYTES = 2**30  # of a row's tests, decoded
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_FRAMES = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def read_cases(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Input and expected output of each test, the public ones first.

    Raises:
        ValueError: a column that is not what LiveCodeBench publishes, or a pickle of anything but a text.
    """
    cases = []
    for key in ("public_test_cases", "private_test_cases"):
        try:
            found = json.loads(_json_of(row[key]))
            cases += [(str(case["input"]), str(case["output"])) for case in found]
        except (ValueError, TypeError, KeyError, zlib.error) as error:
            raise ValueError(f"{key} holds no tests in the form of LiveCodeBench: {error}") from error
    return cases


def _json_of(text: str) -> str:
    if text.lstrip().startswith("["):
        return text
    inflater = zlib.decompressobj()
    data = inflater.decompress(base64.b64decode(text, validate=True), MAX_BYTES)
    if inflater.unconsumed_tail or not inflater.eof:
        raise ValueError(f"its data end early, or are larger than {MAX_BYTES} bytes")
    return text_in_pickle(data)


def text_in_pickle(data: bytes) -> str:
    """The text that a pickle says, which is not executed.

    Raises:
        ValueError: it says anything else.
    """
    found = []
    for operation, argument, _ in pickletools.genops(data):
        if operation.name in _TEXTS:
            found.append(argument)
        elif operation.name not in _FRAMES:
            raise ValueError(f"a pickle that does more than say a text ({operation.name}) is not read")
    if len(found) != 1:
        raise ValueError(f"a pickle of {len(found)} texts; expected one")
    return str(found[0])


def as_call(name: str, case: tuple[str, str]) -> tuple[str, Any]:
    """A test of a function -> the expression that calls it, and the value that it must have.

    Each line of the input is an argument in JSON. The function is a method of `Solution` where there is one; a tuple
    counts as a list.
    """
    arguments = ", ".join(repr(json.loads(line)) for line in case[0].split("\n"))
    function = f"(Solution().{name} if 'Solution' in globals() else {name})"
    return f"(lambda value: list(value) if isinstance(value, tuple) else value)({function}({arguments}))", json.loads(
        case[1]
    )


def prints_same(printed: str, expected: str) -> bool:
    """Whether as many lines are the same, but for spaces around them, or the same decimal numbers."""
    lines, wanted = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(lines) == len(wanted) and all(
        line == other or (_decimals(line) is not None and _decimals(line) == _decimals(other))
        for line, other in zip(lines, wanted, strict=True)
    )


def _decimals(line: str) -> list[Decimal] | None:
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
