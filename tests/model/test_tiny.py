"""The embedded default: reproducible, small, and without a trace in the global random state."""

from __future__ import annotations

from pathlib import Path

import torch

from dirl.model.checkpoint import load
from dirl.model.tiny import save_tiny_model, tiny


def test_the_seed_is_all_that_matters() -> None:
    before = torch.get_rng_state()
    first, _ = tiny(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = tiny(3)[0], tiny(4)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_it_is_tiny_and_knows_its_tokenizer() -> None:
    model, tokenizer = tiny()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert model.config.tokenizer_length == len(tokenizer) == model.config.vocab_size
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_what_is_saved_loads_with_the_same_logits(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base", seed=2)
    model, tokenizer = load(str(tmp_path / "base"))
    ids = torch.tensor([tokenizer.encode("12+7=")])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, tiny(2)[0].eval()(ids).logits)
    assert len(tokenizer) == model.config.tokenizer_length
