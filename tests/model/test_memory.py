"""Estimates of memory against what a tiny model really holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dirl.cli import main
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import replay_views
from dirl.model.checkpoint import ModelConfig
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.lora import LoraConfig, add_adapters
from dirl.model.memory import Workload, estimate_memory, trained_fraction
from dirl.model.tiny import save_tiny_model, tiny


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
        parts = estimate_memory(config, work, backend, 4).parts
        expected = [size / shares[0], size / shares[1], 2 * size / shares[2]]
        assert [parts[name] for name in ("weights", "gradients", "optimizer")] == pytest.approx(expected)


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
    parts = estimate_memory(config, work, "ddp", 1).parts
    measured = sum(kept.values())
    assert 0.5 < measured / (parts["activations"] + parts["logits"]) < 1.5, (measured, parts)


def test_the_command_loads_no_model(config: ModelConfig, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    assert main(["rl", "--estimate-memory", str(root / "configs/tiny/rl.yaml"), f"model.path={config.path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    assert main(["sft", "--estimate-memory", str(root / "configs/tiny/sft.yaml"), "model.path=/nowhere/at/all"]) == 2
