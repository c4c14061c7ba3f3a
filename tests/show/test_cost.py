"""Costs from a run's files, against sums done by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dirl.show.cost import brief, clock, cost_of, cost_table

SECONDS = {"step": 10.0, "rollout": 4.0, "reward": 1.0, "train": 3.0, "update_weights": 0.5, "save": 2.0}
RL_ROWS: list[dict[str, Any]] = [
    {"step": step, "num_tokens": 1000, "num_completion_tokens": 100, "timing_s/eval": 6.0 if step == 4 else None}
    | {f"timing_s/{phase}": seconds for phase, seconds in SECONDS.items()}
    for step in (1, 2, 4)  # step 3 was not logged: it counts like step 4
]


def gpu_record(**changes: Any) -> dict[str, Any]:
    """Of two processes, each on an H100, that train 1e9 weights of layers in bfloat16."""
    config = {"bf16": True, "rollout": {}, "max_steps": 4}
    hardware = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "cpu_cores": 64}
    size = {"parameters": 2_000_000_000, "layer_weights_per_token": 1_000_000_000}
    return {"config": config, "hardware": hardware, "num_processes": 2, "model": size} | changes


def test_phases_tokens_and_rates_of_an_rl_run() -> None:
    cost = cost_of(RL_ROWS, gpu_record())
    phases = {
        "rollout": 16.0,
        "reward": 4.0,
        "update_weights": 2.0,
        "train": 12.0,
        "other": 6.0,
        "eval": 6.0,
        "save": 6.0,
    }
    assert cost.seconds == pytest.approx(phases)
    assert (cost.total_seconds, cost.trained, cost.rolled_out) == (52.0, 4000, 400)
    assert (cost.train_rate(), cost.rollout_rate()) == (4000 / 12 / 2, 400 / 16 / 2)
    assert cost.device_hours(3600.0) == "2.00 GPU-h"
    assert cost.mfu == pytest.approx(6 * 1e9 * 4000 / (12.0 * 2 * 989e12))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"config": {"bf16": True, "lora": {"r": 8}}}, 4 / 6),  # no gradient of the weights themselves
        ({"config": {"bf16": False, "model": {"dtype": "bfloat16"}}}, 1.0),
        ({"hardware": {"gpus": ["NVIDIA H100 PCIe"], "cpu_cores": 1}}, 989 / 756),
        ({"config": {"bf16": False}}, None),  # float32 has another peak
        ({"hardware": {"gpus": ["Some GPU of tomorrow"], "cpu_cores": 1}}, None),
        ({"hardware": {"gpus": [], "cpu_cores": 4}}, None),
        ({"model": {}}, None),  # written by an older version
    ],
)
def test_use_of_the_gpus_is_told_where_the_peak_is_known(changes: dict[str, Any], factor: float | None) -> None:
    usual = 6 * 1e9 * 4000 / (12.0 * 2 * 989e12)
    assert cost_of(RL_ROWS, gpu_record(**changes)).mfu == (None if factor is None else pytest.approx(usual * factor))


def test_the_step_of_sft_is_training() -> None:
    rows = [{"step": 1, "num_tokens": 500, "timing_s/step": 2.0, "timing_s/eval": 1.0}]
    cost = cost_of(rows, {"hardware": {"gpus": [], "cpu_cores": 8, "threads_per_process": 2}, "num_processes": 2})
    assert cost.seconds == {"train": 2.0, "eval": 1.0} and (cost.device, cost.devices) == ("core", 4)
    assert cost_table(cost) == [
        ["phase", "time", "share", "core-hours"],
        ["train", "2.0 s", "66.7 %", "0.00 core-h"],
        ["eval", "1.0 s", "33.3 %", "0.00 core-h"],
        ["all", "3.0 s", "100 %", "0.00 core-h"],
        ["tokens", "number", "per second", "per second and core"],
        ["trained", "500", "250", "62.5"],
    ]


def test_rollouts_beside_the_trainer_are_no_phase() -> None:
    row = {"step": 1, "num_completion_tokens": 90, "timing_s/step": 5.0, "timing_s/train": 4.0}
    row |= {"timing_s/wait_for_rollouts": 1.0, "engine_s/rollout": 3.0}
    cost = cost_of([row], gpu_record(num_processes=1))
    assert cost.seconds == {"wait_for_rollouts": 1.0, "train": 4.0} and cost.rollout_rate() == 30.0


def test_several_updates_of_one_batch_are_one_line() -> None:
    rows = [{"step": step, "timing_s/step": 8.0, "num_tokens": 10} for step in (4, 8, 16)]
    record = {"config": {"num_iterations": 2, "steps_per_generation": 2}}
    assert cost_of(rows, record).total_seconds == 8.0 * 4  # 16 steps, four a batch
    assert cost_of(rows, record).trained == 40


def test_nothing_is_known_of_an_empty_run() -> None:
    cost = cost_of([], {})
    assert cost.seconds == {} and cost.device_hours(1.0) == "-" and cost.mfu is None and cost.train_rate() == 0


@pytest.mark.parametrize(
    ("count", "words"), [(0, "-"), (0.25, "0.25"), (999, "999"), (12_345, "12.3 k"), (7e6, "7 M"), (2.5e9, "2.5 G")]
)
def test_numbers_in_brief(count: float, words: str) -> None:
    assert brief(count) == words
    assert (clock(9.94), clock(3661)) == ("9.9 s", "1:01:01")
