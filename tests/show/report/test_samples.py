"""Files of completions -> what the player plays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dirl.show.report import samples as module
from dirl.show.report.samples import choose_samples
from tests.show.report.run_files import completion_row, write_run


def test_best_and_worst_of_groups_that_differ_come_first(tmp_path: Path) -> None:
    equal = [completion_row(0, 1.0), completion_row(0, 1.0)]
    mixed = [completion_row(1, 0.5, text="a"), completion_row(1, 0.0), completion_row(1, 2.0)]
    write_run(tmp_path, [], {7: [*equal, *mixed]})
    found = choose_samples(tmp_path, None, 0)
    assert [(sample["label"], sample["reward"]) for sample in found] == [
        ("step 7, group 1: best, reward 2", 2.0),
        ("step 7, group 1: worst, reward 0", 0.0),
        ("step 7, group 0: best, reward 1", 1.0),
        ("step 7, group 0: worst, reward 1", 1.0),
    ]
    assert found[0]["confidence"] == [0.5] * 10 and found[0]["rewards"] == {"accuracy": 2.0, "length": None}
    assert (found[0]["prompt_length"], found[0]["block_length"], len(found[0]["texts"])) == (6, 4, 10)


def test_files_are_spread_over_the_run_newest_first(tmp_path: Path) -> None:
    write_run(tmp_path, [], {step: [completion_row(0, 1.0)] for step in range(1, 101)})
    steps = [int(sample["label"].split(",")[0].split()[1]) for sample in choose_samples(tmp_path, None, 0)]
    assert steps == [100, 80, 60, 41, 21, 1]


def test_rows_without_texts_are_decoded_or_numbered(tmp_path: Path) -> None:
    bare = completion_row(0, 1.0, token_texts=None, block_length=0, logprobs=None)
    write_run(tmp_path, [], {1: [bare]})
    assert choose_samples(tmp_path, None, 0) == []  # nobody knows the blocks
    (numbered,) = choose_samples(tmp_path, None, 4)
    assert numbered["texts"][:2] == ["<0>", "<1>"] and numbered["confidence"] is None
    (decoded,) = choose_samples(tmp_path, lambda ids: [str(token * 2) for token in ids], 4)
    assert decoded["texts"][:3] == ["0", "2", "4"]


def test_a_torn_file_gives_its_whole_groups(tmp_path: Path) -> None:
    rows = [completion_row(0, 1.0), completion_row(0, 0.0), completion_row(1, 1.0)]
    write_run(tmp_path, [], {1: rows})
    file = tmp_path / "completions" / "step_000001.jsonl"
    file.write_text(file.read_text() + json.dumps(rows[0])[:50])
    assert [sample["label"].split(": ")[0] for sample in choose_samples(tmp_path, None, 0)] == ["step 1, group 0"] * 2


def test_long_completions_are_cut_at_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS", 15)
    write_run(tmp_path, [], {1: [completion_row(0, 1.0), completion_row(0, 0.0)]})
    whole, cut = choose_samples(tmp_path, None, 0)
    assert (len(whole["texts"]), whole["is_cut"]) == (10, False)
    assert (len(cut["texts"]), len(cut["steps"]), len(cut["confidence"]), cut["is_cut"]) == (2, 2, 2, True)


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = completion_row(0, 1.0)
    monkeypatch.setattr(module, "BYTES_PER_FILE", 3 * len(json.dumps(row)))
    write_run(tmp_path, [], {1: [completion_row(group, 1.0) for group in range(1000)]})
    assert len(choose_samples(tmp_path, None, 0)) == 1
