"""The shell scripts, run on a copy of the repository in a path with a space, with stand-ins for what they call."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SCRIPTS = [
    path.relative_to(REPOSITORY).as_posix()
    for path in [*REPOSITORY.glob("scripts/*.sh"), *REPOSITORY.glob("examples/*.sh"), *REPOSITORY.glob("*.sh")]
] + [".ci/run"]
DISTRIBUTED_TYPES = {"ddp": "MULTI_GPU", "zero1": "DEEPSPEED", "fsdp2": "FSDP"}
SINGLE = "env ACCELERATE_MIXED_PRECISION=no ACCELERATE_DYNAMO_BACKEND=NO"

# A Python that makes fake environments and logs what it would install.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
*"version_info < "*) exit "${{FAKE_OLD:-0}}" ;;
*"import ensurepip"*) exit "${{FAKE_NO_ENSUREPIP:-0}}" ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/python3" ;;
"-m pip install "*) echo "$*" >>"$FAKE_LOG" && exit "${{FAKE_PIP:-0}}" ;;
"-m pytest"*) echo "pytest ${{*:3}} in $PWD, offline=$HF_HUB_OFFLINE" ;;
"-m dirl.cli tiny-model "*) echo "$*" >>"$FAKE_LOG" && mkdir -p "$4" ;;
"-m dirl.cli "*) echo "$PWD: $*; threads ${{OMP_NUM_THREADS:-}}" && exit "${{FAKE_RUN:-0}}" ;;
*) exec {shlex.quote(sys.executable)} "$@" ;;
esac
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The scripts in `a repository/`, with configs of our own and no environment."""
    root = tmp_path / "a repository"
    for folder in ("scripts", "examples"):
        shutil.copytree(REPOSITORY / folder, root / folder)
    for name in ("pyproject.toml", "download.sh"):
        shutil.copy(REPOSITORY / name, root)
    for folder, names in (("tiny", ("sft", "rl", "eval")), ("accelerate", DISTRIBUTED_TYPES)):
        (root / "configs" / folder).mkdir(parents=True)
        for name in names:
            text = f"distributed_type: {DISTRIBUTED_TYPES.get(name)}\nnum_processes: 4\n"
            (root / "configs" / folder / f"{name}.yaml").write_text(text)
    return root


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """The caller's directory, which is not the repository."""
    folder = tmp_path / "else where"
    folder.mkdir()
    return folder


