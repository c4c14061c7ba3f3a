"""A test file started as a program by the shipped launcher, on CPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch_environment(num_processes: int) -> dict[str, str]:
    """For the launcher: so many processes on CPUs, from this checkout."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")},
        "NUM_PROCESSES": str(num_processes),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "NO_VENV": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def launch_script(
    script: str, *arguments: str, backend: str, num_processes: int, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run it to the end under a backend of configs/accelerate, or `plain`."""
    environment = launch_environment(num_processes) | ({"ACCELERATE_CONFIG": backend} if backend != "plain" else {})
    command = ["bash", "-c", 'source "$0"; launch "$@"', str(ROOT / "scripts/launch.sh"), script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
