"""Any checkpoint is a model: what is exported, opened by name and listed, against the model of the run itself.

This file is also the script that processes of a backend run: `test_export.py OUT KIND`.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rich.console import Console

import dirl
from dirl import files
from dirl.cli import main
from dirl.console.export import export
from dirl.console.list_runs import line_of, list_runs
from dirl.data.conversations import Document
from dirl.errors import UserError
from dirl.eval.scores import read_scores
from dirl.files import append_json_lines
from dirl.model.checkpoint import ModelConfig
from dirl.model.lora import LoraConfig
from dirl.model.model_path import find_model
from dirl.model.tiny import save_tiny_model
from dirl.reward.rubric import RewardConfig
from dirl.rl.rl_config import RLConfig, RLDataConfig, RLEvalConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.full_parameters import digest_of_weights, full_state_dict
from tests.launching import launch_script

IDS = torch.arange(40, 64)[None]
STEP_2 = "checkpoints/step_000002"
DOCUMENTS = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 22)]


def trainer_in(folder: Path, name: str = "run", **changes: Any) -> SFTTrainer:
    """Four steps from folder/base, a checkpoint every two, an evaluation after each."""
    base = folder / "base"
    if not base.exists():
        save_tiny_model(base, seed=1)
    config = SFTConfig(
        output_dir=str(folder / name),
        model=ModelConfig(path=str(base)),
        max_steps=4,
        global_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        eval_steps=1,
        data=SFTDataConfig(num_heldout=2),
    )
    return SFTTrainer(replace(config, **changes), documents=DOCUMENTS)


@torch.no_grad()
def logits_of(path: str | Path) -> torch.Tensor:
    return dirl.load(str(path))[0](IDS).logits


def run_backend(folder: Path, kind: str) -> None:
    """Two steps and their checkpoint under the launched backend; the whole weights beside it."""
    changes: dict[str, Any] = {"max_steps": 2}
    if kind == "lora":
        changes["lora"] = LoraConfig(r=4, lora_alpha=8)
    trainer = trainer_in(folder, **changes)
    trainer.train()
    weights = full_state_dict(trainer.distributed.unwrap(trainer.learner.module).model, keep=True)
    if trainer.distributed.is_main:
        torch.save(weights, folder / "weights.pt")
    trainer.distributed.close()


BACKENDS = [
    pytest.param("ddp", "full"),
    *(pytest.param(name, "full", marks=pytest.mark.matrix) for name in ("zero1", "zero2", "zero3", "fsdp2")),
    *(pytest.param(name, "lora", marks=pytest.mark.matrix) for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")),
]


@pytest.mark.parametrize(("backend", "kind"), BACKENDS)
def test_a_checkpoint_of_any_backend_is_the_model_that_ran(backend: str, kind: str, tmp_path: Path) -> None:
    if backend.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs the deepspeed extra")
    save_tiny_model(tmp_path / "base", seed=1)
    done = launch_script(__file__, str(tmp_path), kind, backend=backend, num_processes=2, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    run, out = tmp_path / "run", tmp_path / "out"
    export(f"{run}@2", out)
    expected = torch.load(tmp_path / "weights.pt", weights_only=True)
    exported = dict(dirl.load(str(out))[0].named_parameters())
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())
    assert torch.equal(logits_of(run / STEP_2), logits_of(run / "final"))
    assert (logits_of(out) - logits_of(tmp_path / "base")).abs().max() > 1e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; its best held-out loss is not where it ended, by a line changed here."""
    folder = tmp_path_factory.mktemp("runs")
    trainer_in(folder, metric_for_best_model="eval/loss", greater_is_better=False, save_total_limit=0).train()
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A copy whose best is step 2, as its lines say."""
    copied = shutil.copytree(folder / "run", tmp_path / "run")
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    (copied / "metrics.jsonl").unlink()
    append_json_lines(copied / "metrics.jsonl", [row | {"eval/loss": abs(row["step"] - 2) - 9.0} for row in lines])
    return copied


def names_of(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*")} - {"export.json", "README.md"}


def test_each_way_to_name_a_checkpoint(run: Path) -> None:
    final, second = logits_of(run / "final"), logits_of(run / STEP_2)
    assert not torch.equal(final, second)
    assert torch.equal(logits_of(run), final) and torch.equal(logits_of(f"{run}@4"), final)
    assert torch.equal(logits_of(f"{run}@best"), second) and torch.equal(logits_of(f"{run}@000002"), second)
    shutil.rmtree(run / "final")
    assert torch.equal(logits_of(run), final)
    shutil.rmtree(run / "checkpoints/step_000004")
    (run / "checkpoints/step_000003/optimizer.bin").unlink()  # damaged: passed over
    assert torch.equal(logits_of(run), second)


def test_a_run_that_goes_on_after_its_end_is_its_newest_checkpoint(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["config"]["max_steps"] = 9
    (run / "run.json").write_text(json.dumps(record))
    assert find_model(str(run)).checkpoint == run / "checkpoints/step_000004"


def test_a_directory_goes_before_a_step(run: Path) -> None:
    shutil.copytree(run / "final", run.with_name("run@2"))
    assert find_model(f"{run}@2").checkpoint is None
    assert torch.equal(logits_of(f"{run}@2"), logits_of(run / "final"))


def test_an_export_is_what_the_run_writes_as_final(run: Path, tmp_path: Path) -> None:
    assert main(["export", str(run / "checkpoints/step_000004"), str(tmp_path / "out")]) == 0
    assert names_of(tmp_path / "out") == names_of(run / "final")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (run / "final" / name).read_bytes(), name
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(run / "final"))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0  # an export is replaced
    assert json.loads((tmp_path / "out/export.json").read_text()) == {"model": str(run), "of": "final"}


def test_a_step_of_a_run_is_served(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve = pytest.importorskip("dirl.rollout.server.serve", reason="pip install 'dirl[serve]'")
    configs: list[Any] = []
    monkeypatch.setattr(serve, "serve", configs.append)
    assert main(["serve", f"{run}@2", "engine.engine=torch"]) == 0
    api = serve.load(configs[0])
    with torch.no_grad():
        served = api.rollouts.model(IDS).logits
    api.rollouts.close()
    assert torch.equal(served, logits_of(run / STEP_2)) and not torch.equal(served, logits_of(run / "final"))


def test_the_base_may_be_a_run_or_gone(folder: Path, run: Path) -> None:
    second = trainer_in(folder, "second", model=ModelConfig(path=f"{run}@2"), max_steps=2, learning_rate=0.0)
    second.train()
    assert torch.equal(logits_of(f"{folder}/second@2"), logits_of(f"{run}@2"))
    shutil.rmtree(run)
    assert torch.equal(logits_of(f"{folder}/second@2"), logits_of(folder / "second/final"))
    shutil.rmtree(folder / "second/final")
    with pytest.raises(UserError, match="which is not there"):
        find_model(f"{folder}/second@2")
    shutil.rmtree(folder / "second")


def test_stages_have_their_block_length(folder: Path) -> None:
    stages: list[dict[str, object]] = [{"from_step": 2, "model": {"block_length": 2}}]
    trainer_in(folder, "stages", stages=stages).train()
    lengths = [dirl.load(f"{folder}/stages@{step}")[0].config.block_size for step in (2, 4)]
    assert lengths == [4, 2] and dirl.load(str(folder / "stages"))[0].config.block_size == 2
    shutil.rmtree(folder / "stages")


def test_lora_is_merged_or_stands_alone(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    trainer_in(folder, "lora", lora=LoraConfig(r=4, lora_alpha=8)).train()
    run, expected = folder / "lora", logits_of(folder / "lora/final")
    assert torch.equal(logits_of(f"{run}@4"), expected) and not torch.equal(logits_of(f"{run}@2"), expected)
    for number, name in enumerate((f"{run}@4", str(run))):  # of the checkpoint, and of final/
        out = tmp_path / f"adapter_{number}"
        assert main(["export", name, str(out), "--adapter"]) == 0
        with torch.no_grad():
            adapted = peft.PeftModel.from_pretrained(dirl.load(str(folder / "base"))[0], out).eval()
            torch.testing.assert_close(adapted(IDS).logits, expected)
    shutil.rmtree(run)


def test_a_failure_in_the_middle_leaves_what_was_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "exports/out"

    def fail(*_: object) -> None:
        assert (out.with_name("out.tmp") / "config.json").is_file()
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "force_to_disk", fail)
    with pytest.raises(UserError, match=f"{out} cannot be written: OSError: No space left on device; make room"):
        export(f"{run}@2", out)
    assert list(out.parent.iterdir()) == []
    monkeypatch.undo()
    export(f"{run}@2", out)
    monkeypatch.setattr(files, "force_to_disk", fail)
    with pytest.raises(UserError, match="No space"):
        export(f"{run}@4", out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert torch.equal(logits_of(out), logits_of(f"{run}@2"))
    monkeypatch.undo()
    export(f"{run}@4", out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("{run}@3000", "no such checkpoint; it has step 1, step 2, step 3, step 4, final/"),
        ("{run}@newest", "no such checkpoint"),
        ("{run}/final", "is no run and no checkpoint"),
        ("{run}/nothing", "is no run and no checkpoint"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    model: str, words: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", model.format(run=run), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_errors_name_path_and_remedy(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"{run}@2", str(run / "final")]) == 2
    assert "is there and is no export" in capsys.readouterr().err
    assert main(["export", f"{run}@2", str(tmp_path / "out"), "--adapter"]) == 2
    assert "trained without LoRA" in capsys.readouterr().err
    with (run / STEP_2 / "model.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02")
    assert main(["generate", f"{run}@2", "1+1="]) == 2
    assert "model.safetensors is damaged; name another step" in capsys.readouterr().err
    record = json.loads((run / "run.json").read_text())
    record["config"]["metric_for_best_model"] = ""
    (run / "run.json").write_text(json.dumps(record))
    assert main(["generate", f"{run}@best", "1+1="]) == 2
    assert "the run kept no best" in capsys.readouterr().err
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints")
    assert main(["generate", str(run), "1+1="]) == 2
    assert "holds no model yet" in capsys.readouterr().err


def test_commands_take_each_form(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for model in (f"{run}@best", str(run / STEP_2), str(run)):
        arguments = ["generate", model, "1+1=", "--quiet", "max_completion_length=16", "temperature=0"]
        assert main(arguments) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    weights = []
    for number, model in enumerate((f"{run}@best", f"{run}@4")):
        (tmp_path / "problems.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n')
        keys = {
            "model.path": model,
            "output_dir": tmp_path / f"eval_{number}",
            "data.datasets": f"[{tmp_path}/problems.jsonl]",
            "sampling.max_completion_length": 16,
        }
        assert main(["eval", "configs/tiny/eval.yaml", *(f"{key}={value}" for key, value in keys.items())]) == 0
        weights.append(json.loads((tmp_path / f"eval_{number}/samples_header.json").read_text())["model.weights"])
    assert weights == [digest_of_weights(dirl.load(f"{run}@{step}")[0]) for step in (2, 4)]
    assert weights[0] != weights[1]


def even_length(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def test_the_best_evaluates_to_what_the_run_logged(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"question": "{"?" * n}", "answer": "0"}}\n' for n in range(1, 9)))
    rollout = RolloutConfig(prompts_per_step=3, num_generations=4, max_completion_length=12)
    config = RLConfig(
        output_dir=str(tmp_path / "run"),
        model=ModelConfig(path=str(tmp_path / "base")),
        max_steps=4,
        learning_rate=1e-2,
        eval_steps=1,
        metric_for_best_model="eval/accuracy",
        greater_is_better=False,  # the reward is learned: what is best by this is not the end
        save_total_limit=1,
        data=RLDataConfig(path=str(tmp_path / "rows.jsonl")),
        eval=RLEvalConfig(path=str(tmp_path / "rows.jsonl")),
        rollout=rollout,
        reward=RewardConfig(functions=[f"{__file__}:even_length"]),
    )
    RLTrainer(config).train()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = [{name: row[name] for name in row if name.startswith("eval/")} for row in rows]
    best = min(logged, key=lambda row: row["eval/accuracy"])
    for name, expected in (("best", best), ("4", logged[-1])):
        again = replace(config, model=ModelConfig(path=f"{tmp_path}/run@{name}"), output_dir=str(tmp_path / "again"))
        assert RLTrainer(again).evaluate() == expected
    assert best["eval/accuracy"] < logged[-1]["eval/accuracy"]
    kept = read_scores(tmp_path / "run")  # for comparisons: problem by problem what the numbers are means of
    assert sorted(kept) == ["eval/accuracy", "eval/greedy/accuracy"] and all(len(right) == 8 for right in kept.values())
    means = {name: fmean(right.values()) for name, right in kept.items()}
    assert means == pytest.approx({name: logged[-1][name] for name in kept})


def shown(folder: Path) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        list_runs(str(folder), console)
    return captured.get()


def test_runs_are_listed_from_their_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run.parent
    half = folder / "half"
    half.mkdir()
    (half / "metrics.jsonl").write_text('{"step": 1, "timing_s/step": 3600.0, "eval/accuracy": 0.5}\n{"step": 2, "lo')
    broken = folder / "broken"
    shutil.copytree(run, broken)
    (broken / "metrics.jsonl").write_text("nonsense\n")
    evaluation = folder / "evaluation"
    evaluation.mkdir()
    (evaluation / "run.json").write_text(json.dumps({"config": {"output_dir": "x"}}))
    lines = shown(folder).splitlines()
    assert [line.split()[0] for line in lines if "/4" in line or "/?" in line] == ["broken", "half", "run"]
    (row,) = (line.split() for line in lines if line.split()[:1] == ["run"] and "4/4" in line)
    assert row[1:6] == ["sft", "4/4", "-9", "@", "2"]
    (row,) = (line.split() for line in lines if line.split()[:1] == ["half"] and "1/?" in line)
    assert row[1:7] == ["-", "1/?", "-", "50.0", "%", "-"] and row[7] == "1:00:00"
    assert any(line.startswith("broken: ") and "metrics.jsonl, line 1" in line for line in lines)
    assert any(line.startswith("half: run.json") for line in lines)
    assert main(["runs", str(folder / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_time_and_cost_of_steps_that_were_not_logged(tmp_path: Path) -> None:
    record: dict[str, Any] = {"config": {"max_steps": 20, "rollout": {}, "num_iterations": 2}}  # of an older run
    record |= {"hardware": {"gpus": ["H100"] * 8, "cpu_cores": 2}, "num_processes": 16}
    (tmp_path / "run.json").write_text(json.dumps(record))
    rows = [{"step": step, "timing_s/step": 360.0, "timing_s/save": 40.0, "num_tokens": 9000} for step in (10, 20)]
    append_json_lines(tmp_path / "metrics.jsonl", rows)  # five batches of two steps each a line
    line = line_of(tmp_path, "x")
    assert line is not None and (line.stage, line.time, line.cost) == ("rl", "1:01:20", "16.36 GPU-h")
    assert (line.trained, line.rolled_out, line.rates, line.mfu) == ("90 k", "-", "1.56", "-")


if __name__ == "__main__":
    run_backend(Path(sys.argv[1]), sys.argv[2])