def run(script: Path, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script in a bare environment, without a GPU unless `variables` say otherwise."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(cwd), "CUDA_VISIBLE_DEVICES": "", "NO_APT": "1"}
    environment |= variables
    command = ["bash", str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def launch_line(script: Path, *arguments: str, cwd: Path, **variables: str) -> str:
    """What DRY_RUN=1 prints, its quoting undone."""
    done = run(script, *arguments, cwd=cwd, DRY_RUN="1", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (line,) = done.stdout.splitlines()
    return " ".join(shlex.split(line))


def error_line(script: Path, *arguments: str, cwd: Path, **variables: str) -> str:
    """The single line a user's mistake must give."""
    done = run(script, *arguments, cwd=cwd, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line


def with_gpu(folder: Path) -> dict[str, str]:
    """Variables of a machine whose nvidia-smi finds a GPU."""
    write_program(folder / "gpu" / "nvidia-smi", "#!/bin/sh\n")
    return {"PATH": f"{folder / 'gpu'}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)


def test_ci_runs_the_tests() -> None:
    assert (REPOSITORY / ".ci/run").read_text().splitlines()[-1] == "bash scripts/test.sh"
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)


@pytest.mark.parametrize("role", ["sft", "rl", "eval"])
def test_real_default_config_exists(role: str, elsewhere: Path) -> None:
    line = launch_line(REPOSITORY / "examples" / f"{role}.sh", cwd=elsewhere)
    assert line == f"{SINGLE} ACCELERATE_USE_CPU=true python3 -m dirl.cli {role} {REPOSITORY}/configs/tiny/{role}.yaml"


@pytest.mark.parametrize("role", ["sft", "rl", "eval"])
def test_single_process(role: str, copy: Path, elsewhere: Path) -> None:
    line = launch_line(copy / "examples" / f"{role}.sh", "seed=1", "run_name=a b", cwd=elsewhere)
    config = f"{copy}/configs/tiny/{role}.yaml"
    assert line == f"{SINGLE} ACCELERATE_USE_CPU=true python3 -m dirl.cli {role} {config} seed=1 run_name=a b"


def test_gpu_is_used_when_there_is_one(copy: Path, elsewhere: Path) -> None:
    gpu = with_gpu(elsewhere)
    single = launch_line(copy / "examples/sft.sh", cwd=elsewhere, **gpu)
    assert single.startswith(f"{SINGLE} python3 -m dirl.cli sft ")
    several = launch_line(copy / "examples/sft.sh", cwd=elsewhere, NUM_PROCESSES="2", **gpu)
    assert several.startswith("accelerate launch --multi_gpu --num_processes 2 --num_machines 1 ")
    hidden = launch_line(copy / "examples/sft.sh", cwd=elsewhere, **{**gpu, "CUDA_VISIBLE_DEVICES": "-1"})
    assert "ACCELERATE_USE_CPU=true python3" in hidden


def test_several_cpu_processes_go_through_torchrun(copy: Path, elsewhere: Path) -> None:
    line = launch_line(copy / "examples/rl.sh", cwd=elsewhere, NUM_PROCESSES="2")
    assert line.startswith("env ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 --standalone -m dirl.cli rl ")
    from_file = launch_line(copy / "examples/rl.sh", cwd=elsewhere, ACCELERATE_CONFIG="ddp")
    assert from_file.startswith("env ACCELERATE_USE_CPU=true torchrun --nproc_per_node 4 --standalone ")


def test_several_machines(copy: Path, elsewhere: Path) -> None:
    cluster = {"NUM_PROCESSES": "4", "NUM_MACHINES": "2", "MACHINE_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "77"}
    on_cpu = launch_line(copy / "examples/sft.sh", cwd=elsewhere, **cluster)
    assert "torchrun --nproc_per_node 2 --nnodes 2 --node_rank 1 --master_addr n0 --master_port 77 " in on_cpu
    rendezvous = "--main_process_port 77 --machine_rank 1 --main_process_ip n0 "
    assert rendezvous in launch_line(copy / "examples/sft.sh", cwd=elsewhere, **cluster, **with_gpu(elsewhere))
    deepspeed = launch_line(copy / "examples/sft.sh", cwd=elsewhere, ACCELERATE_CONFIG="zero1", **cluster)
    assert (
        "--num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip n0 --main_process_port 77" in deepspeed
    )
    assert "--deepspeed_multinode_launcher standard" in deepspeed


def test_accelerate_config_is_a_name_or_a_path(copy: Path, elsewhere: Path) -> None:
    by_name = launch_line(copy / "examples/sft.sh", cwd=elsewhere, ACCELERATE_CONFIG="zero1")
    # No ACCELERATE_USE_CPU: it would silently turn DeepSpeed into plain DDP.
    assert by_name.startswith(f"accelerate launch --config_file {copy}/configs/accelerate/zero1.yaml -m dirl.cli sft ")
    (elsewhere / "mine.yaml").write_text("distributed_type: DEEPSPEED\n")
    by_path = launch_line(copy / "examples/sft.sh", cwd=elsewhere, ACCELERATE_CONFIG="mine.yaml", NUM_PROCESSES="2")
    assert by_path.startswith(f"accelerate launch --config_file {elsewhere}/mine.yaml --num_processes 2 -m dirl.cli ")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_CONFIG": "zero9"}, ["ACCELERATE_CONFIG=zero9", "ddp", "fsdp2", "zero1"]),
        ({"NUM_PROCESSES": "two"}, ["NUM_PROCESSES=two"]),
        ({"NUM_PROCESSES": "0"}, ["NUM_PROCESSES=0"]),
        ({"NUM_PROCESSES": "2", "NUM_MACHINES": "2"}, ["MASTER_ADDR"]),
        ({"NUM_PROCESSES": "3", "NUM_MACHINES": "2", "MASTER_ADDR": "n0"}, ["NUM_PROCESSES=3", "NUM_MACHINES=2"]),
        ({"NUM_MACHINES": "2", "MACHINE_RANK": "2", "MASTER_ADDR": "n0"}, ["MACHINE_RANK=2"]),
        ({"CONFIG": "configs/nowhere.yaml"}, ["CONFIG=", "configs/nowhere.yaml"]),
    ],
)
def test_mistakes_are_one_line(variables: dict[str, str], words: list[str], copy: Path, elsewhere: Path) -> None:
    line = error_line(copy / "examples/sft.sh", cwd=elsewhere, DRY_RUN="1", **variables)
    assert [word for word in words if word not in line] == []


def test_config_is_looked_up_with_the_caller_then_in_the_repository(copy: Path, elsewhere: Path) -> None:
    in_repository = launch_line(copy / "examples/rl.sh", cwd=elsewhere, CONFIG="configs/tiny/sft.yaml")
    assert in_repository.endswith(f" {copy}/configs/tiny/sft.yaml")
    (elsewhere / "configs/tiny").mkdir(parents=True)
    (elsewhere / "configs/tiny/sft.yaml").touch()
    (elsewhere / "configs/tiny/rl.yaml").touch()
    here = launch_line(copy / "examples/rl.sh", cwd=elsewhere, CONFIG="configs/tiny/sft.yaml")
    assert here.endswith(f" {elsewhere}/configs/tiny/sft.yaml")
    assert launch_line(copy / "examples/rl.sh", cwd=elsewhere).endswith(f" {copy}/configs/tiny/rl.yaml")


def test_eval_translates_model_and_datasets(copy: Path, elsewhere: Path) -> None:
    (elsewhere / "final").mkdir()
    arguments = {"MODEL": "final", "DATASETS": "math500 gsm8k"}
    line = launch_line(copy / "examples/eval.sh", "seed=1", cwd=elsewhere, **arguments)
    assert line.endswith(f" model.path={elsewhere}/final data.datasets=[math500,gsm8k] seed=1")
    hub = launch_line(copy / "examples/eval.sh", cwd=elsewhere, MODEL="JetLM/SDAR-8B-Chat")
    assert hub.endswith(" model.path=JetLM/SDAR-8B-Chat")


def test_run_starts_in_the_repository_from_a_model_made_once(copy: Path, elsewhere: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    write_program(tmp_path / "bin/python3", FAKE_PYTHON)
    write_program(tmp_path / "bin/accelerate", "#!/bin/sh\n")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "NO_VENV": "1", "FAKE_LOG": str(log)}
    for _ in range(2):
        done = run(copy / "examples/sft.sh", "max_steps=1", cwd=elsewhere, **variables, OMP_NUM_THREADS="3")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{copy}: -m dirl.cli ")
        assert done.stdout.endswith(f"sft {copy}/configs/tiny/sft.yaml max_steps=1; threads 3\n")
    assert log.read_text().splitlines() == ["-m dirl.cli tiny-model outputs/tiny/base.tmp"]
    assert [path.name for path in (copy / "outputs/tiny").iterdir()] == ["base"]
    # RL starts from an SFT model; without one it trains it first.
    done = run(copy / "examples/rl.sh", cwd=elsewhere, **variables)
    roles = [line.split("dirl.cli ")[1].split()[0] for line in done.stdout.splitlines() if "dirl.cli" in line]
    assert roles == ["sft", "rl"]
    # One process is not started by a launcher: its exit code is the script's.
    failed = run(copy / "examples/sft.sh", cwd=elsewhere, **variables, FAKE_RUN="2")
    assert (failed.returncode, failed.stderr) == (2, "")
    # Who names a model does not wait for that.
    for role in ("rl", "eval"):
        done = run(copy / f"examples/{role}.sh", "model.path=mine", cwd=elsewhere, **variables)
        assert [line.split("dirl.cli ")[1].split()[0] for line in done.stdout.splitlines()] == [role]


def test_root_gets_a_browser_and_a_sandbox_where_there_is_none(
    copy: Path, elsewhere: Path, tmp_path: Path, python: dict[str, str]
) -> None:
    log = tmp_path / "apt"
    write_program(tmp_path / "bin/apt-get", f'#!/bin/sh\necho "$*" >>"{log}"\nexit "${{FAKE_APT:-0}}"\n')
    write_program(tmp_path / "bin/id", "#!/bin/sh\necho 0\n")
    needed = "bash dirname cat mkdir cp timeout python3 rm mv touch sed env getconf"
    for name in needed.split():
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    machine = {**python, "PATH": str(tmp_path / "bin"), "NO_APT": ""}
    done = run(copy / "scripts/test.sh", cwd=elsewhere, **machine)
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == ["update", "install -y --no-install-recommends chromium bubblewrap"]
    failed = run(copy / "scripts/test.sh", cwd=elsewhere, **machine, FAKE_APT="1")
    assert failed.returncode == 0 and "chromium bubblewrap could not be installed" in failed.stdout
    write_program(tmp_path / "bin/chromium", "#!/bin/sh\n")
    write_program(tmp_path / "bin/bwrap", "#!/bin/sh\n")
    log.unlink()
    assert run(copy / "scripts/test.sh", cwd=elsewhere, **machine).returncode == 0 and not log.exists()


@pytest.fixture
def python(tmp_path: Path) -> dict[str, str]:
    """Variables that put the fake Python in the place of the machine's."""
    write_program(tmp_path / "fake-python", FAKE_PYTHON)
    return {"PYTHON": str(tmp_path / "fake-python"), "FAKE_LOG": str(tmp_path / "log")}


def installs(python: dict[str, str]) -> list[str]:
    """What each editable install was for; the list of LMDeploy's tests is no editable install."""
    log = Path(python["FAKE_LOG"])
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.partition(" -e ")[2] for line in lines if " -e " in line]


def test_tests_install_once_and_pass_arguments_on(copy: Path, elsewhere: Path, python: dict[str, str]) -> None:
    for _ in range(2):
        done = run(copy / "scripts/test.sh", "-k", "views", cwd=elsewhere, **python)
        assert done.returncode == 0, done.stderr
        arguments = (
            f"-n {min(os.cpu_count() or 1, 4)} --dist loadfile -m not matrix and not slow and not chaos -k views"
        )
        assert done.stdout.splitlines()[-1] == f"pytest {arguments} in {copy}, offline=1"
    assert installs(python) == [f"{copy}[dev]"]
    # The base install is contained in the dev install; a changed pyproject.toml is installed again.
    source = f'set -euo pipefail; source "{copy}/scripts/setup_env.sh"; install_dirl'
    (elsewhere / "base.sh").write_text(source)
    assert run(elsewhere / "base.sh", cwd=elsewhere, **python).returncode == 0
    assert installs(python) == [f"{copy}[dev]"]
    with (copy / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert run(elsewhere / "base.sh", cwd=elsewhere, **python).returncode == 0
    assert installs(python) == [f"{copy}[dev]", str(copy)]


def test_failed_install_is_repeated(copy: Path, elsewhere: Path, python: dict[str, str]) -> None:
    line = error_line(copy / "scripts/test.sh", cwd=elsewhere, **python, FAKE_PIP="1")
    assert "pip could not install dirl[dev]" in line
    assert run(copy / "scripts/test.sh", cwd=elsewhere, **python).returncode == 0
    assert len(installs(python)) == 2


def test_unfit_pythons_are_named(copy: Path, elsewhere: Path, python: dict[str, str]) -> None:
    script = copy / "scripts/test.sh"
    assert "Python >= 3.10" in error_line(script, cwd=elsewhere, **python, FAKE_OLD="1")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    assert version in error_line(script, cwd=elsewhere, **python, FAKE_NO_ENSUREPIP="1")
    assert "no-such-python" in error_line(script, cwd=elsewhere, **{**python, "PYTHON": "no-such-python"})


def test_download(copy: Path, elsewhere: Path) -> None:
    write_program(elsewhere / "bin/hf", '#!/bin/sh\necho "$*"\nexit "${FAKE_HF:-0}"\n')
    path = {"PATH": f"{elsewhere / 'bin'}:{os.environ['PATH']}"}
    done = run(copy / "download.sh", "data", "owner/name", "--revision", "v1", cwd=elsewhere, **path)
    assert done.stdout.splitlines() == [
        "download owner/name --repo-type dataset --local-dir data/name --revision v1",
        f"{copy}/data/name",
    ]
    failed = run(copy / "download.sh", "model", "o/n", cwd=elsewhere, **path, FAKE_HF="1", HF_ENDPOINT="https://mirror")
    assert failed.returncode == 1
    assert failed.stderr.startswith("download.sh: could not fetch o/n from https://mirror: ")
    for wrong in ([], ["model"], ["weights", "o/n"], ["model", "no-owner"]):
        assert error_line(copy / "download.sh", *wrong, cwd=elsewhere, **path).startswith("usage: ")


def test_gpu_check_keeps_what_there_is(copy: Path, elsewhere: Path) -> None:
    write_program(
        elsewhere / "bin/python3",
        f"""#!/bin/sh
case "$*" in
*"import lmdeploy"*) exit 1 ;;
*bench_table*) exec {shlex.quote(sys.executable)} "$@" ;;
*pytest*) echo a test failed && exit 1 ;;
*bench_rollout*) echo '{{"benchmark": "rollout", "model": "8b", "commit": "'$DIRL_COMMIT'"}}' && exit 3 ;;
esac
""",
    )
    (elsewhere / "results").mkdir()
    for name in ("gpu.jsonl", "gpu.errors"):
        (elsewhere / "results" / name).write_text("of an earlier run\n")
    path = f"{elsewhere / 'bin'}:{os.environ['PATH']}"
    done = run(copy / "scripts/gpu_check.sh", "results", cwd=elsewhere, PATH=path, NO_VENV="1", DIRL_COMMIT="abc")
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in (elsewhere / "results/gpu.jsonl").read_text().splitlines()]
    assert lines == [{"benchmark": "rollout", "model": "8b", "commit": "abc"}] * 3
    table = (elsewhere / "results/gpu.md").read_text()
    assert table.startswith("### rollout") and table.count("| 8b |") == 3 and table in done.stdout
    errors = (elsewhere / "results/gpu.errors").read_text()
    assert errors.startswith("== tests: exit status 1\na test failed\n") and "== rollout_8b: exit status 3" in errors
    assert sorted(path.name for path in (elsewhere / "results").iterdir()) == ["gpu.errors", "gpu.jsonl", "gpu.md"]
    late = run(copy / "scripts/gpu_check.sh", "late", cwd=elsewhere, PATH=path, NO_VENV="1", TIME_LIMIT="75")
    assert "no time left for: tests train_1.7b_short train_8b_short train_8b_long sft_1.7b" in late.stdout
    chosen = {"NO_VENV": "1", "PARTS": "tests rollout_8b_compiled"}
    some = run(copy / "scripts/gpu_check.sh", "some", cwd=elsewhere, PATH=path, **chosen)
    parts = [line for line in some.stdout.splitlines() if line.startswith("==")]
    assert parts == ["== tests", "== rollout_8b_compiled"]


def evaluation(mode: str, accuracy: float, num_samples: int) -> dict[str, str | float]:
    return {
        "dataset": "sums",
        "mode": mode,
        "avg_at_k": accuracy,
        "num_samples": num_samples,
        "tokens_per_step": 2.346,
    }


def test_compare_runs_prints_a_table(copy: Path, elsewhere: Path) -> None:
    for name, results in {
        "a": [evaluation("dynamic", 0.25, 4), evaluation("greedy", 0.5, 1)],
        "b": [evaluation("greedy", 0.75, 1)],
    }.items():
        (elsewhere / name).mkdir()
        (elsewhere / name / "results.json").write_text(json.dumps({"model": "m", "results": results}))
    command = [sys.executable, str(copy / "scripts/compare_runs.py"), "after SFT=a/results.json", "b/results.json"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in done.stdout.splitlines()]
    assert cells[2:] == [
        ["after SFT", "sums", "dynamic", "0.250 (avg@4)", "0.500", "2.35"],
        ["b", "sums", "greedy", "-", "0.750", "2.35"],
    ]
    missing = subprocess.run([*command, "c/results.json"], cwd=elsewhere, capture_output=True, text=True)
    assert missing.returncode == 2
    (line,) = missing.stderr.splitlines()
    assert line.startswith("c/results.json: ")
