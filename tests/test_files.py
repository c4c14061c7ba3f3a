"""A file is there whole or not at all, whatever happens while it is written; lines cut short harm no others."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dirl import files
from dirl.errors import UserError
from dirl.files import append_json_lines, cut_torn_line, expand, is_hub_id, read_json_lines, write_json, write_whole

PACKAGE = Path(files.__file__).parent


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_whole(tmp_path / "new" / "file", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old" and [one.name for one in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_kill_leaves_what_was_there(moment: str, tmp_path: Path) -> None:
    path = write_whole(tmp_path / "file", "old")
    module, _, name = moment.partition(".")
    script = f"import os, {module}; from dirl.files import write_whole; {module}.{name} = lambda *_: os._exit(9); "
    done = subprocess.run([sys.executable, "-c", script + f"write_whole({str(path)!r}, 'new')"], cwd=PACKAGE.parent)
    assert done.returncode == 9 and path.read_text() == "old"
    assert write_whole(path, "new").read_text() == "new"


def test_a_folder_lasts_where_it_is_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of it, before it takes the place of what stood there; nobody waits for one that is soon deleted."""
    target, forced = tmp_path / "out", []
    monkeypatch.setattr(files, "force_to_disk", lambda path: forced.append((path.name, target.exists())))
    for is_lasting, expected in ((True, [("a", False), ("b", False), ("inner", False)]), (False, [])):
        forced.clear()
        with files.whole_folder(target, "make room", is_lasting=is_lasting) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner/a").touch()
            (temporary / "b").touch()
        assert sorted(forced[: len(expected)]) == expected
        assert {name for name, _ in forced[len(expected) :]} <= {tmp_path.name}
    assert sorted(path.name for path in target.rglob("*")) == ["a", "b", "inner"]


def test_json_that_cannot_be_read_again_is_not_written(tmp_path: Path) -> None:
    path = write_json(tmp_path / "file", {"a": 1})
    for write in (lambda: write_json(path, float("nan")), lambda: append_json_lines(path, [{"a": float("inf")}])):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write()
    assert path.read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("cut", [1, 8, 10])
def test_a_torn_line_is_not_read_and_harms_no_other(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "rows" / "file"
    append_json_lines(path, [{"n": 1}])
    append_json_lines(path, [{"n": 2}, {"n": 3}])
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [{"n": 1}, {"n": 2}] if cut < 10 else [{"n": 1}]
    assert list(read_json_lines(path, "a row")) == kept
    cut_torn_line(path)
    append_json_lines(path, [{"n": 4}])
    assert list(read_json_lines(path, "a row")) == [*kept, {"n": 4}]


def test_a_line_that_is_refused_is_named(tmp_path: Path) -> None:
    append_json_lines(tmp_path / "file", [{"n": 1}, {"m": 1}])
    with pytest.raises(UserError, match=r"file, line 2: not a row: '\{\"m\": 1\}'; remove it"):
        list(read_json_lines(tmp_path / "file", "a row", lambda row: row["n"]))


def test_a_hub_id_is_what_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("owner/name-1.7B") and is_hub_id("owner/name")
    Path("owner/name").mkdir(parents=True)
    for path in ("owner/name", "name", "./owner/name", "~/name", "/owner/name", "a/b/c", "owner/rows.jsonl", "../x"):
        assert not is_hub_id(path), path


def test_the_home_of_nobody_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (expand("~/a"), expand("~no_one/a")) == (tmp_path / "a", Path("~no_one/a"))


def test_no_other_file_writes_files() -> None:
    """One place knows how a file is written: a second would forget the fsync, the rename, or the NaN."""
    written = re.compile(r"""\.write_text\(|\.replace\(self\.|fsync\(|\.open\("[aw]\"""")
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if written.search(path.read_text())}
    assert found == {"files.py"}
