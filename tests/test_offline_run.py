"""Tiny model, SFT, RL and evaluation through the command line: offline, and without a secret in any file."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dirl.cli import main

ROOT = Path(__file__).parents[1]
CANARIES = {
    "HF_TOKEN": "hf_canaryCanaryCanaryCanaryCanary01",
    "WANDB_API_KEY": "c0ffee00c0ffee00c0ffee00c0ffee00c0ffee42",
    "HUGGING_FACE_HUB_TOKEN": "hf_canaryCanaryCanaryCanaryCanary02",
}


def test_end_to_end_offline_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["dirl", "rl", f"hub.hf_token={CANARIES['HF_TOKEN']}", "--wandb-api-key"])
    base, sft, rl, evaluation = (str(tmp_path / name) for name in ("base", "sft", "rl", "eval"))
    configs = ROOT / "configs/tiny"
    trackers = "report_to=[wandb,tensorboard]"
    assert main(["tiny-model", base]) == 0
    small = ["max_steps=2", "data.limit=64", "save_steps=1", trackers]
    sft_only = ["data.num_heldout=8", "global_batch_size=4", f"model.path={base}", f"output_dir={sft}"]
    assert main(["sft", str(configs / "sft.yaml"), *small, *sft_only]) == 0
    rollout = ["rollout.prompts_per_step=2", "rollout.num_generations=2", "rollout.dynamic_sampling=false"]
    rl_only = [*rollout, "eval.limit=2", "eval.num_samples=1", f"model.path={sft}/final", f"output_dir={rl}"]
    assert main(["rl", str(configs / "rl.yaml"), *small, *rl_only]) == 0
    data = ["data.limit=2", "num_samples=1", "modes=[dynamic]", f"model.path={rl}/final", f"output_dir={evaluation}"]
    assert main(["eval", str(configs / "eval.yaml"), *data]) == 0

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "run.json", "config.yaml", "loop.json", "results.json"} <= {path.name for path in files}
    assert any("wandb" in path.parts for path in files)  # the trackers ran, offline
    assert find_spec("tensorboard") is None or any("tfevents" in path.name for path in files)
    spoken = "".join(capfd.readouterr())
    for secret in CANARIES.values():
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in spoken
