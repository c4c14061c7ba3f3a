"""Fused kernels: patched in when a GPU and the package are there, refused when asked for without them."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dirl.model.checkpoint import default_device
from dirl.model.kernels import use_fused_kernels
from dirl.model.tiny import tiny


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A machine with a GPU and a liger_kernel that records how it is called."""
    made: list[dict[str, Any]] = []
    module = SimpleNamespace(
        apply_liger_kernel_to_qwen3=lambda **options: made.append(options),
        apply_liger_kernel_to_qwen3_moe=lambda **options: pytest.fail("a dense model"),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=module))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    return made


@pytest.mark.parametrize("kernels", ["auto", "liger"])
def test_the_model_is_patched_but_not_its_lm_head(kernels: Any, calls: list[dict[str, Any]]) -> None:
    model, _ = tiny()
    use_fused_kernels(model, kernels)
    (options,) = calls
    assert options.pop("model") is model
    assert options == {
        "rope": True,
        "rms_norm": True,
        "swiglu": True,
        "cross_entropy": False,
        "fused_linear_cross_entropy": False,
    }


def test_torch_means_no_patch(calls: list[dict[str, Any]]) -> None:
    use_fused_kernels(tiny()[0], "torch")
    assert calls == []


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
