"""scripts/house_figures.py: what it counts, on packages small enough to count by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.imports import count_floors
from tests.architecture.source import SourceFile
from tests.architecture.travels import travels

SCRIPT = Path(__file__).parents[2] / "scripts/house_figures.py"
SMALL, LARGE = "x = 1\n" * 44, "x = 1\n" * 45


def test_figures_of_a_checkout(tmp_path: Path) -> None:
    texts = {
        "__init__.py": '"""A package."""\n',
        "rl/update.py": f"# why\n{SMALL}",
        "rollout/a.py": f"from dirl.rollout import b, c\n{LARGE}",
        "rollout/b.py": f"from dirl.rollout import c\n{LARGE}",
        "rollout/c.py": f"from dirl.rollout import d\n{LARGE}",
        "rollout/d.py": f"from dirl.rollout import c\nclass RunConfig: ...\n{LARGE}",
        "show/table.py": f'"""Rows."""\n\n{LARGE}',
    }
    for path, text in texts.items():
        (tmp_path / "dirl" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "dirl" / path).write_text(text)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    run = subprocess.run([sys.executable, SCRIPT, tmp_path], check=True, capture_output=True, text=True)
    figures = json.loads(run.stdout)
    assert len(figures.pop("commit")) >= 7
    assert figures == {
        "files": 7,
        "code_lines": 44 + 46 + 46 + 46 + 47 + 45,
        "files_under_45_code_lines": 1,
        "circles": 1,
        "floors_of_rollout": 3,  # a on b on the circle of c and d
        "lines_of_training": 0,
        "code_lines_of_training": 0,
        "lines_of_show": 47,
        "code_lines_of_show": 45,
        "code_lines_of_rl_update": 44,
        "config_classes": 1,
        "arguments_through_more_than_5": 0,
        "definitions_they_pass": {},
    }


@pytest.mark.parametrize(
    ("graph", "floors"),
    [
        ({}, 0),
        ({"a": []}, 1),
        ({"a": ["b", "c"], "b": ["c"], "c": []}, 3),
        ({"a": ["b"], "b": ["a"]}, 1),
        ({"a": ["b"], "b": ["c"], "c": ["b", "d"], "d": []}, 3),
    ],
)
def test_floors(graph: dict[str, list[str]], floors: int) -> None:
    assert count_floors(graph) == floors


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("def f(x): return x", 1),
        ("def f(x): g(x=x)\ndef g(x): h(1, x)\ndef h(y, x): ...", 3),
        ("def f(x): g(x)\ndef g(y): ...", 1),
        ("def f(x): g(x + 1)\ndef g(x): ...", 1),
        ("def f(x): m.g(x)\nclass C:\n    def g(self, x): ...", 2),
        ("def f(x): return partial(g, 1, x)\ndef g(y, x): ...", 2),
        ("def f(x): C(x)\nclass C:\n    x: int\n    def g(self): h(self.x)\ndef h(x): ...", 3),
        ("def f(x): C(x=x)\nclass C:\n    def __init__(self, x): ...\n    def g(self): h(x=self.x)\ndef h(x): ...", 3),
        ("def f(x): g(x)\ndef g(x): f(x)\ndef h(x): f(x)", 2),
    ],
)
def test_argument_travels_as_far_as_its_name(text: str, length: int) -> None:
    assert travels([SourceFile("a.py", text)])["x"] == length
