"""The in-process engine: the contract of every engine, and what is its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.register_assert_rewrite("tests.rollout.engine_contract")

from dirl.model.sdar import BlockDiffusionModel  # noqa: E402
from dirl.rollout.engine import SamplingConfig  # noqa: E402
from dirl.rollout.torch_engine import TorchEngine  # noqa: E402
from tests.rollout.engine_contract import (  # noqa: E402
    DYNAMIC,
    EngineContract,
    PreTrainedTokenizerBase,
    likely_to_stop,
    random_prompts,
)


class TestTorchEngine(EngineContract):
    def make_engine(
        self, model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256
    ) -> TorchEngine:
        return TorchEngine(model, tokenizer, max_batch_size=max_batch_size)


def test_the_trainers_module_keeps_its_mode_and_its_gradients() -> None:
    model, tokenizer = likely_to_stop()
    model.train()
    TorchEngine(model, tokenizer).generate([[1, 2, 3]], DYNAMIC, [0])
    assert model.training
    model(torch.tensor([[1, 2, 3, 4]])).logits.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_mode_is_restored_when_decoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = likely_to_stop()
    model.train()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    engine = TorchEngine(model, tokenizer)
    monkeypatch.setattr(engine, "_forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate([[1, 2, 3]], DYNAMIC, [0])
    assert model.training


def test_it_decodes_with_the_module_it_was_given() -> None:
    """No copy: a change of the trainer's weights is a change of the engine's."""
    model, tokenizer = likely_to_stop()
    engine = TorchEngine(model, tokenizer)
    before = engine.generate(random_prompts([5, 6]), DYNAMIC, [0, 1])
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    assert engine.generate(random_prompts([5, 6]), DYNAMIC, [0, 1]) != before


@pytest.mark.parametrize("wrong", ["broadcast", "more", "fewer"])
def test_a_push_from_another_configuration_is_named(wrong: str) -> None:
    (ours, tokenizer), (donor, _) = likely_to_stop(), likely_to_stop(seed=5)
    if wrong == "broadcast":
        donor.model.norm.weight = nn.Parameter(torch.ones(1))
    elif wrong == "more":  # untied where the engine's are tied
        donor.lm_head.weight = nn.Parameter(torch.zeros_like(donor.lm_head.weight))
    else:
        ours.lm_head.weight = nn.Parameter(torch.zeros_like(ours.lm_head.weight))
    name = "model.norm.weight" if wrong == "broadcast" else "lm_head.weight"
    with pytest.raises(ValueError, match=rf"update_weights: {name} is .* same configuration"):
        TorchEngine(ours, tokenizer).update_weights(donor)


def test_prompts_read_in_several_passes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = likely_to_stop()
    prompts, seeds = random_prompts([30, 5, 17, 3, 24, 40]) * 2, list(range(12))
    expected = TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds)
    monkeypatch.setattr("dirl.rollout.torch_engine._PREFILL_TOKENS", 32)
    found = TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_completion_length", 0),
        ("confidence_threshold", 1.5),
        ("denoising_steps", -1),
        ("entropy_bound", -0.1),
    ],
)
def test_bad_sampling_is_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key} must be .*got {value}"):
        SamplingConfig(**{key: value})  # type: ignore[arg-type]
