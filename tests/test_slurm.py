"""The SLURM example, with stand-ins for srun and scontrol: the launch line of each node, and the requeueing."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def submit(tmp_path: Path, *arguments: str, **variables: str) -> str:
    """What the job prints; srun runs its command once per node, as node 0 and node 1."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {
        "srun": 'shift; for node in 0 1; do SLURM_NODEID=$node "$@"; done',
        "scontrol": 'if [[ $1 == requeue ]]; then echo "requeued $2"; else printf "n7\\nn8\\n"; fi',
    }.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("NUM_PROCESSES", "NUM_MACHINES", "ACCELERATE_CONFIG")},
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[7-8]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "42",
        "SLURM_SUBMIT_DIR": str(ROOT),
        **variables,
    }
    command = ["bash", str(ROOT / "examples/slurm.sbatch"), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_node_gets_its_rank_and_the_same_rendezvous(tmp_path: Path) -> None:
    lines = submit(tmp_path, "run_name=a b", DRY_RUN="1").splitlines()
    assert len(lines) == 2
    for rank, quoted in enumerate(lines):
        words = shlex.split(quoted)
        line = " ".join(words)
        assert f"--config_file {ROOT}/configs/accelerate/zero1.yaml --num_processes 16 --num_machines 2" in line
        assert f"--machine_rank {rank} --main_process_ip n7 --main_process_port 29500" in line
        assert line.endswith(f"-m dirl.cli rl {ROOT}/configs/sdar_8b/rl.yaml run_name=a b")
        assert words[-1] == "run_name=a b"


def test_an_unfinished_run_goes_back_into_the_queue(tmp_path: Path) -> None:
    """With a launcher that only prints, no final/ appears; with one, the job is over."""
    program = tmp_path / "bin/accelerate"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho launched\n")
    program.chmod(0o755)
    output = f"output_dir={tmp_path}/out"
    assert "requeued" not in submit(tmp_path, output, NO_VENV="1")  # no such directory: asking again changes nothing
    (tmp_path / "out").mkdir()
    assert "requeued 42" in submit(tmp_path, output, NO_VENV="1")
    (tmp_path / "out/final").mkdir()
    assert "requeued" not in submit(tmp_path, output, NO_VENV="1")


@pytest.mark.parametrize("written", ["{path}", "{path}  # mine", '"{path}"', "'{path}'"])
def test_output_dir_is_read_as_yaml_means_it(written: str, tmp_path: Path) -> None:
    program = tmp_path / "bin/accelerate"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho launched\n")
    program.chmod(0o755)
    (tmp_path / "out").mkdir()
    config = tmp_path / "run.yaml"
    config.write_text(f"output_dir: {written.format(path=tmp_path / 'out')}\n")
    assert "requeued 42" in submit(tmp_path, NO_VENV="1", CONFIG=str(config))
    (tmp_path / "out/final").mkdir()
    assert "requeued" not in submit(tmp_path, NO_VENV="1", CONFIG=str(config))


def test_a_task_of_an_array_runs_its_combination(tmp_path: Path) -> None:
    """Objectives and seeds of an array of four: the third task is the second objective with the first seed."""
    words = ["objective=[dipo,espo]", "seed=[4,5]", "run_name=a b", f"output_dir={tmp_path}/out"]
    variables = {"DRY_RUN": "1", "SLURM_ARRAY_TASK_ID": "2", "CONFIG": "configs/tiny/rl.yaml"}
    lines = submit(tmp_path, *words, **variables).splitlines()
    assert len(lines) == 2
    told = shlex.split(lines[0])
    assert told[-4:] == ["run_name=a b", "objective=espo", "seed=4", f"output_dir={tmp_path}/out/objective=espo,seed=4"]
    assert "--main_process_port 29502" in " ".join(told)
