"""What is on disk after a kill, after a change of configuration, and after more was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dirl.config import ConfigError
from dirl.eval.results import Sample
from dirl.eval.sample_store import SampleStore
from dirl.rollout.engine import Completion

SETTINGS: dict[str, object] = {"seed": 0, "sampling.temperature": 1.0, "problems.A": "aa", "reward.functions": ["x"]}


def judged(problem: int, sample: int) -> tuple[Sample, Completion]:
    completion = Completion(
        prompt_ids=[1],
        token_ids=[5, 6, problem],
        step_map=[1, 1, 2],
        logprobs=None,
        completion_length=2,
        finish_reason="stop",
        num_denoising_steps=2,
        text="é \\boxed{1}\n",
    )
    made = Sample(
        problem=problem,
        sample=sample,
        correct=sample == 0,
        answer="1",
        completion_length=2,
        num_denoising_steps=2,
        finish_reason="stop",
        seconds=0.5,
    )
    return made, completion


def filled(directory: Path) -> list[tuple[Sample, Completion]]:
    """A directory with four samples of A, dynamic."""
    chunk = [judged(problem, sample) for problem in (0, 1) for sample in (0, 1)]
    store = SampleStore(directory, SETTINGS)
    store.append("A", "dynamic", chunk[:3])
    store.append("A", "dynamic", chunk[3:])
    return chunk


def test_round_trip(tmp_path: Path) -> None:
    chunk = filled(tmp_path / "new" / "directory")
    store = SampleStore(tmp_path / "new" / "directory", SETTINGS)
    assert store.load("A", "dynamic") == {(sample.problem, sample.sample): sample for sample, _ in chunk}
    assert store.load("A", "static") == store.load("B", "dynamic") == {}


def test_a_line_holds_what_is_needed_to_judge_and_replay_it(tmp_path: Path) -> None:
    filled(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert rows[2] == {
        "dataset": "A",
        "mode": "dynamic",
        "problem": 1,
        "sample": 0,
        "correct": True,
        "answer": "1",
        "completion_length": 2,
        "num_denoising_steps": 2,
        "finish_reason": "stop",
        "seconds": 0.5,
        "marks": {},
        "text": "é \\boxed{1}\n",
        "token_ids": [5, 6, 1],
        "step_map": [1, 1, 2],
    }


@pytest.mark.parametrize("cut", [1, 10, 150])
def test_a_line_cut_short_is_dropped(cut: int, tmp_path: Path) -> None:
    chunk = filled(tmp_path)
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    assert len(whole.splitlines()[-1]) > cut
    path.write_bytes(whole[:-cut])
    store = SampleStore(tmp_path, SETTINGS)
    assert sorted(store.load("A", "dynamic")) == [(0, 0), (0, 1), (1, 0)]
    store.append("A", "dynamic", chunk[3:])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "broken", ['{"dataset": "A", "mod', '{"dataset": "A"}', "[1]", '{"dataset": "A", "mode": NaN}']
)
def test_a_broken_line_in_the_middle_is_an_error(broken: str, tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], broken, *lines[2:], ""]))
    with pytest.raises(ValueError, match=r"samples.jsonl, line 2: not a sample: .*; remove it"):
        SampleStore(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling.temperature": 0.5}, "sampling.temperature: 1.0 there, 0.5 here"),
        ({"problems.A": "bb"}, "problems.A: 'aa' there, 'bb' here"),
        ({"reward.functions": ["x", "y"]}, "reward.functions"),
    ],
)
def test_another_configuration_is_refused_by_name(change: dict[str, object], named: str, tmp_path: Path) -> None:
    filled(tmp_path)
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(ConfigError) as error:
        SampleStore(tmp_path, {**SETTINGS, **change})
    assert named in str(error.value)
    assert "choose another output_dir, or drop them with overwrite=true" in str(error.value)
    assert "\n" not in str(error.value)
    assert (tmp_path / "samples.jsonl").read_bytes() == before


def test_overwrite_drops_only_what_does_not_fit(tmp_path: Path) -> None:
    filled(tmp_path)
    assert len(SampleStore(tmp_path, SETTINGS, overwrite=True).load("A", "dynamic")) == 4
    changed = {**SETTINGS, "seed": 1}
    assert SampleStore(tmp_path, changed, overwrite=True).load("A", "dynamic") == {}
    assert SampleStore(tmp_path, changed).load("A", "dynamic") == {}  # the header changed with it
    with pytest.raises(ConfigError, match="seed: 1 there, 0 here"):
        SampleStore(tmp_path, SETTINGS)


def test_data_sets_may_be_added_one_after_another(tmp_path: Path) -> None:
    filled(tmp_path)
    other = {key: value for key, value in SETTINGS.items() if key != "problems.A"} | {"problems.B": "b"}
    SampleStore(tmp_path, other).append("B", "dynamic", [judged(0, 0)])
    with pytest.raises(ConfigError, match=r"problems\.A"):  # remembered, though the last run did not ask for A
        SampleStore(tmp_path, {**other, "problems.A": "changed"})
    store = SampleStore(tmp_path, {**SETTINGS, "problems.B": "b"})
    assert (len(store.load("A", "dynamic")), len(store.load("B", "dynamic"))) == (4, 1)


def test_foreign_samples_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(json.dumps({"mine": 1}) + "\n")
    with pytest.raises(ConfigError, match=r"no samples_header.json"):
        SampleStore(tmp_path, SETTINGS)
    assert "mine" in (tmp_path / "samples.jsonl").read_text()
