"""The documentation: it builds with every link good, and says of keys what the code says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dirl.eval.eval_config import EvalConfig
from dirl.model.tiny import tiny
from dirl.rl.rl_config import RLConfig
from dirl.rollout.server.wire import ServeConfig
from dirl.sft.train import SFTConfig

ROOT = Path(__file__).parents[1]


def test_the_site_builds_and_its_links_hold(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs mkdocs-material: pip install 'dirl[dev]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    pages = sorted((tmp_path / "site").rglob("index.html"))
    assert len(pages) >= 14
    for page in pages:  # readable offline
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert [url for url in loaded if "canonical" not in url and not url.startswith("https://fonts")] == []


@pytest.mark.parametrize("script", ["make_config_reference.py", "make_family_table.py"])
def test_generated_pages_are_fresh(script: str) -> None:
    run = subprocess.run([sys.executable, f"scripts/{script}", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_keys_that_pages_name_exist() -> None:
    """Every key in the last column of the migration tables of keys, and every section.key on any page."""
    keys = {key for schema in (SFTConfig, RLConfig, EvalConfig) for key in dotted_keys(schema)}
    sections = {key.split(".")[0] for key in keys if "." in key}
    tables_of_keys = (ROOT / "docs" / "migration.md").read_text().partition("### Python")[0]
    rows = re.findall(r"^\|.*\|([^|]+)\|$", tables_of_keys, re.MULTILINE)
    named = {name for cell in rows for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)(?:=[^`]*)?`", cell)}
    assert len(named) > 25
    # A key without its section (top_k) and values in backticks are known too.
    known = keys | {key.split(".")[-1] for key in keys} | {"sft", "rl", "greedy", "main"}
    assert sorted(name for name in named if name not in known) == []
    for page in (ROOT / "docs").glob("*.md"):
        if page.name == "migration.md":  # its first column holds DiRL's keys
            continue
        dotted = re.findall(r"`((?:[a-z_]+)\.[a-z_]+)(?:=[^`]*)?`", page.read_text())
        assert sorted(key for key in dotted if key.split(".")[0] in sections and key not in keys) == [], page.name


def test_every_key_that_moved_is_told() -> None:
    page = (ROOT / "docs" / "migration.md").read_text()
    for schema in (SFTConfig, RLConfig, EvalConfig, ServeConfig):
        for old, new in schema.ALIASES.items():
            assert f"| `{old}` | `{new}` |" in page


def test_the_files_that_pages_name_exist() -> None:
    """All but those of the migration page, which also names what is gone."""
    named: set[str] = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        if page.name != "migration.md":
            named |= set(
                re.findall(r"(?<![\w./-])(?:dirl|scripts|tests|examples|configs)/[\w/]+\.\w+", page.read_text())
            )
    assert len(named) > 25
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []


def dotted_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from dotted_keys(typing.cast(type[Any], hint), f"{prefix}{name}.")


def test_data_formats_tell_the_truth_about_think_blocks() -> None:
    """Under a template like SDAR's the two forms of a row differ by the empty think block, and by nothing else."""
    from dirl.data.chat import decode
    from dirl.data.conversations import document_of

    _, tokenizer = tiny()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows: list[dict[str, object]] = [{"messages": turns}, {"prompt": "Q", "completion": "A"}]
    whole, plain = (document_of(row, 0, tokenizer, system_prompt="") for row in rows)
    assert whole.prompt_ids == plain.prompt_ids
    assert decode(tokenizer, whole.completion_ids) == "<think>\n\n</think>\n\n" + decode(
        tokenizer, plain.completion_ids
    )
