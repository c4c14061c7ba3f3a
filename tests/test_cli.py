"""The command line: what runs, exit codes, and who prints; trainers are stood in for."""

from __future__ import annotations

import errno
import io
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest

from dirl import __version__
from dirl.cli import main
from dirl.data.problem_sources import load_problems
from dirl.errors import RunInterrupted
from dirl.model.tiny import tiny
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.local.engine import TorchEngine

COMMANDS = {
    "sft": (("dirl.sft.train", "SFTConfig"), ("dirl.sft.train", "SFTTrainer")),
    "rl": (("dirl.rl.rl_config", "RLConfig"), ("dirl.rl.train", "RLTrainer")),
    "eval": (("dirl.eval.eval_config", "EvalConfig"), ("dirl.eval.evaluate", "run_evaluation")),
}


@dataclass(frozen=True, kw_only=True)
class StandInConfig:
    """What the stand-in runs are given; `act` says how they end."""

    act: str = "finish"
    path: str = "absent.json"


class StandIn:
    left: ClassVar[list[str]] = []  # how the runs ended whose ranks took their leave of each other

    def __init__(self, config: StandInConfig) -> None:
        self.config = config
        self.distributed = SimpleNamespace(close=lambda: self.left.append(config.act))

    def train(self) -> str:
        if self.config.act == "interrupt":
            raise KeyboardInterrupt
        if self.config.act == "stop":
            raise RunInterrupted(signal.SIGTERM, step=3)
        if self.config.act == "read":
            load_problems(self.config.path)
        if self.config.act == "misuse":
            model, tokenizer = tiny()
            TorchEngine(model, tokenizer).generate([[1]], SamplingConfig(), seeds=[])
        if self.config.act == "fill the disk":
            raise OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl")
        if self.config.act == "break":
            json.loads("{")  # a ValueError of a library: a bug of ours, not of the user
        return f"result of {self.config.path}"


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A command whose trainer is the stand-in."""
    name = str(request.param)
    stand_ins = (StandInConfig, StandIn if name != "eval" else lambda config: StandIn(config).train())
    modules = {module_name: ModuleType(module_name) for module_name, _ in COMMANDS[name]}
    for (module_name, member), stand_in in zip(COMMANDS[name], stand_ins, strict=True):
        setattr(modules[module_name], member, stand_in)
    for module_name, module in modules.items():
        setattr(module, f"{name}_workload", None)  # of --estimate-memory
        monkeypatch.setitem(sys.modules, module_name, module)
    return name


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    file = tmp_path / "with a space.yaml"
    file.write_text("path: from the file\n")
    return str(file)


def test_a_run_gets_file_and_overrides(command: str, config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, config_file]) == 0
    assert "result of from the file" in capsys.readouterr().out
    assert main([command, config_file, "path=a=b"]) == 0
    assert "result of a=b" in capsys.readouterr().out
    assert main([command, config_file, "--quiet", "path=after an option"]) == 0
    assert "result of after an option" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pth=x", "unknown key 'pth'; did you mean 'path'?"),
        ("path", "key=value"),
        ("act=read", "data file from the file does not exist"),
    ],
)
def test_errors_of_the_user(
    command: str, config_file: str, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, config_file, override]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("dirl: error: ") and captured.err.count("\n") == 1
    assert words in captured.err and not captured.out


def test_a_missing_configuration_file(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path / "absent.yaml")]) == 2
    assert capsys.readouterr().err == f"dirl: error: configuration file {tmp_path}/absent.yaml does not exist\n"
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_rank_tells_results_and_the_first_of_a_machine_what_all_refuse(
    command: str, config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local_rank, speaks in (("1", "1", False), ("2", "0", True)):  # the latter: of the second machine
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert main([command, config_file]) == 0
        assert main([command, config_file, "pth=x"]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("dirl: error: ") == speaks


def test_interruption(command: str, config_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, config_file, "act=interrupt"]) == 130
    captured = capsys.readouterr()
    assert (captured.out + captured.err).splitlines() == ["dirl: interrupted"]


@pytest.mark.parametrize("command", ["sft", "rl"], indirect=True)
def test_ranks_take_their_leave_when_all_of_them_end(
    command: str, config_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never after an error of one of them, which would wait for the others."""
    monkeypatch.setattr(StandIn, "left", [])
    assert [main([command, config_file, f"act={act}"]) for act in ("finish", "stop", "read")] == [0, 0, 2]
    assert StandIn.left == ["finish", "stop"]
    assert "stopped by SIGTERM at step 3" in capsys.readouterr().out


