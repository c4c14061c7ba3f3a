"""Estimates of memory against what a tiny model really holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dirl.cli import main
from dirl.config import load_config
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import replay_views
from dirl.model.checkpoint import ModelConfig
from dirl.model.families.sdar import SDARConfig
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.memory import Workload, estimate_memory, trained_fraction
from dirl.model.tiny import save_tiny_model, tiny
from dirl.rl.rl_config import RLConfig, rl_workload

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
    for backend, shares in {"ddp": (1, 1, 1), "zero1": (1, 1, 4), "zero2": (1, 4, 4), "fsdp2": (4, 4, 4)}.items():
        uses = estimate_memory(config, work, backend, 4).uses
        expected = [size / shares[0], size / shares[1], 2 * size / shares[2]]
        assert [uses[name] for name in ("weights", "gradients", "optimizer")] == pytest.approx(expected)


def test_adapters_are_counted_exactly(config: ModelConfig) -> None:
    pytest.importorskip("peft")
    model, _ = tiny()
    total = sum(p.numel() for p in model.parameters())
    lora = LoraConfig(r=4)
    add_adapters(model, lora, seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_fraction(config, lora) == pytest.approx(trained / total)


def test_activations_are_near_what_autograd_keeps(config: ModelConfig) -> None:
    model, _ = tiny()
    documents = []
    for length in range(60, 124, 4):
        ids = torch.arange(length) % 200
        trajectory = Trajectory(ids[:8], ids, torch.ones_like(ids), 4)
        documents.append(ViewedDocument(ids[:8], [replay_views(trajectory, model.config.mask_token_id)]))
    packed = pack(documents, 4)
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        PackedScorer(model, "sdpa")(packed, rule).logprob_T.sum()
    work = Workload(tokens_per_micro_batch=len(packed), bf16=False)
    uses = estimate_memory(config, work, "ddp", 1).uses
    measured = sum(kept.values())
    assert 0.5 < measured / (uses["activations"] + uses["logits"]) < 1.5, (measured, uses)


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


def gigabytes(config: RLConfig, backend: str) -> dict[str, float]:
    uses = estimate_memory(config.model, rl_workload(config), backend, 8).uses
    return {name: round(size / 1e9, 1) for name, size in uses.items()}


def test_the_shipped_recipe_of_8b_needs_what_its_page_says(big: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(big, "rollout.engine=lmdeploy")
    found = gigabytes(config, "zero1")
    assert 10 < found.pop("activations") < 25
    assert found == {
        "weights": 16.4,
        "gradients": 32.8,
        "optimizer": 12.3,
        "critic": 0,
        "copies": 0,
        "engine_weights": 16.4,
        "logits": 0.5,
        "kv_cache": 0,
    }
    page = (ROOT / "docs/lmdeploy.md").read_text(encoding="utf-8")
    for row in ("weights | 16 |", "float32 on each rank | 33 |", "over 8 ranks | 12 |", "awake, 1 and 2) | 16 |"):
        assert row in page
    arguments = ["rl", "--estimate-memory", str(ROOT / "configs/sdar_8b/rl.yaml"), f"model.path={big}"]
    assert main([*arguments, "rollout.engine=lmdeploy"]) == 0
    assert "lmdeploy's KV cache takes 0.4 of what is free when it starts" in capsys.readouterr().out
    assert main([*arguments, "rollout.engine=torch"]) == 0
    assert "347.89 GB hold all 256" in capsys.readouterr().out


def test_only_the_engine_in_use_is_counted(big: str) -> None:
    per_token, weights, longest = 2 * 36 * 8 * 128 * 2 / 1e9, 16.4, 1024 + 8192

    def engine_uses(backend: str, *overrides: str) -> tuple[float, float]:
        found = gigabytes(recipe(big, *overrides), backend)
        return found["engine_weights"], found["kv_cache"]

    def tokens(count: int) -> float:
        return round(count * per_token, 1)

    torch_engine = "rollout.engine=torch"
    assert engine_uses("zero1", torch_engine) == (0, tokens(longest))
    assert engine_uses("zero3", torch_engine) == (weights, tokens(longest))
    assert engine_uses("zero1", torch_engine, "rollout.max_cached_tokens=100000") == (0, tokens(100_000))
    bounds = ("rollout.max_cached_tokens=100000", "rollout.max_batch_size=4")
    assert engine_uses("zero1", torch_engine, *bounds) == (0, tokens(4 * longest))
    assert engine_uses("zero3", "rollout.engine=lmdeploy") == (weights, 0)
    assert engine_uses("zero3", torch_engine, "rollout.mode=server") == (0, 0)


def test_float32_weights_under_autocast_cache_in_half_precision(big: str) -> None:
    options = ("rollout.engine=torch", "model.dtype=float32", "rollout.max_cached_tokens=100000")
    assert gigabytes(recipe(big, *options), "ddp")["kv_cache"] == 14.7
    assert gigabytes(recipe(big, *options, "bf16=false"), "ddp")["kv_cache"] == 29.5


def test_the_command_loads_no_model(config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--estimate-memory", str(ROOT / "configs/tiny/rl.yaml"), f"model.path={config.path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    assert main(["sft", "--estimate-memory", str(ROOT / "configs/tiny/sft.yaml"), "model.path=/nowhere/at/all"]) == 2
