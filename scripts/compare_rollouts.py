"""Rollouts that wait against rollouts ahead: accuracy, seconds to an accuracy, and who waits for whom.

    python scripts/compare_rollouts.py --sft outputs/tiny/sft/final --seeds 0,1,2
    python scripts/compare_rollouts.py --sft DIR --arms synchronous,ahead_1 --output docs/benchmarks/cpu.jsonl

Each arm is the tiny recipe with the engine in a process of its own (`rollout.mode=server`), so that two cores can
hold one phase each; arms differ in `rollout.max_staleness` and no more. For times, run it on a machine that does
nothing else; accuracy alone depends on that with a staleness above 1 only, and `rollout.mode=colocate` takes one
core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from bench_setup import provenance

from dirl.files import append_json_lines
from dirl.show.metric_table import read_metrics

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "synchronous": ["rollout.max_staleness=0"],
    "ahead_1": ["rollout.max_staleness=1"],
    "ahead_2": ["rollout.max_staleness=2"],
}


def run(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """Train; a finished run is not trained again."""
    output = Path(options.outputs, f"{arm}_{seed}")
    command = [sys.executable, "-m", "dirl.cli", "rl", str(ROOT / "configs/tiny/rl.yaml"), *ARMS[arm]]
    command += [f"seed={seed}", f"model.path={options.sft}", f"output_dir={output}", "eval_steps=5"]
    command += ["rollout.mode=server", "rollout.engine=torch", *options.override]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return output


def line_of(arm: str, seed: int, output: Path, options: argparse.Namespace) -> dict[str, object]:
    """What one run was like; times are of its steps, evaluations and saves left out."""
    rows = read_metrics(output / "metrics.jsonl")
    seconds, reached = 0.0, None
    for row in rows:
        seconds += row["timing_s/step"]
        if reached is None and row.get("eval/accuracy", 0.0) >= 0.95:
            reached = round(seconds, 1)
    found = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]  # a run may end between two evaluations
    later = rows[2:]  # the first steps load code, and nothing is ahead of them

    def mean(name: str) -> float:
        return fmean(row.get(name, 0.0) for row in later)

    engine = mean("engine_s/rollout") + mean("engine_s/reward") or mean("timing_s/rollout") + mean("timing_s/reward")
    trainer = mean("timing_s/train") + mean("timing_s/update_weights")
    return {
        "benchmark": "rollouts_ahead",
        "mode": "colocate" if "rollout.mode=colocate" in options.override else "server",
        "arm": arm,
        "seed": seed,
        "steps": len(rows),
        "accuracy": found[-1],
        "accuracy_of_last_three": fmean(found[-3:]),
        "seconds_to_0.95": reached,
        "seconds_per_step": round(mean("timing_s/step"), 3),
        "engine_seconds": round(engine, 3),
        "trainer_seconds": round(trainer, 3),
        "over_longer_phase": round(mean("timing_s/step") / max(engine, trainer), 3),
        "trainer_waits": round(mean("waiting/trainer"), 3),
        "engine_waits": round(mean("waiting/engine"), 3),
        "staleness_mean": round(mean("staleness/mean"), 3),
        **provenance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", required=True, help="an SFT model to start from")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--outputs", default="outputs/compare_rollouts")
    parser.add_argument("--output", help="JSON lines to add to")
    parser.add_argument("override", nargs="*", help="further overrides, KEY=VALUE")
    options = parser.parse_args()
    for seed in map(int, options.seeds.split(",")):
        for arm in options.arms.split(","):
            line = line_of(arm, seed, run(arm, seed, options), options)
            print(line, flush=True)
            if options.output:
                append_json_lines(Path(options.output), [line])


if __name__ == "__main__":
    main()
