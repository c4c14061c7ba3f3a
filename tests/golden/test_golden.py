"""Ten steps of every kind of run, against the numbers they had when they were recorded: code may move, numbers may not.

`python tests/golden/test_golden.py --record` writes them anew. A change of one is a commit of its own that says why.
This file is also the script that several processes run: `test_golden.py CASE... OUT`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from dirl.config import load_config
from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.rl.rl_config import RLConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTTrainer
from tests.launching import launch_script
from tests.oracle import sharp_tiny_model

GOLDEN = Path(__file__).with_name("golden.json")
NUM_STEPS = 10
# Key by key as a person would write them on the command line: these keys keep their meaning.
COMMON = [
    "output_dir=unused",
    "learning_rate=1e-3",
    "adam_epsilon=1e-2",  # a large one keeps Adam from blowing rounding errors up to whole steps
    "warmup_steps=2",
    "max_grad_norm=0.5",
]
SFT = [*COMMON, "max_steps=10", "global_batch_size=6", "max_tokens_per_micro_batch=200", "data.num_heldout=3"]
RL = [
    *COMMON,
    "max_steps=40",
    "max_tokens_per_micro_batch=400",
    f"reward.functions=[{__file__}:digit_sum]",
    "scale_rewards=group",
    "rollout.prompts_per_step=4",
    "rollout.num_generations=4",
    "rollout.max_completion_length=16",
    "rollout.confidence_threshold=0.3",
]
CASES = {
    "sft_block": SFT,
    "sft_complementary": [*SFT, "noise.complementary=true"],
    "rl_reveal": RL,
    "rl_trajectory": [*RL, "likelihood=trajectory"],
    "rl_iterations": [
        *RL,
        "likelihood=trajectory",
        "num_iterations=2",
        "steps_per_generation=2",
        "epsilon=1e-3",
        "epsilon_high=2e-3",
    ],
    "rl_kl": [*RL, "beta=0.1", "loss_type=grpo"],
    "rl_lora": [*RL, "lora.r=4", "beta=0.05"],
}
TWO_PROCESSES = ("sft_block", "rl_trajectory")
RECORDED = (
    *("loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std", "entropy", "kl"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
    *("completions/tokens_per_step", "completions/mean_length", "groups/kept"),
)


def digit_sum(
    prompts: list[str], completions: list[str], *, completion_ids: list[list[int]], **_: object
) -> list[float | None]:
    """A reward with spread wherever completions differ."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def run(case: str) -> list[dict[str, float]]:
    """The recorded numbers of ten steps."""
    model, tokenizer = sharp_tiny_model(sharpness=9.0)
    trainer: SFTTrainer | RLTrainer
    if case.startswith("sft"):
        documents = [Document([1, 2, 3, 4, 5][: length % 6], list(range(40, 40 + length))) for length in range(9, 34)]
        trainer = SFTTrainer(
            load_config(SFTConfig, None, CASES[case]), model=model, tokenizer=tokenizer, documents=documents
        )
    else:
        problems = [Problem("?" * length, "0", {}) for length in range(1, 12)]
        trainer = RLTrainer(
            load_config(RLConfig, None, CASES[case]), model=model, tokenizer=tokenizer, problems=problems
        )
    steps = [trainer.step() for _ in range(NUM_STEPS)]
    return [{name: step[name] for name in RECORDED if name in step} for step in steps]


def run_all(cases: list[str], path: Path) -> None:
    torch.set_num_threads(1)
    numbers = {case: run(case) for case in cases}
    path.write_text(json.dumps(numbers), encoding="utf-8")
    if torch.distributed.is_initialized():  # its threads may abort a process that ends around them
        torch.distributed.destroy_process_group()


def run_two_processes(folder: Path) -> dict[str, list[dict[str, float]]]:
    done = launch_script(
        __file__, *TWO_PROCESSES, str(folder / "numbers.json"), backend="ddp", num_processes=2, timeout=500
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / "numbers.json").read_text(encoding="utf-8"))


def assert_as_recorded(case: str, found: list[dict[str, float]]) -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))[case]
    assert len(found) == len(expected) == NUM_STEPS
    for number, (ours, golden) in enumerate(zip(found, expected, strict=True), start=1):
        assert ours == pytest.approx(golden, rel=1e-5, abs=1e-7), f"{case}, step {number}"


@pytest.mark.parametrize("case", CASES)
def test_numbers_do_not_drift(case: str) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert_as_recorded(case, run(case))
    finally:
        torch.set_num_threads(threads)


def test_numbers_of_two_processes_do_not_drift(tmp_path: Path) -> None:
    for case, found in run_two_processes(tmp_path).items():
        assert_as_recorded(f"{case}_two_processes", found)


def record() -> None:
    torch.set_num_threads(1)
    numbers = {case: run(case) for case in CASES}
    with TemporaryDirectory() as folder:
        numbers |= {f"{case}_two_processes": found for case, found in run_two_processes(Path(folder)).items()}
    GOLDEN.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        record()
    else:
        run_all(sys.argv[1:-1], Path(sys.argv[-1]))
