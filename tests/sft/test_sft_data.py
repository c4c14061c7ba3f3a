"""What an SFT run learns from: sources, held-out rows, rows that ask the same, epochs, and exact resume among them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dirl.data.conversations import Document
from dirl.data.data_config import DataSource
from dirl.data.document_source import JoinedDocuments, ListedDocuments, open_documents
from dirl.data.tasks import tiny_tokenizer
from dirl.errors import UserError
from dirl.model.tiny import tiny
from dirl.sft.sft_data import SFTDataConfig, split_documents
from dirl.sft.train import SFTConfig, SFTTrainer

FIRST = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(30)]
SECOND = [{"instruction": f"say {n}", "output": [{"type": "text", "text": "so: "}, {"type": "text", "text": str(n)}]}
          for n in range(10)]  # fmt: skip
COLUMNS = {"prompt": "instruction", "completion": "output"}


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sources(folder: Path, *weights: float) -> list[dict[str, object]]:
    paths = write(folder / "first.jsonl", FIRST), write(folder / "second.jsonl", SECOND)
    told = [{"path": path, "weight": weight} for path, weight in zip(paths, weights, strict=True)]
    return [told[0], {**told[1], "columns": COLUMNS}]


def config(folder: Path, **changes: Any) -> SFTConfig:
    data = SFTDataConfig(sources=sources(folder, 1.0, 3.0), num_heldout=4)
    return SFTConfig(**{"output_dir": str(folder / "run"), "global_batch_size": 4, "data": data, **changes})


def trainer(config: SFTConfig) -> SFTTrainer:
    model, tokenizer = tiny()
    return SFTTrainer(config, model=model, tokenizer=tokenizer)


def documents(*of_sources: list[str]) -> JoinedDocuments:
    """Sources of texts, one document each."""
    return JoinedDocuments(
        [ListedDocuments([Document([ord(c) for c in t], [1]) for t in texts]) for texts in of_sources]
    )


def test_two_sources_are_drawn_by_weight_and_resume_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = trainer(config(tmp_path / "whole", max_steps=6))
    drawn: list[int] = []
    step = whole.step
    whole.step = lambda: (step(), drawn.extend(whole._last_taken))[0]  # type: ignore[method-assign, func-returns-value]
    whole.train()
    assert sum(index < 30 for index in drawn) == 6 and len(drawn) == 24
    trainer(config(tmp_path / "parts", max_steps=3, lr_scheduler_type="constant")).train()
    resumed = trainer(config(tmp_path / "parts", max_steps=6, lr_scheduler_type="constant"))
    taken: list[int] = []
    again = resumed.step
    resumed.step = lambda: (again(), taken.extend(resumed._last_taken))[0]  # type: ignore[method-assign, func-returns-value]
    resumed.train()
    assert taken == drawn[12:]
    assert resumed.stream.state_dict()["given"] == whole.stream.state_dict()["given"] == [6, 18]


def test_renamed_columns_and_text_parts_are_the_same_documents(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    plain = [{"prompt": row["instruction"], "completion": "so: " + str(n)} for n, row in enumerate(SECOND)]
    ours = open_documents(DataSource(path=write(tmp_path / "a.jsonl", SECOND), columns=COLUMNS), tokenizer)
    theirs = open_documents(DataSource(path=write(tmp_path / "b.jsonl", plain)), tokenizer)
    assert [ours[i] for i in range(10)] == [theirs[i] for i in range(10)]
    assert list(ours.questions()) == [(n + 1, f"say {n}") for n in range(10)]
    assert [ours.question(row) for row in range(10)] == [text for _, text in ours.questions()]


def test_rows_are_kept_apart_by_their_question() -> None:
    told = documents([f"question {n // 2}" for n in range(80)], [f"question {n}" for n in range(30, 50)])
    split = split_documents(told, SFTDataConfig(heldout=0.3, decontaminate="off"), 0)
    apart = {told.question(row) for row in split.heldout}
    trained = {told.sources[s].question(i) for s, own in enumerate(split.trained) for i in own}
    assert apart and trained and apart.isdisjoint(trained)
    assert len(split.heldout) + sum(map(len, split.trained)) == 100


@pytest.mark.parametrize("mode", ["report", "drop", "off"])
def test_rows_that_ask_what_held_out_ones_do(mode: Any) -> None:
    told = documents([f"question {n // 2}" for n in range(40)], ["other"] * 2 + ["question 3", "more", "words"])
    split = split_documents(told, SFTDataConfig(num_heldout=12, decontaminate=mode), 0)
    asked = {told.question(row) for row in split.heldout}
    every = [(s, i) for s in (0, 1) for i in range(len(told.sources[s])) if told.firsts[s] + i not in split.heldout]
    same = [(s, i) for s, i in every if told.sources[s].question(i) in asked]
    trained = [(s, i) for s, own in enumerate(split.trained) for i in sorted(own)]
    assert trained == [pair for pair in every if mode != "drop" or pair not in same]
    assert same and len(split.overlaps.found) == (0 if mode == "off" else len(same))
    assert split.overlaps.num_rows == len(every)


def test_every_turn_of_a_row_is_on_the_same_side(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
    rows = [{"messages": [{"role": "user", "content": str(n)}, *turns[1:]]} for n in range(20)]
    told = JoinedDocuments([open_documents(DataSource(path=write(tmp_path / "r.jsonl", rows)), tiny_tokenizer())])
    split = split_documents(told, SFTDataConfig(heldout=4), 0)
    assert len(split.heldout) == 12 and len(split.trained[0]) == 48
    assert {index // 3 for index in split.heldout}.isdisjoint(index // 3 for index in split.trained[0])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"num_heldout": 6}, r"data\.num_heldout=6 leaves none of \d documents of the list"),
        ({"heldout": 6}, r"data\.heldout=6 leaves none of \d documents"),
        ({"heldout": 1e-9}, r"data\.heldout=1e-09 keeps none of 6 rows apart; raise it"),
        ({"num_heldout": 3, "decontaminate": "drop"}, r"num_heldout=3 with data\.decontaminate=drop leaves none of 6"),
    ],
)
def test_nothing_left_is_one_line(data: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        split_documents(documents(["same"] * 6), SFTDataConfig(**data), 0)


def test_epochs_are_counted_in_documents_of_all_sources(tmp_path: Path) -> None:
    epochs = config(tmp_path, num_train_epochs=2.5, data=SFTDataConfig(sources=sources(tmp_path, 0, 0), num_heldout=4))
    counted = trainer(epochs)
    assert counted.config.max_steps == counted.learner.config.max_steps == 23  # 36 * 2.5 / 4, rounded up
    assert counted.stages[0].config.num_train_epochs == 0
    drawn = [i for _ in range(9) for i in counted.stream.take(4, counted._fit).indices]
    assert sorted([*drawn, *counted.split.heldout]) == list(range(40))
    staged = replace(epochs, stages=[{"from_step": 3, "global_batch_size": 8}])
    with pytest.raises(UserError, match=r"num_train_epochs=2\.5: a stage changes global_batch_size; give max_steps"):
        trainer(staged)
    texts = write(tmp_path / "t.jsonl", [{"text": "a b"}] * 9)
    with pytest.raises(UserError, match=r"num_train_epochs counts documents, and texts are cut"):
        trainer(replace(epochs, data=SFTDataConfig(path=texts, num_heldout=1)))
