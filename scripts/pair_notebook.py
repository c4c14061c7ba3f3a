"""examples/quickstart.py (cells in percent format) -> examples/quickstart.ipynb, without outputs.

    python scripts/pair_notebook.py          writes the notebook
    python scripts/pair_notebook.py --check  exit code 1 when it is not what the script says

The script is what people edit and review; Jupyter and VS Code open either.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"
MARKER = "# %%"


def notebook(script: str) -> dict[str, Any]:
    """The notebook of a percent-format script, nbformat 4.5."""
    cells: list[dict[str, Any]] = []
    for part in ("\n" + script).split("\n" + MARKER)[1:]:
        head, _, body = part.partition("\n")
        is_text = head.strip() == "[markdown]"
        lines = body.strip("\n").split("\n")
        if is_text:
            lines = [line.removeprefix("# ") if line != "#" else "" for line in lines]
        cell = {"cell_type": "markdown" if is_text else "code", "id": f"cell-{len(cells):02d}", "metadata": {}}
        cell["source"] = [line + "\n" for line in lines[:-1]] + lines[-1:]
        cells.append(cell if is_text else cell | {"execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = json.dumps(notebook(SCRIPT.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"
    target = SCRIPT.with_suffix(".ipynb")
    if not options.check:
        target.write_text(text, encoding="utf-8")
        return 0
    if not target.is_file() or target.read_text(encoding="utf-8") != text:
        print(
            f"{target.name} is not what {SCRIPT.name} says: run python scripts/{Path(__file__).name}", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
