"""LoRA: what is trained, what the reference is, what is pushed and what is saved."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dirl.data.conversations import Document
from dirl.data.problems import Problem
from dirl.errors import UserError
from dirl.model.checkpoint import load, save_model
from dirl.model.lora import LoraConfig, adapters_off, add_adapters, save_adapters
from dirl.model.tiny import tiny
from dirl.reward.rubric import RewardConfig
from dirl.rl.objective import ObjectiveConfig
from dirl.rl.rl_config import RLConfig
from dirl.rl.rollouts import RolloutConfig
from dirl.rl.train import RLTrainer
from dirl.rollout.local.engine import TorchEngine
from dirl.sft.train import SFTConfig, SFTDataConfig, SFTTrainer
from dirl.training.full_parameters import full_state_dict, named_adapter_parameters
from tests.oracle import tiny_moe

peft = pytest.importorskip("peft")

LORA = LoraConfig(r=4, lora_alpha=8)
IDS = torch.arange(40, 64)[None]


def prefers_even(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    return [float(len(completion) % 2 == 0) for completion in completions]


def shaken_model():
    """A model with adapters that do something."""
    model, tokenizer = tiny()
    add_adapters(model, LORA, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval(), tokenizer


@torch.no_grad()
def test_fresh_adapters_change_nothing_and_trained_ones_can_be_switched_off() -> None:
    plain = tiny()[0].eval()
    adapted, _ = shaken_model()
    expected = plain(IDS).logits
    assert not torch.allclose(adapted(IDS).logits, expected, atol=1e-2)
    with adapters_off(adapted):
        torch.testing.assert_close(adapted(IDS).logits, expected)
    fresh, _ = tiny()
    add_adapters(fresh, LORA, seed=0)
    torch.testing.assert_close(fresh.eval()(IDS).logits, expected)
    assert {name.split(".")[-3] for name, p in fresh.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@torch.no_grad()
def test_a_push_merges() -> None:
    adapted, tokenizer = shaken_model()
    engine = TorchEngine(tiny()[0].eval(), tokenizer)
    engine.update_weights(adapted)
    torch.testing.assert_close(engine.model(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4)
    assert full_state_dict(adapted, keep=True).keys() == dict(tiny()[0].named_parameters()).keys()


def test_sft_trains_adapters_alone_and_saves_both_forms(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model, tokenizer = tiny()
    save_model(model, tokenizer, base)
    config = SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        global_batch_size=4,
        learning_rate=1e-2,
        lora=LORA,
        data=SFTDataConfig(num_heldout=0),
    )
    config = replace(config, model=replace(config.model, path=str(base)))
    documents = [Document([1, 2, 3], list(range(40, 40 + length))) for length in range(9, 22)]
    trainer = SFTTrainer(config, documents=documents)
    final = trainer.train()
    with torch.no_grad():
        adapted = trainer.model.eval()(IDS).logits
        before, merged = load(str(base))[0], load(str(final))[0]
        assert not torch.allclose(before(IDS).logits, adapted, atol=1e-3)
        torch.testing.assert_close(merged(IDS).logits, adapted, atol=1e-4, rtol=1e-4)
        over_base = peft.PeftModel.from_pretrained(before, str(final / "adapter")).eval()
        torch.testing.assert_close(over_base(IDS).logits, adapted, atol=1e-4, rtol=1e-4)


def test_the_reference_of_rl_is_the_model_without_its_adapters(tmp_path: Path) -> None:
    model, tokenizer = tiny()
    config = RLConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        learning_rate=1e-2,
        objective=ObjectiveConfig(beta=0.1),
        lora=LORA,
        rollout=RolloutConfig(prompts_per_step=3, num_generations=4, max_completion_length=12),
        reward=RewardConfig(functions=["tests.model.test_lora:prefers_even"]),
    )
    problems = [Problem("?" * length, "0", {}) for length in range(1, 8)]
    trainer = RLTrainer(config, model=model, tokenizer=tokenizer, problems=problems)
    first, second = trainer.step(), trainer.step()
    assert first["kl"] == pytest.approx(0, abs=1e-7) and second["kl"] > 1e-6
    assert first["sampling/logp_difference/max"] < 1e-3  # the engine decodes with the adapters
    start = tiny()[0].state_dict()
    kept = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters() if ".lora_" not in n}
    assert all(torch.equal(kept[name], start[name]) for name in kept)


def test_adapters_of_a_bfloat16_model_are_float32() -> None:
    model = tiny()[0].bfloat16()
    add_adapters(model, LORA, seed=0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model(IDS).logits.sum().backward()
    assert {p.dtype for p in full_state_dict(model, keep=True).values()} == {torch.bfloat16}


def test_without_targets_it_is_every_known_layer_that_is_there(tmp_path: Path) -> None:
    """The experts of a mixture are one tensor: adapters stand beside its attention alone."""
    model, _ = tiny_moe()
    add_adapters(model, LORA, seed=0)
    adapters = named_adapter_parameters(model, keep=True)
    assert len(adapters) == 2 * 4 * model.config.num_hidden_layers
    save_adapters(adapters, LORA, "base", tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(saved["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    dense, _ = tiny()
    add_adapters(dense, LORA, seed=0)
    assert len(named_adapter_parameters(dense, keep=True)) == 2 * 7 * dense.config.num_hidden_layers


def test_a_target_that_is_no_layer_is_an_error() -> None:
    with pytest.raises(UserError, match=r"lora.target_modules: \['query'\] names no linear layer; choose .*q_proj"):
        add_adapters(tiny()[0], LoraConfig(r=2, target_modules=["query"]), seed=0)
