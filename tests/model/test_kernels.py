"""Fused kernels: for passes on a GPU where the package is there, refused when asked for without them."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3 import modeling_qwen3

from dirl.model.checkpoint import default_device
from dirl.model.kernels import use_fused_kernels
from dirl.model.tiny import tiny
from tests.oracle import tiny_moe


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """A machine with a GPU and liger_kernel; how often each of its kernels ran."""
    counts: Counter[str] = Counter()

    def norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        counts["norm"] += 1
        return F.rms_norm(hidden, weight.shape, weight, epsilon)

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        counts["swiglu"] += 1
        return F.silu(gate) * up

    functional = SimpleNamespace(liger_rms_norm=norm, liger_swiglu=swiglu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.functional"):
        monkeypatch.setitem(sys.modules, name, functional)
    return counts


@pytest.mark.parametrize(("make", "mlps"), [(tiny, 4), (tiny_moe, 0)])
@pytest.mark.parametrize("kernels", ["auto", "liger"])
def test_norms_and_mlps_are_fused(
    kernels: Any,
    make: Callable[[], tuple[Any, Any]],
    mlps: int,
    ran: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = make()
    ids = torch.randint(5, 200, (2, 8))
    expected = model(ids).logits
    use_fused_kernels(model, kernels)
    monkeypatch.setattr("dirl.model.kernels._is_fused", lambda hidden: True)
    torch.testing.assert_close(model(ids).logits, expected)
    # Two norms a layer and those of queries and keys, and the last; experts of a mixture have no MLP of their own.
    assert ran == Counter(norm=4 * model.config.num_hidden_layers + 1, swiglu=mlps)


def test_a_copy_has_kernels_over_its_own_weights(ran: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny()
    use_fused_kernels(model, "auto")
    monkeypatch.setattr("dirl.model.kernels._is_fused", lambda hidden: True)
    copied, ids = copy.deepcopy(model), torch.randint(5, 200, (2, 8))
    expected = copied(ids).logits
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(ids).logits, expected)


def test_they_run_on_a_gpu_alone_and_in_no_other_model(ran: Counter[str]) -> None:
    """Off a GPU a Triton kernel is given pointers that it may not follow."""
    classes = [modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3MLP, modeling_qwen3.apply_rotary_pos_emb]
    model, _ = tiny()
    ids = torch.randint(5, 200, (2, 8))
    expected = model(ids).logits
    use_fused_kernels(model, "auto")
    assert torch.equal(model(ids).logits, expected)
    layer, hidden = model.model.layers[0].to("meta"), torch.empty(1, 8, model.config.hidden_size, device="meta")
    assert layer.mlp(layer.input_layernorm(hidden)).shape == hidden.shape
    assert not ran
    assert classes == [modeling_qwen3.Qwen3RMSNorm, modeling_qwen3.Qwen3MLP, modeling_qwen3.apply_rotary_pos_emb]
    assert all("forward" not in vars(module) for module in tiny()[0].modules())


def test_torch_means_no_patch(ran: Counter[str]) -> None:
    model, _ = tiny()
    use_fused_kernels(model, "torch")
    assert all("forward" not in vars(module) for module in model.modules())


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


@pytest.mark.gpu
def test_after_a_model_with_kernels_one_on_a_cpu_and_one_on_meta_still_run() -> None:
    pytest.importorskip("liger_kernel")
    ids = torch.randint(5, 200, (2, 32))
    expected = tiny()[0](ids).logits
    fused = tiny()[0].to(default_device())
    use_fused_kernels(fused, "liger")
    fused(ids.to(default_device())).logits.sum().backward()
    assert torch.equal(tiny()[0](ids).logits, expected)
    layer = tiny()[0].model.layers[0].to("meta")
    hidden = torch.empty(1, 8, fused.config.hidden_size, device="meta", requires_grad=True)
    layer.mlp(layer.input_layernorm(hidden)).sum().backward()
    torch.cuda.synchronize()
    torch.testing.assert_close(fused.cpu()(ids).logits, expected)
