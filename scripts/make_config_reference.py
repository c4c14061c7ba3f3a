"""The dataclasses -> docs/configuration.md: every key with its type, default and comment.

python scripts/make_config_reference.py          writes the page
python scripts/make_config_reference.py --check  exit code 1 when it is not what the dataclasses say
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dirl.config import bounds_in_words, marks_of
from dirl.console.difficulty import DifficultyConfig
from dirl.eval.eval_config import EvalConfig
from dirl.rl.rl_config import RLConfig
from dirl.rollout.server.wire import ServeConfig
from dirl.sft.train import SFTConfig

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"
SCHEMAS = {"sft": SFTConfig, "rl": RLConfig, "eval": EvalConfig, "difficulty": DifficultyConfig, "serve": ServeConfig}
HEAD = """\
# Configuration

*Generated from the dataclasses by `scripts/make_config_reference.py`; a test fails when it is stale.*

`dirl sft|rl|eval|serve CONFIG key=value ...` reads a YAML file and dotted overrides, `dirl difficulty MODEL DATA OUT
key=value ...` the latter alone. Precedence: the defaults below,
then the YAML file (where `${oc.env:NAME,default}` reads an environment variable), then the command line. An unknown
key, a wrong type or an impossible value is one line that names it, and exit code 2. The resolved configuration of a run
is written to `output_dir/config.yaml`; running that file again repeats the run.

A key that moved keeps working under its old name, and says so. A path may begin with `~`. Lists are written `[a,b]`,
and a dictionary's entry as `reward.parameters.cosine.longest_right=0.5`.
"""


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for command, schema in SCHEMAS.items():
        parts.append(f"\n## `dirl {command}`\n\n{first_line(schema)}\n")
        parts.append("\n".join(table(schema)) + "\n")
        for name, section in sections(schema):
            parts.append(f"\n### `{name}.*` of `dirl {command}`\n\n{first_line(section)}\n")
            parts.append("\n".join(table(section, f"{name}.", default_of(schema, name))) + "\n")
    return "\n".join(parts)


def table(schema: type[Any], prefix: str = "", default: Any = None) -> Iterator[str]:
    """Rows of one dataclass, without its sections."""
    hints, comments, marks = typing.get_type_hints(schema), comments_of(schema), marks_of(schema)
    default = default if default is not None else schema()
    yield "| key | type | default | |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(schema):
        if not dataclasses.is_dataclass(hints[field.name]):
            kind = ", ".join(filter(None, (type_name(hints[field.name]), bounds_in_words(marks[field.name]))))
            value = written(getattr(default, field.name))
            cells = (f"`{prefix}{field.name}`", kind, value, comments.get(field.name, ""))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def sections(schema: type[Any]) -> Iterator[tuple[str, type[Any]]]:
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            yield name, typing.cast(type[Any], hint)


def default_of(schema: type[Any], name: str) -> Any:
    return getattr(schema(), name)


def first_line(schema: type[Any]) -> str:
    return (inspect.getdoc(schema) or "").split("\n")[0]


def type_name(hint: Any) -> str:
    """A type as people write it in YAML."""
    if typing.get_origin(hint) is Literal:
        return " ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, dict):
        inner = ", ".join(type_name(part) for part in typing.get_args(hint))
        return f"{typing.get_origin(hint).__name__} of {inner}" if typing.get_origin(hint) is list else "mapping"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def written(value: Any) -> str:
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "(empty)" if value == "" else f"`{value}`"


def comments_of(schema: type[Any]) -> dict[str, str]:
    """Each field's comment, from the last class that declares it with one."""
    found: dict[str, str] = {}
    for owner in reversed(schema.__mro__):
        if dataclasses.is_dataclass(owner):
            found |= own_comments(typing.cast(type[Any], owner))
    return found


def own_comments(schema: type[Any]) -> dict[str, str]:
    """The comments at the end of a field's lines, or else on the lines above it."""
    source = textwrap.dedent(inspect.getsource(schema))
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found, end = {}, definition.lineno
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, beside = range(end + 1, node.lineno), range(node.lineno, (node.end_lineno or node.lineno) + 1)
            texts = [" ".join(comments[line] for line in lines if line in comments) for lines in (beside, above)]
            if any(texts):
                found[node.target.id] = texts[0] or texts[1]
        end = node.end_lineno or node.lineno
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = reference()
    if not options.check:
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text:
        print("docs/configuration.md is stale: run python scripts/make_config_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
