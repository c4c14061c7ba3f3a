"""Estimates of memory against what a tiny model really holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dirl.cli import main
from dirl.config import load_config
from dirl.model.checkpoint import ModelConfig, load
from dirl.model.families.sdar import SDARConfig
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.memory import EngineLoad, RunMemory, Workload
from dirl.model.tiny import save_tiny_model, tiny
from dirl.rl.rl_config import RLConfig, rl_workload
from dirl.rollout.local.block_cache import BlockCache
from tests.model.published import PUBLISHED, write

ENGINE = EngineLoad(
    name="torch",
    longest_prompt=32,
    longest=64,
    batch_size=1,
    prefill_tokens=1024,
    canvas_tokens=1024,
    window=32,
)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    save_tiny_model(tmp_path / "tiny")
    (tmp_path / "tiny/model.safetensors").unlink()  # an estimate loads no weights
    return ModelConfig(path=str(tmp_path / "tiny"))


def test_weights_gradients_and_optimizer_are_counted_exactly(config: ModelConfig) -> None:
    model, _ = tiny()
    size = 4.0 * sum(p.numel() for p in model.parameters())
    work = Workload(tokens_per_micro_batch=1024, bf16=False)
    # zero1 and zero2 update float32 copies of the weights, zero3 the weights themselves.
    shares = {"ddp": (1, 1, 2), "zero1": (1, 1, 3 / 4), "zero2": (1, 1 / 4, 3 / 4), "zero3": (1 / 4, 1 / 4, 2 / 4)}
    for backend, parts in {**shares, "fsdp2": (1 / 4, 1 / 4, 2 / 4)}.items():
        uses = RunMemory(config, work).under(backend, 4).uses
        assert [uses[name] for name in ("weights", "gradients", "optimizer")] == [size * part for part in parts]


def test_adapters_are_counted_exactly(config: ModelConfig) -> None:
    pytest.importorskip("peft")
    model, _ = tiny()
    lora = LoraConfig(r=4)
    add_adapters(model, lora, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    uses = RunMemory(config, Workload(tokens_per_micro_batch=64, bf16=False, lora=lora)).under("ddp", 1).uses
    assert uses["weights"] == sum(p.nbytes for p in model.parameters())
    assert (uses["gradients"], uses["optimizer"]) == (4 * trained, 8 * trained)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_family_has_weights_and_a_cache_of_the_size_counted(name: str, tmp_path: Path) -> None:
    write(PUBLISHED[name](), tmp_path)
    model, _ = load(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    engine = replace(ENGINE, longest=61, batch_size=5, max_cached_tokens=4 * 64)
    work = Workload(tokens_per_micro_batch=256, bf16=False, engine=engine)
    uses = RunMemory(ModelConfig(path=str(tmp_path)), work).under("ddp", 1).uses
    assert uses["weights"] == sum(p.nbytes for p in model.parameters())
    trained = [p for name, p in model.named_parameters() if "correction_bias" not in name]  # that has no gradient
    assert uses["gradients"] == sum(p.nbytes for p in trained)
    assert uses["optimizer"] == 2 * uses["gradients"]
    if model.scheme.is_full:
        assert uses["kv_cache"] == 0
        return
    cache = BlockCache(model, num_slots=4, length=64)  # whole blocks, and whole sequences
    assert uses["kv_cache"] == sum(tensor.nbytes for layer in cache.layers for tensor in layer)


@pytest.fixture
def big(tmp_path: Path) -> str:
    """A directory with nothing but the config.json of SDAR-8B."""
    SDARConfig(
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
        architectures=["SDARForCausalLM"],
    ).save_pretrained(tmp_path / "SDAR-8B")
    return str(tmp_path / "SDAR-8B")


def recipe(path: str, *overrides: str) -> RLConfig:
    return load_config(RLConfig, ROOT / "configs/sdar_8b/rl.yaml", [f"model.path={path}", *overrides])


def printed(text: str) -> dict[str, dict[str, float]]:
    """The table that the command prints: use -> backend -> GB."""
    head, *lines = text.splitlines()
    backends = head.split()[-5:]
    rows = [line.rsplit(maxsplit=5) for line in lines if line[-3:-2] == "."]
    return {title.strip(): dict(zip(backends, map(float, sizes), strict=True)) for title, *sizes in rows}


def test_the_shipped_recipe_of_8b_needs_what_its_page_says(big: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rl", "--estimate-memory", str(ROOT / "configs/sdar_8b/rl.yaml"), f"model.path={big}"]
    assert main([*arguments, "rollout.engine=lmdeploy"]) == 0
    out = capsys.readouterr().out
    page = (ROOT / "docs/lmdeploy.md").read_text(encoding="utf-8")
    found = {title: sizes["zero1"] for title, sizes in printed(out).items()}
    assert found["weights"] == 16.38 and found["gradients"] == 32.76  # 8.19e9 parameters
    for row, titles in PAGE.items():
        assert f"| {row} | {sum(found[title] for title in titles):.0f} |" in page, row
    assert "lmdeploy's KV cache takes 0.4 of what is free when it starts" in out
    assert "Left out" in out and "ddp and fsdp2 refuse to train bfloat16 weights" in out


# Row of docs/lmdeploy.md -> rows of the estimate that it sums.
PAGE = {
    "trainer: weights": ["weights"],
    "trainer: gradients, which ZeRO-1 adds up in float32 on each rank": ["gradients"],
    "trainer: master weights and Adam moments in float32, over 8 ranks": ["optimizer states, master weights"],
    "trainer: activations of 43k packed tokens, with checkpointing of layers": ["T  activations kept for backward"],
    "trainer: logits, and a layer's own work in the backward pass": [
        "T  logits and what is made of them",
        "T  work of a layer in backward",
    ],
    "engine: weights (levels 0 and, awake, 1 and 2)": ["weights of the engine's own"],
    "engine: a pass, with logits and their float64 sums": ["R  a decoding pass and its logits"],
    "**most while training, the engine asleep**": ["most while training"],
    "**most while rolling out, without the KV cache**": ["most while rolling out"],
}


def test_only_the_engine_in_use_is_counted(config: ModelConfig) -> None:
    per_token, longest = 2 * 4 * 2 * 32 * 2, 1024 + 8192
    base = RunMemory(config, Workload(tokens_per_micro_batch=64, bf16=False)).under("ddp", 1).uses["weights"]

    def engine_uses(backend: str, *overrides: str) -> tuple[float, float]:
        run = recipe(config.path, "model.dtype=float32", "max_tokens_per_micro_batch=1024", *overrides)
        uses = RunMemory(run.model, rl_workload(run)).under(backend, 8).uses
        return uses["engine_weights"], uses["kv_cache"]

    torch_engine = "rollout.engine=torch"
    assert engine_uses("zero1", torch_engine) == (0, longest * per_token)
    assert engine_uses("zero3", torch_engine) == (base, longest * per_token)
    # Whole sequences: ten of 9216 tokens, and in float32 where nothing is autocast.
    bound = (torch_engine, "rollout.max_cached_tokens=100000")
    assert engine_uses("zero1", *bound) == (0, 10 * longest * per_token)
    assert engine_uses("zero1", *bound, "bf16=false") == (0, 20 * longest * per_token)
    assert engine_uses("zero1", *bound, "rollout.max_batch_size=4") == (0, 4 * longest * per_token)
    assert engine_uses("zero3", "rollout.engine=lmdeploy") == (base / 2, 0)
    assert engine_uses("zero3", torch_engine, "rollout.mode=server") == (0, 0)


def test_an_engine_that_sleeps_takes_nothing_while_the_trainer_works(config: ModelConfig) -> None:
    work = Workload(tokens_per_micro_batch=64, bf16=False, engine=replace(ENGINE, name="lmdeploy", sleeps=True))
    asleep, awake = (
        RunMemory(config, each).under("zero1", 2)
        for each in (work, replace(work, engine=replace(ENGINE, name="lmdeploy")))
    )
    assert awake.rollout == asleep.rollout
    assert awake.training == asleep.training + asleep.uses["engine_weights"]


@pytest.mark.parametrize(("name", "stage"), [("llada", "rl"), ("llada2", "sft")])
def test_the_command_knows_every_family_and_loads_no_model(
    name: str, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(PUBLISHED[name](), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert main([stage, "--estimate-memory", str(ROOT / f"configs/tiny/{stage}.yaml"), f"model.path={tmp_path}"]) == 0
    out = capsys.readouterr().out
    found = printed(out)
    assert {"weights", "most while training"} <= found.keys() and "Left out" in out
    assert ("R  a decoding pass and its logits" in found) == (stage == "rl") and "R  KV cache" not in found
    assert found["most while training"]["ddp"] >= found["T  activations kept for backward"]["ddp"] > 0


def test_what_is_no_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--estimate-memory", str(ROOT / "configs/tiny/sft.yaml"), "model.path=/nowhere/at/all"]) == 2
    assert "no such directory" in capsys.readouterr().err
