"""The documentation: it builds with every link good, and says of keys and metrics what the code says."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dirl.data.problems import Problem
from dirl.eval.evaluate import EvalConfig
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.collector import RolloutConfig
from dirl.rl.train import RLConfig, RLEvalConfig, RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer

ROOT = Path(__file__).parents[1]
METRICS = ROOT / "docs" / "metrics.md"


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


def test_the_configuration_reference_is_fresh() -> None:
    run = subprocess.run(
        [sys.executable, "scripts/make_config_reference.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_keys_that_pages_name_exist() -> None:
    """Every key in the last column of the migration tables, and every section.key on any page."""
    keys = {key for schema in (SFTConfig, RLConfig, EvalConfig) for key in dotted_keys(schema)}
    sections = {key.split(".")[0] for key in keys if "." in key}
    rows = re.findall(r"^\|.*\|([^|]+)\|$", (ROOT / "docs" / "migration.md").read_text(), re.MULTILINE)
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


def dotted_keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(schema).items():
        yield prefix + name
        if dataclasses.is_dataclass(hint):
            yield from dotted_keys(typing.cast(type[Any], hint), f"{prefix}{name}.")


def documented() -> dict[str, re.Pattern[str]]:
    """Metrics of the page's tables; {name} stands for anything."""
    names = re.findall(r"^\| `([^`]+)` \|", METRICS.read_text(), re.MULTILINE)
    assert len(names) == len(set(names)) > 30
    return {name: re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(name))) for name in names}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every key that small SFT and RL runs log, with what can be switched on switched on."""
    folder = tmp_path_factory.mktemp("runs")
    model, tokenizer = tiny()
    data = SFTDataConfig(limit=40, num_heldout=16)
    sft = SFTConfig(output_dir=str(folder / "sft"), max_steps=2, global_batch_size=4, save_steps=1, data=data)
    SFTTrainer(sft, model=model, tokenizer=tokenizer).train()
    problems = [Problem(f"{n}+1=", str(n + 1), {}) for n in range(8)]
    rl = RLConfig(
        output_dir=str(folder / "rl"),
        max_steps=2,
        beta=0.01,
        eval_steps=1,
        save_steps=1,
        rollout=RolloutConfig(prompts_per_step=2, num_generations=4, max_completion_length=8, dynamic_sampling=False),
        reward=RewardConfig(functions=["accuracy", "length"]),
        eval=RLEvalConfig(path="task:noisy_sums", limit=4, num_samples=2),
    )
    RLTrainer(rl, model=model, tokenizer=tokenizer, problems=problems).train()
    rows = [json.loads(line) for run in ("sft", "rl") for line in (folder / run / "metrics.jsonl").open()]
    return {key for row in rows for key in row}


def test_every_logged_metric_is_documented(logged: set[str]) -> None:
    known = documented()
    assert sorted(key for key in logged if not any(p.fullmatch(key) for p in known.values())) == []


def test_every_documented_metric_is_logged(logged: set[str]) -> None:
    assert sorted(name for name, p in documented().items() if not any(map(p.fullmatch, logged))) == []


def test_data_formats_tell_the_truth_about_think_blocks() -> None:
    """Under a template like SDAR's the two forms of a row differ by the empty think block, and by nothing else."""
    from dirl.data.chat import decode
    from dirl.data.conversations import documents_from_row

    _, tokenizer = tiny()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows: list[dict[str, object]] = [{"messages": turns}, {"prompt": "Q", "completion": "A"}]
    (whole,), (plain,) = (documents_from_row(row, tokenizer, system_prompt="") for row in rows)
    assert whole.prompt_ids == plain.prompt_ids
    assert decode(tokenizer, whole.completion_ids) == "<think>\n\n</think>\n\n" + decode(
        tokenizer, plain.completion_ids
    )
