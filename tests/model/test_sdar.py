"""SDAR == plain Qwen3 with an explicit block mask, dense and mixture of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dirl.model.families.sdar import SDARConfig, SDARForCausalLM, SDARMoeConfig, SDARMoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, tuple[Any, Any, Any, Any, dict[str, Any]]] = {
    "sdar": (SDARConfig, SDARForCausalLM, Qwen3Config, Qwen3ForCausalLM, {}),
    "sdar_moe": (SDARMoeConfig, SDARMoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS),
}


def twins(family: str, block_length: int, attention: str) -> tuple[Any, Any]:
    """Our model and Qwen3's own with the same weights."""
    our_config, our_class, their_config, their_class, more = FAMILIES[family]
    ours = our_class(our_config(**SIZES, **more, block_size=block_length)).eval()
    theirs = their_class(their_config(**SIZES, **more, attn_implementation=attention)).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def block_mask(length: int, block_length: int) -> Tensor:
    """Additive 4D mask: a query reads its own block and those before it."""
    block_L = torch.arange(length) // block_length
    forbidden_LL = block_L[None, :] > block_L[:, None]
    return torch.zeros(1, 1, length, length).masked_fill(forbidden_LL, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block_length", [1, 2, 4, 8])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_qwen3_under_the_block_mask(family: str, block_length: int, attention: str) -> None:
    ours, theirs = twins(family, block_length, attention)
    ids = torch.randint(0, 64, (2, 19))
    expected = theirs(ids, attention_mask=block_mask(19, block_length).expand(2, -1, -1, -1)).logits
    torch.testing.assert_close(ours(ids).logits, expected, atol=2e-5, rtol=1e-5)
    causal = theirs(ids).logits
    assert (float((causal - expected).abs().max()) > 0.1) == (block_length > 1)


@torch.no_grad()
def test_right_padding_is_not_read() -> None:
    model = SDARForCausalLM(SDARConfig(**SIZES)).eval()
    ids = torch.randint(0, 64, (2, 11))
    is_token = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    padded = model(ids, attention_mask=is_token).logits
    torch.testing.assert_close(padded[0], model(ids[:1]).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1, :6], model(ids[1:, :6]).logits[0], atol=1e-5, rtol=1e-5)
    assert padded.isfinite().all()


def test_model_types_are_registered() -> None:
    for name, config_class in (("sdar", SDARConfig), ("sdar_moe", SDARMoeConfig)):
        assert type(AutoConfig.for_model(name)) is config_class


def test_a_model_without_ids_or_plan_says_so() -> None:
    model = SDARForCausalLM(SDARConfig(**SIZES))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.randn(1, 4, 32))
    with pytest.raises(ValueError, match="needs an attention_plan"):
        model.model(input_ids=torch.zeros(1, 4, dtype=torch.int64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_float32_whatever_the_weights(family: str, tied: bool) -> None:
    """Products in float64 of the same half-precision numbers; gradients as those of nn.Linear."""
    config, model_class, *_, more = FAMILIES[family]
    model = model_class(config(**SIZES, **more, tie_word_embeddings=tied)).bfloat16()
    hidden = torch.randn(2, 5, 32).bfloat16().requires_grad_()
    weight = model.lm_head.weight
    assert (weight is model.model.embed_tokens.weight) == tied
    logits = model.lm_head(hidden)
    assert logits.dtype == torch.float32
    exact = hidden.detach().double() @ weight.detach().double().T
    torch.testing.assert_close(logits, exact.float(), rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(logits)
    found = torch.autograd.grad((logits * direction).sum(), (hidden, weight))
    stock = nn.functional.linear(hidden, weight) * direction.bfloat16()
    expected = torch.autograd.grad(stock.sum(), (hidden, weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_logits_are_float32_under_autocast() -> None:
    model = SDARForCausalLM(SDARConfig(**SIZES))
    hidden = torch.randn(3, 32)
    expected = hidden.double() @ model.lm_head.weight.double().T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.lm_head(hidden), expected.float(), rtol=1e-5, atol=1e-5)
