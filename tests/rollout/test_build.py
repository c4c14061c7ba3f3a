"""Which engine a configuration gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from dirl.errors import UserError
from dirl.rollout import build
from dirl.rollout.build import build_engine, chosen_engine
from dirl.rollout.engine import EngineConfig
from dirl.rollout.local.engine import TorchEngine
from tests.oracle import sharp_tiny_model


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CUDA machine with the supported LMDeploy, as far as the choice looks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "_lmdeploy_version", lambda: "0.18.0")
    return monkeypatch


def test_auto_is_lmdeploy_on_cuda_where_it_is_installed(machine: pytest.MonkeyPatch) -> None:
    assert chosen_engine(EngineConfig()) == "lmdeploy"
    machine.setattr(build, "_lmdeploy_version", lambda: None)
    assert chosen_engine(EngineConfig()) == "torch"
    machine.setattr(build, "_lmdeploy_version", lambda: "0.18.0")
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_engine(EngineConfig()) == "torch"


def test_a_named_engine_is_taken_or_refused(machine: pytest.MonkeyPatch) -> None:
    assert chosen_engine(EngineConfig(engine="torch")) == "torch"
    wanted = EngineConfig(engine="lmdeploy")
    assert chosen_engine(wanted) == "lmdeploy"
    machine.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"rollout\.engine=lmdeploy: it needs a CUDA device"):
        chosen_engine(wanted)
    machine.setattr(build, "_lmdeploy_version", lambda: None)
    with pytest.raises(ValueError, match=r"rollout\.engine=lmdeploy: it is not installed; pip install"):
        chosen_engine(wanted)


def test_a_model_that_lmdeploy_does_not_know(machine: pytest.MonkeyPatch) -> None:
    model, _ = sharp_tiny_model()
    assert chosen_engine(EngineConfig(), model) == "lmdeploy"
    machine.setattr(type(model.config), "model_type", "llada")
    assert chosen_engine(EngineConfig(), model) == "torch"
    with pytest.raises(
        ValueError, match=r"rollout\.engine=lmdeploy: it decodes sdar and sdar_moe, and .* llada; use torch"
    ):
        chosen_engine(EngineConfig(engine="lmdeploy"), model)


@pytest.mark.parametrize("engine", ["auto", "lmdeploy"])
def test_another_release_is_named_not_passed_over(machine: pytest.MonkeyPatch, engine: str) -> None:
    machine.setattr(build, "_lmdeploy_version", lambda: "0.19.1")
    with pytest.raises(ValueError, match=r"lmdeploy 0\.19\.1 is installed, and 0\.18\.0 is supported"):
        chosen_engine(EngineConfig(engine=engine))  # type: ignore[arg-type]


def test_on_a_cpu_the_default_is_the_torch_engine() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert isinstance(build_engine(*sharp_tiny_model(), EngineConfig()), TorchEngine)


@pytest.mark.parametrize(("compile", "compiled"), [("auto", True), ("always", True), ("never", False)])
def test_the_torch_engine_is_compiled_on_cuda(machine: pytest.MonkeyPatch, compile: str, compiled: bool) -> None:
    built: list[bool] = []
    machine.setattr(build, "TorchEngine", lambda *_, compiled, **options: built.append(compiled))
    build_engine(*sharp_tiny_model(), EngineConfig(engine="torch", compile=compile))  # type: ignore[arg-type]
    machine.setattr(torch.cuda, "is_available", lambda: False)
    build_engine(*sharp_tiny_model(), EngineConfig(engine="torch", compile=compile))  # type: ignore[arg-type]
    assert built == [compiled, compile == "always"]


@pytest.mark.parametrize(("bf16", "autocast"), [(True, torch.bfloat16), (False, None)])
def test_it_decodes_in_the_precision_that_the_trainer_scores_in(bf16: bool, autocast: torch.dtype | None) -> None:
    engine = build_engine(*sharp_tiny_model(), EngineConfig(engine="torch"), bf16=bf16)
    assert isinstance(engine, TorchEngine) and engine.autocast == autocast


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_an_approximate_cache_is_said_at_the_start_or_refused(
    mode: Literal["colocate", "server"], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dirl.rollout.server.engine.connect", lambda *_, **__: None)
    exact = EngineConfig(engine="torch", mode=mode)
    build_engine(*sharp_tiny_model(block_length=0), exact)
    assert not caplog.messages
    for kind in ("prefix", "dual"):
        config = replace(exact, approximate_cache=kind)
        build_engine(*sharp_tiny_model(block_length=0), config)
        assert f"rollout.approximate_cache={kind}: keys and values are as they were" in caplog.messages[-1]
        with pytest.raises(UserError, match=rf"approximate_cache={kind}: .* sdar model is block-causal, .*; use none"):
            build_engine(*sharp_tiny_model(block_length=4), config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_batch_size", 0),
        ("max_cached_tokens", -1),
        ("cache_max_entry_count", 1.0),
        ("sleep_level", 3),
        ("server_urls", ["http://a:1"]),
        ("approximate_cache", "suffix"),
    ],
)
def test_bad_settings_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        EngineConfig(**{key: value})  # type: ignore[arg-type]
