"""One pool of answer-checking processes for all reward tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dirl.reward import MathGrader


@pytest.fixture(scope="session")
def grader() -> Iterator[MathGrader]:
    with MathGrader(num_workers=2) as shared:
        yield shared
