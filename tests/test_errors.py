"""Whatever a library says, people read one line of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dirl import errors
from dirl.data.row_source import open_rows
from dirl.data.rows import DataError
from dirl.errors import one_line
from dirl.reward.rubric import RewardConfig, RewardError, Rubric

PACKAGE = Path(errors.__file__).parent


def fails(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    raise RuntimeError("first\n  second")


def test_one_line_has_the_class_and_the_text() -> None:
    assert one_line(OSError("a\n\tb   c")) == "OSError: a b c"
    assert one_line(KeyError("a" * 50), 12) == "KeyError: 'a"
    assert one_line(ValueError()) == "ValueError:"


def test_what_others_raise_reaches_people_as_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="not a readable parquet file: ArrowInvalid: ") as unreadable:
        open_rows(str(tmp_path / "rows.parquet"), split="train")
    with Rubric(RewardConfig(functions=[f"{__file__}:fails"])) as rubric, pytest.raises(RewardError) as raised:
        rubric.score(["?"], ["!"], completion_ids=[[1]], step_maps=[[1]], columns={})
    assert "raised RuntimeError: first second (" in str(raised.value)
    assert "\n" not in str(raised.value) + str(unreadable.value)


def test_no_other_file_makes_one_line_of_an_error() -> None:
    by_hand = re.compile(r"type\((e|err|error)\)\.__name__|str\((e|err|error)\)\.split")
    found = {path.name for path in PACKAGE.rglob("*.py") if by_hand.search(path.read_text(encoding="utf-8"))}
    assert found == {"errors.py", "sandbox_child.py"}, "the latter runs where nothing of this package can be imported"
