"""Completions with texts: what `generate` returns and `with_texts` makes of an engine's."""

from __future__ import annotations

import time
from dataclasses import fields

import pytest
import torch

import dirl
from dirl.data.chat import render_prompt
from dirl.diffusion.packing import DiffusionScheme
from dirl.errors import UserError
from dirl.model.tiny import tiny
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.rollout.generate import Completions, with_texts
from dirl.rollout.local.engine import TorchEngine
from tests.oracle import sharp_tiny_model

SCHEME = DiffusionScheme(block_length=4, mask_token_id=0)


@pytest.fixture(scope="module")
def completions() -> Completions:
    model, tokenizer = tiny()
    return dirl.generate(model, tokenizer, ["1+1=", "2+22="], max_completion_length=24)


def test_an_engine_knows_nothing_of_showing() -> None:
    """All fields of what it returns are there from the start, and nothing displays itself."""
    model, tokenizer = tiny()
    prompt = render_prompt(tokenizer, "1+1=")
    (bare,) = TorchEngine(model, tokenizer).generate([prompt], SamplingConfig(max_completion_length=8), [0])
    assert type(bare) is Completion and not {"show", "to_pandas", "_repr_html_"} & set(dir(bare))
    assert {field.name for field in fields(Completion)} & {"block_length", "tail", "token_texts"} == set()
    (shown,) = with_texts([bare], tokenizer, SCHEME)
    assert isinstance(shown, Completion) and vars(bare).items() <= vars(shown).items()
    assert with_texts([shown], tokenizer, SCHEME) == [shown]


def test_generate_over_an_approximate_cache(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = sharp_tiny_model(block_length=0)
    exact, cached = (
        dirl.generate(model, tokenizer, ["1+1="], max_completion_length=12, approximate_cache=kind)
        for kind in ("none", "dual")
    )
    assert exact[0].logprobs != cached[0].logprobs
    assert "rollout.approximate_cache=dual" in caplog.text


def test_generated_completions_know_their_texts(completions: Completions) -> None:
    for completion in completions:
        assert completion.block_length == 4 and len(completion.token_texts) == len(completion.token_ids)
        plain = "".join(text for text in completion.token_texts if "\ufffd" not in text)
        assert all(character in plain for character in completion.text if character != "\ufffd")


def test_they_show_themselves(
    completions: Completions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert completions._repr_html_() == "".join(completion._repr_html_() for completion in completions)
    assert "finish:" in completions[0]._repr_html_()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    completions[0].show()
    once = capsys.readouterr().out
    completions.show()
    assert capsys.readouterr().out.startswith(once) and once.strip()


def test_tables(completions: Completions) -> None:
    pytest.importorskip("pandas")
    table = completions.to_pandas()
    assert list(table["text"]) == [completion.text for completion in completions]
    assert table["tokens_per_step"].iloc[1] == completions[1].tokens_per_step
    assert list(completions[0].to_pandas()["text"]) == completions[0].token_texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("block_length", [4, 0])
def test_logits_that_are_not_finite_become_no_tokens(temperature: float, block_length: int) -> None:
    model, tokenizer = sharp_tiny_model(block_length=block_length)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="logits at token 0 of a completion are not finite"):
        dirl.generate(model, tokenizer, ["1+1="], max_completion_length=8, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, float("inf"), float("nan")])
def test_temperatures_under_which_logits_overflow_are_refused(temperature: float) -> None:
    with pytest.raises(UserError, match=r"^temperature must be"):
        SamplingConfig(temperature=temperature)
