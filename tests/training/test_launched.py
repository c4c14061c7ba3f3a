"""Runs of two processes as people launch them: who writes where, who ends with whom, and whose error is told.

This file is also a reward: `test_launched.py:fails_on_rank_1`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dirl.model.tiny import save_tiny_model
from tests.launching import launch_environment

ROOT = Path(__file__).parents[2]


def fails_on_rank_1(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    if os.environ["RANK"] == "1":
        raise KeyError("level")
    return [float(len(completion) % 2 == 0) for completion in completions]


@contextmanager
def started(
    folder: Path, *overrides: str, stage: str = "sft", num_processes: int = 2
) -> Iterator[subprocess.Popen[str]]:
    """A run of the tiny model in a group of its own, of which nothing is left at the end."""
    if not (folder / "model").exists():
        save_tiny_model(folder / "model")
    config = f"configs/tiny/{stage}.yaml"
    keys = [f"model.path={folder}/model", f"output_dir={folder}/run", "data.limit=60", *overrides]
    command = ["bash", "-c", 'source "$0"; launch "$@"', str(ROOT / "scripts/launch.sh"), "-m", "dirl.cli", stage]
    process = subprocess.Popen(
        [*command, config, *keys],
        env=launch_environment(num_processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in ranks_in(folder):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()


def ranks_in(folder: Path) -> list[int]:
    """Processes, launchers aside, that were told to write there and live."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue  # it has just ended
        is_rank = b"-m" in words and b"dirl.cli" in words and not any(b"torchrun" in word for word in words)
        if is_rank and b"bash" not in words[0] and f"output_dir={folder}/run".encode() in words and state != "Z":
            found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def steps_logged(folder: Path) -> list[int]:
    path = folder / "run/metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.is_file() else []


LONG = ("data.num_heldout=0", "logging_steps=1", "global_batch_size=4")


def test_a_second_run_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with started(tmp_path, *LONG, num_processes=1) as first:
        wait_until(lambda: bool(steps_logged(tmp_path)))
        with started(tmp_path, *LONG, num_processes=1) as second:
            output, _ = second.communicate(timeout=240)
        assert second.returncode == 2
        assert output == (
            f"dirl: error: output_dir={tmp_path}/run is another run's (process {first.pid}): wait for its end; name "
            "another directory\n"
        )


def test_ranks_end_with_their_launcher_and_the_next_run_goes_on(tmp_path: Path) -> None:
    with started(tmp_path, *LONG) as process:
        wait_until(lambda: bool(steps_logged(tmp_path)))
        ranks = ranks_in(tmp_path)
        assert len(ranks) == 2
        os.killpg(process.pid, signal.SIGKILL)  # bash and the launcher; ranks have sessions of their own
        wait_until(lambda: not ranks_in(tmp_path), 60)
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    assert checkpoint.name == f"step_{steps_logged(tmp_path)[-1]:06d}"  # an orderly end


def test_a_rank_that_waits_for_others_ends_with_its_launcher(tmp_path: Path) -> None:
    """One rank of two, whose launcher is this shell."""
    save_tiny_model(tmp_path / "model")
    keys = [f"model.path={tmp_path}/model", f"output_dir={tmp_path}/run"]
    environment = {
        **os.environ,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29411",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    rank = f'"{sys.executable}" -m dirl.cli sft configs/tiny/sft.yaml {" ".join(keys)} & wait'
    shell = subprocess.Popen(["bash", "-c", rank], env=environment, cwd=ROOT)
    try:
        wait_until(lambda: bool(ranks_in(tmp_path)))
        time.sleep(8)  # it has come to the rendezvous, or is on its way
        assert ranks_in(tmp_path)
        shell.kill()
        wait_until(lambda: not ranks_in(tmp_path), 30)
    finally:
        for pid in ranks_in(tmp_path):
            os.kill(pid, signal.SIGKILL)
        shell.wait()


def test_a_launcher_that_is_told_to_stop_waits_for_the_checkpoint_and_ends_well(tmp_path: Path) -> None:
    with started(tmp_path, *LONG) as process:
        wait_until(lambda: bool(steps_logged(tmp_path)))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "Traceback" not in output and output.count("stopped by SIGTERM at step") == 1
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("rl", f"reward.functions=[{__file__}:fails_on_rank_1]", "rank 1: reward function"),
        pytest.param("sft", "data.path=absent.jsonl", "data file absent.jsonl does not exist", marks=pytest.mark.slow),
        pytest.param("sft", "max_stpes=3", "override 'max_stpes=3': unknown key", marks=pytest.mark.slow),
    ],
)
def test_an_error_is_told_once_whichever_rank_has_it(stage: str, override: str, message: str, tmp_path: Path) -> None:
    with started(tmp_path, override, stage=stage) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert output.count("dirl: error: ") == 1, output
    assert message in next(line for line in output.splitlines() if line.startswith("dirl: error: "))
