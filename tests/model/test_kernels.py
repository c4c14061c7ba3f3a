"""Fused kernels: patched in when a GPU and the package are there, refused when asked for without them."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dirl.model.checkpoint import default_device
from dirl.model.kernels import use_fused_kernels
from dirl.model.tiny import tiny
from tests.oracle import tiny_moe


def liger_for(kind: str, ran: Counter[str]) -> Callable[..., None]:
    """As liger_kernel 0.5 patches a model, with kernels that count instead of being faster."""

    def counted(module: nn.Module, name: str) -> None:
        plain = module.forward
        module.forward = lambda *given, **named: ran.update([name]) or plain(*given, **named)  # type: ignore[method-assign]

    def apply(
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: nn.Module | None = None,
    ) -> None:
        assert model is not None, "all models of the process would be patched"
        assert rope and not cross_entropy and model.config.model_type == kind  # type: ignore[union-attr]
        if fused_linear_cross_entropy:
            counted(model, "lm_head")
        for name, module in model.named_modules():
            if (rms_norm and name.endswith("norm")) or (swiglu and name.endswith("mlp")):
                counted(module, name.rpartition(".")[2])

    return apply


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A machine with a GPU and liger_kernel; how often each of its kernels ran."""
    counts: Counter[str] = Counter()
    module = SimpleNamespace(
        apply_liger_kernel_to_qwen3=liger_for("sdar", counts),
        apply_liger_kernel_to_qwen3_moe=liger_for("sdar_moe", counts),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=module))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return counts


@pytest.mark.parametrize("make", [tiny, tiny_moe])
@pytest.mark.parametrize("kernels", ["auto", "liger"])
def test_norms_and_mlps_are_fused_and_lm_head_is_not(
    kernels: Any, make: Callable[[], tuple[Any, Any]], ran: Counter[str]
) -> None:
    model, _ = make()
    layers = model.config.num_hidden_layers
    ids = torch.randint(5, 200, (2, 8))
    expected = model(ids).logits
    use_fused_kernels(model, kernels)
    assert torch.equal(model(ids).logits, expected)
    per_layer = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "mlp")
    assert ran == {**dict.fromkeys(per_layer, layers), "norm": 1}


def test_torch_means_no_patch(ran: Counter[str]) -> None:
    model, _ = tiny()
    use_fused_kernels(model, "torch")
    model(torch.randint(5, 200, (2, 8)))
    assert not ran


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_without_a_gpu() -> None:
    use_fused_kernels(tiny()[0], "auto")
    with pytest.raises(ValueError, match=r"model\.kernels=liger needs a GPU"):
        use_fused_kernels(tiny()[0], "liger")


@pytest.mark.gpu
def test_liger_gives_the_same_hidden_states() -> None:
    pytest.importorskip("liger_kernel")
    device = default_device()
    model = tiny()[0].to(device)
    ids = torch.randint(5, 200, (2, 32), device=device)
    expected = model(ids).logits
    use_fused_kernels(model, "liger")
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-3)
