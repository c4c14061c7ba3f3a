"""Model cards, and that the Hub cannot end a run."""

from __future__ import annotations

import json
import logging
import unicodedata
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from dirl.rl.rl_config import RLConfig
from dirl.sft.train import SFTConfig
from dirl.show import model_card
from dirl.show.model_card import MARK, finish_model, push_model, write_model_card

TAGS = ("masked-diffusion", "llada")  # of a model
CONFIG: dict[str, Any] = {
    "output_dir": "outputs/tiny/rl",
    "run_name": "a | b <script>",
    "max_steps": 60,
    "learning_rate": 1e-6,
    "objective": {"likelihood": "trajectory"},
    "model": {"path": "JetLM/SDAR-1.7B-Chat"},
    "data": {"path": "data/problems.jsonl"},
    "rollout": {"num_generations": 8},
    "reward": {"functions": ["accuracy", "speed"]},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "final").mkdir()
    record = {"date": "2026-01-02", "git_commit": "abc", "git_dirty": True, "versions": {"torch": "2.13"}}
    record |= {"hardware": {"gpus": []}, "config": CONFIG}
    (tmp_path / "run.json").write_text(json.dumps(record))
    rows = [{"step": 10, "reward": 0.5, "eval/accuracy": 0.625}, {"step": 20, "reward": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_card_says_what_it_was_trained_on_and_how_it_did(run: Path) -> None:
    path = write_model_card(run / "final", run, "rl", TAGS)
    assert path is not None
    _, front, body = path.read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dirl", "masked-diffusion", "llada", "rl"],
        "base_model": "JetLM/SDAR-1.7B-Chat",
    }
    assert body.startswith(MARK) and "A masked-diffusion language model" in body
    assert "20 optimizer steps" in body
    assert "# a \\| b &lt;script>" in body
    assert "| `reward` | 0.75 (step 20) |" in body and "| `eval/accuracy` | 0.625 (step 10) |" in body
    assert "| `objective.likelihood` | trajectory |" in body and "| `rollout.num_generations` | 8 |" in body
    assert "- data: `data/problems.jsonl`" in body and "- rewards: `accuracy speed`" in body
    assert "- commit: `abc with changes`" in body


def test_a_setting_commands_no_terminal_that_shows_the_card(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["config"] |= {"data": {"path": "clear\x1b[2J\x9b1m"}, "run_name": "title\x9d0;mine\x07"}
    (run / "run.json").write_text(json.dumps(record))
    path = write_model_card(run / "final", run, "rl", TAGS)
    assert path is not None
    text = path.read_text()
    assert not [char for char in text if unicodedata.category(char) == "Cc" and char != "\n"]
    assert "clear\u241b[2J" in text


def test_a_card_names_every_source(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    sources = [{"path": "owner/name:main@v1", "weight": 2}, {"path": "data/mine.jsonl"}, {"path": "owner/other"}]
    record["config"]["data"] = {"path": "task:noisy_sums", "sources": sources}
    (run / "run.json").write_text(json.dumps(record))
    path = write_model_card(run / "final", run, "rl", TAGS)
    assert path is not None
    _, front, body = path.read_text().split("---\n", 2)
    assert yaml.safe_load(front)["datasets"] == ["owner/name", "owner/other"]
    assert "- data: `owner/name:main@v1, data/mine.jsonl, owner/other`" in body


def test_every_setting_it_names_is_a_key_of_a_run() -> None:
    """A key that moves would leave the card without a word."""
    known = {field.name for schema in (SFTConfig, RLConfig) for field in fields(schema)}
    assert {*model_card._KEYS, *model_card._SECTIONS} <= known


def test_ours_is_renewed_and_somebody_elses_stays(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    readme = run / "final" / "README.md"
    assert write_model_card(run / "final", run, "sft", TAGS) == readme
    first = readme.read_text()
    assert write_model_card(run / "final", run, "rl", TAGS) == readme and readme.read_text() != first
    readme.write_text("# my own words")
    assert write_model_card(run / "final", run, "rl", TAGS) is None
    assert readme.read_text() == "# my own words" and "is not dirl's and stays" in caplog.text


def test_nothing_here_ends_a_run(run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", broken)
    (run / "run.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        finish_model(run / "final", run, "rl", TAGS, "owner/name")
    assert "no model card was written" in caplog.text
    assert "was not pushed to owner/name and lies in" in caplog.text and "ConnectionError: no route" in caplog.text


def test_a_push_creates_a_private_repository(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **kw: calls.append((name, kw)))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **kw: calls.append(kw))
    assert push_model(run / "final", "owner/name")
    assert calls == [
        ("owner/name", {"private": True, "exist_ok": True}),
        {"repo_id": "owner/name", "folder_path": str(run / "final")},
    ]
