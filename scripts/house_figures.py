"""A checkout of dirl -> the figures of its house, one JSON line a checkout; they are read off its syntax trees.

python scripts/house_figures.py . ../an_older_checkout
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.architecture.imports import circles, count_floors, import_graph, within
from tests.architecture.source import SourceFile, read_folder
from tests.architecture.travels import travels

SMALL_FILE_LINES = 45
FAR = 5  # definitions that an argument passes


def figures(package: Path) -> dict[str, Any]:
    """The figures of a folder dirl/. Code lines are neither blank nor comment nor docstring."""
    files = read_folder(package)
    graph = import_graph(files)
    lines = {file.path: len(file.code_lines) for file in files}
    classes = [node.name for file in files for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)]
    far = {name: length for name, length in travels(files).items() if length > FAR}
    return {
        "files": len(files),
        "code_lines": sum(lines.values()),
        # An `__init__.py` without code only makes its folder a package.
        f"files_under_{SMALL_FILE_LINES}_code_lines": sum(0 < count < SMALL_FILE_LINES for count in lines.values()),
        "circles": len(circles(graph)),
        "floors_of_rollout": count_floors(within(graph, "rollout")),
        **lines_of("training", files),
        **lines_of("show", files),
        "code_lines_of_rl_update": lines.get("rl/update.py"),
        "config_classes": sum(name.endswith("Config") for name in classes),
        f"arguments_through_more_than_{FAR}": len(far),
        "definitions_they_pass": far,
    }


def lines_of(room: str, files: Sequence[SourceFile]) -> dict[str, int]:
    """All lines of a room, and its code lines."""
    inside = [file for file in files if file.room == room]
    return {
        f"lines_of_{room}": sum(len(file.text.splitlines()) for file in inside),
        f"code_lines_of_{room}": sum(len(file.code_lines) for file in inside),
    }


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="+", type=Path)
    for checkout in parser.parse_args().checkouts:
        print(json.dumps({"commit": commit_of(checkout), **figures(checkout / "dirl")}))


if __name__ == "__main__":
    main()
