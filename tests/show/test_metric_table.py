"""One table of metrics: what runs log has a row, the page documents every row, and a row is all that a view needs."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dirl.data.problems import Problem
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig, RLEvalConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.show.charts import PANELS, PICTURES, Panel, Picture
from dirl.show.metric import Metric, MetricTable
from dirl.show.metric_table import TABLE
from dirl.show.model_card import write_model_card
from dirl.show.pictures import plot_run
from dirl.show.report.write import write_report
from dirl.show.terminal import step_table
from tests.show.report.run_files import rl_row, write_run
from tests.show.report.test_write import data_of

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every key that small SFT and RL runs log, with what can be switched on switched on."""
    folder = tmp_path_factory.mktemp("runs")
    model, tokenizer = tiny()
    data = SFTDataConfig(limit=40, num_heldout=16)
    sft = SFTConfig(output_dir=str(folder / "sft"), max_steps=2, global_batch_size=4, save_steps=1, data=data)
    sft = replace(sft, stages=[{"from_step": 1, "model.block_length": 8}], autoregressive_weight=0.1)
    SFTTrainer(sft, model=model, tokenizer=tokenizer).train()
    problems = [Problem(f"{n}+1=", str(n + 1), {}) for n in range(8)]
    rl = RLConfig(
        output_dir=str(folder / "rl"),
        max_steps=2,
        objective=ObjectiveConfig(beta=0.01, importance_sampling_correction="token_truncate", advantage="gae"),
        eval_steps=1,
        save_steps=1,
        rollout=RolloutConfig(
            prompts_per_step=2,
            num_generations=4,
            max_completion_length=8,
            dynamic_sampling=False,
            threshold_policy=[0.5, 0.9],
        ),
        reward=RewardConfig(functions=["accuracy", "length"]),
        eval=RLEvalConfig(path="task:noisy_sums", limit=4, num_samples=2),
    )
    RLTrainer(rl, model=model, tokenizer=tokenizer, problems=problems).train()
    rollout = replace(rl.rollout, max_staleness=1, threshold_policy=[])
    objective = replace(rl.objective, likelihood="trajectory")
    ahead = replace(rl, output_dir=str(folder / "ahead"), rollout=rollout, objective=objective)
    RLTrainer(ahead, model=model, tokenizer=tokenizer, problems=problems).train()
    rollout = replace(rl.rollout, partial=True, oversampling=2.0, threshold_policy=[])
    parts = replace(rl, output_dir=str(folder / "parts"), rollout=rollout)
    RLTrainer(parts, model=model, tokenizer=tokenizer, problems=problems).train()
    runs = ("sft", "rl", "ahead", "parts")
    rows = [json.loads(line) for run in runs for line in (folder / run / "metrics.jsonl").open()]
    return {key for row in rows for key in row}


def test_every_logged_metric_has_a_row(logged: set[str]) -> None:
    assert sorted(name for name in logged if TABLE.row(name) is None) == []


def test_every_row_is_logged(logged: set[str]) -> None:
    found = {row.name for name in logged if (row := TABLE.row(name)) is not None}
    assert {row.name for row in TABLE.rows} - found == set()


def test_the_page_says_what_the_table_says() -> None:
    lines = re.findall(r"^\| `([^`]+)` \|([^|]*)\|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    documented = [(name, unit.strip(), meaning.strip()) for name, unit, meaning in lines]
    assert sorted(documented) == sorted((row.name, row.unit, row.meaning) for row in TABLE.rows)


def test_no_row_hides_another_and_each_chart_has_rows() -> None:
    assert [row.name for row in TABLE.rows if TABLE.row(row.name) is not row] == []
    assert [row.name for row in TABLE.rows if "{" in row.name and (row.column or row.headline)] == []
    assert {row.panel for row in TABLE.rows} - {""} == {panel.title for panel in PANELS}
    assert {row.picture for row in TABLE.rows} - {""} == {picture.file_name for picture in PICTURES}
    assert len({picture.file_name for picture in PICTURES}) == len(PICTURES)
    headlines = [row.headline for row in TABLE.headlines()]
    assert headlines == list(range(1, len(headlines) + 1))


@pytest.mark.parametrize("place", ["panel", "picture"])
def test_a_chart_that_is_not_there_is_named(place: str) -> None:
    with pytest.raises(ValueError, match=r"toy/score: no chart .*'Toys'"):
        MetricTable((Metric("toy/score", "", "", **{place: "Toys"}),))


def test_sums_are_left_out_where_their_parts_are() -> None:
    total, part = Metric("total", "s", "", part="phase"), Metric("phase", "s", "")
    table = MetricTable((total, part))
    assert [name for name, _ in table.plotted(["total"], lambda _: True)] == ["total"]
    assert [name for name, _ in table.plotted(["total", "phase"], lambda _: True)] == ["phase"]


def test_a_new_metric_is_one_row(tmp_path: Path) -> None:
    """It stands in charts of its own and in the terminal, the tiles and the card."""
    toy = Metric("toy/{kind}", "points", "how well it plays", panel="Toys", picture="toys")
    best = Metric("best", "points", "the best", "Toys", "toys", column="best toy", tile="best toy", headline=99)
    charts = (*PANELS, Panel("Toys", "points")), (*PICTURES, Picture(file_name="toys", title="Toys", y_label="points"))
    table = MetricTable((*TABLE.rows, toy, best), *charts)
    rows = [rl_row(step) | {"toy/car": 2.5, "best": step + 0.25} for step in (1, 2)]
    run = write_run(tmp_path / "run", rows, output_dir="toys")
    record: dict[str, Any] = json.loads((run / "run.json").read_text()) | {"hardware": {"gpus": []}}
    (run / "run.json").write_text(json.dumps(record))

    console = Console(width=300, record=True, file=io.StringIO())
    console.print(step_table(1, 2, rows[0], table))
    assert "best toy" in (text := console.export_text()) and "1.25" in text
    (page,) = data_of(write_report(run, table=table).read_text())["runs"]
    assert page["charts"][-1]["title"] == "Toys" and ["best toy", "2.25"] in page["tiles"]
    assert [series["name"] for series in page["charts"][-1]["series"]] == ["toy/car", "best"]
    assert plot_run(run, table)[-1].name == "toys.png"
    card = write_model_card(run, run, "rl", ("block-diffusion", "sdar"), table)
    assert card is not None and "| `best` | 2.25 (step 2) |" in card.read_text()