def test_a_bug_keeps_its_traceback(command: str, config_file: str) -> None:
    with pytest.raises(json.JSONDecodeError):
        main([command, config_file, "act=break"])
    with pytest.raises(ValueError, match="generate needs one seed per prompt"):  # of dirl's own code, and still a bug
        main([command, config_file, "act=misuse"])


def test_what_the_machine_refuses_is_one_line(
    command: str, config_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, config_file, "act=fill the disk"]) == 1
    assert capsys.readouterr().err == "dirl: error: No space left on device: run/metrics.jsonl\n"


def test_a_terminal_that_cannot_show_a_character_shows_another(
    command: str, config_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert main([command, config_file, "path=\u00fc"]) == 0
    assert b"result of ?" in shown.getvalue()


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        (["--version"], 0, f"dirl {__version__}"),
        (["--help"], 0, "tiny-model"),
        (["rl", "--help"], 0, "key=value"),
        ([], 2, "COMMAND"),
        (["train"], 2, "invalid choice: 'train'"),
        (["rl"], 2, "CONFIG"),
        (["rl", "a.yaml", "--nonsense", "seed=1"], 2, "unrecognized arguments: --nonsense"),
        (["doctor", "more"], 2, "unrecognized arguments: more"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        captured = capsys.readouterr()
        assert caught.value.code == code and words in captured.out + captured.err


def test_what_begins_with_a_minus_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("dirl.console.talk.generate", lambda model, prompt, *_, **__: asked.append(f"{model}|{prompt}"))
    monkeypatch.setattr("dirl.console.talk.chat", lambda model, *_, system_prompt, **__: asked.append(system_prompt))
    for prompt in ("-5+3=", "-5 + 3 =", "-x", "-", "-- no -- "):
        assert main(["generate", "--quiet", "M", prompt, "temperature=0"]) == 0
        assert main(["generate", "M", prompt, "--seed", "3"]) == 0
    assert main(["chat", "M", "--system-prompt", "-be brief"]) == 0
    assert asked == [f"M|{p}" for p in ("-5+3=", "-5 + 3 =", "-x", "-", "-- no -- ") for _ in range(2)] + ["-be brief"]


def test_tiny_model(tmp_path: Path) -> None:
    assert main(["tiny-model", str(tmp_path / "tiny")]) == 0
    names = {path.name for path in (tmp_path / "tiny").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_model_that_is_there_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained/model.safetensors").write_text("weeks of work")
    assert main(["tiny-model", "~/trained"]) == 2  # the home, and no folder that is called ~
    assert "trained holds something already; name a new directory" in capsys.readouterr().err
    assert (tmp_path / "trained/model.safetensors").read_text() == "weeks of work"


def test_a_file_size_limit_is_one_line_and_leaves_nothing_half(tmp_path: Path) -> None:
    """As a full disk: safetensors has a class of its own for it."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))"
    call = f"from dirl.cli import main; raise SystemExit(main(['tiny-model', {str(tmp_path / 'out')!r}]))"
    done = subprocess.run([sys.executable, "-c", f"{limit}\n{call}"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dirl: error: ")]
    assert "out cannot be written: " in line and "File too large" in line and line.endswith("; make room")
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    configs = Path(__file__).parents[1] / "configs"
    assert main(["tiny-model", str(file)]) == 2
    assert capsys.readouterr().err == f"dirl: error: {file} is a file; name a directory for the model\n"
    for name in ("sft", "rl", "eval"):
        assert main([name, str(configs / f"tiny/{name}.yaml"), f"output_dir={file}"]) == 2
        error = capsys.readouterr().err
        assert f"output_dir={file} is a file; name a directory" in error and error.count("\n") == 1
    assert main(["rl", str(configs)]) == 2
    assert f"{configs} is a directory; name a configuration file" in capsys.readouterr().err
    assert file.read_bytes() == b""


def test_help_comes_without_torch() -> None:
    code = "import sys; from dirl.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"


def test_as_a_module_in_a_plain_process(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "dirl.cli", "eval", "absent.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 2 and list(tmp_path.iterdir()) == []
    assert run.stderr.splitlines()[-1] == "dirl: error: configuration file absent.yaml does not exist"
