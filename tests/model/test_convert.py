"""An autoregressive checkpoint made into a block-diffusion one: with blocks of one token, the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dirl.cli import main
from dirl.data.chat import load_tokenizer
from dirl.errors import UserError
from dirl.model.checkpoint import load
from dirl.model.convert import ConvertConfig, convert
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from tests.model import published

WORDS = [f"word{number}" for number in range(60)]
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
SOURCES: dict[str, Any] = {
    "Qwen2, rows to spare": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE, vocab_size=80)),
    "Qwen3, tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, vocab_size=63, tie_word_embeddings=True)),
    "Qwen3-MoE": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=8, vocab_size=63)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=63)),
}


def source(name: str, path: Path, *reserved: str) -> Any:
    """A random autoregressive model with a tokenizer of 63 tokens; returns the model."""
    torch.manual_seed(0)
    model = SOURCES[name]().eval()
    model.save_pretrained(path)
    specials = ["<|endoftext|>", "<|im_end|>", *(reserved or ["<|im_start|>"])]
    backend = Tokenizer(models.WordLevel({text: i for i, text in enumerate(WORDS)}, unk_token=WORDS[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(specials)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=specials[0]).save_pretrained(path)
    return model


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_blocks_of_one_token_are_the_source(name: str, tmp_path: Path) -> None:
    before = source(name, tmp_path / "source")
    written = convert(str(tmp_path / "source"), tmp_path / "made", ConvertConfig(block_length=1))
    model, tokenizer = load(str(tmp_path / "made"))
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("<|MASK|>", 63)
    assert (model.scheme.block_length, model.scheme.shift, model.scheme.mask_token_id) == (1, 1, 63)
    assert model.config.vocab_size == max(before.config.vocab_size, 64)
    ids = torch.randint(0, 63, (2, 20))
    expected = before(ids).logits
    words = list(range(min(63, expected.shape[-1])))
    for one in (model, written):
        torch.testing.assert_close(one(ids).logits[..., words], expected[..., words], atol=1e-5, rtol=1e-5)
    embedded = model.model.embed_tokens.weight
    torch.testing.assert_close(embedded[63], before.model.embed_tokens.weight.mean(dim=0))
    assert (model.lm_head.weight is embedded) == before.config.tie_word_embeddings


@torch.no_grad()
def test_it_decodes_as_its_source_does(tmp_path: Path) -> None:
    before = source("Llama", tmp_path / "source")
    convert(str(tmp_path / "source"), tmp_path / "made", ConvertConfig(block_length=1))
    model, tokenizer = load(str(tmp_path / "made"))
    sampling = SamplingConfig(temperature=0.0, max_completion_length=12)
    (completion,) = TorchEngine(model, tokenizer).generate([[5, 6, 7]], sampling, [0])
    ids = [5, 6, 7]
    for token in completion.token_ids:
        assert token == int(before(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_a_full_disk_is_a_line_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # what tokenizers raises

    source("Qwen2, rows to spare", tmp_path / "source")
    monkeypatch.setattr("dirl.model.checkpoint.save_tokenizer", full)
    with pytest.raises(UserError, match=r"out cannot be written: .*No space left.*; make room"):
        convert(str(tmp_path / "source"), str(tmp_path / "out"), ConvertConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("block_length", [4, 0])
def test_it_learns_and_is_exported(block_length: int, tmp_path: Path) -> None:
    source("Qwen3, tied", tmp_path / "source", "<|im_start|>")
    (tmp_path / "source/chat_template.jinja").write_text("{{ messages[0].content }}")
    how = ["full_attention=true"] if block_length == 0 else [f"block_length={block_length}"]
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "made"), *how]) == 0
    rows = "".join(f'{{"prompt": "word{i}", "completion": "word1 word2 word3 word4 word5"}}\n' for i in range(12))
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = {"model.path": tmp_path / "made", "data.path": tmp_path / "rows.jsonl", "data.num_heldout": 4}
    settings |= {"max_steps": 20, "learning_rate": 3e-3, "global_batch_size": 8, "output_dir": tmp_path / "run"}
    (tmp_path / "sft.yaml").write_text("")
    assert main(["sft", str(tmp_path / "sft.yaml"), *(f"{key}={value}" for key, value in settings.items())]) == 0
    model, _ = load(str(tmp_path / "run/final"))
    assert (model.scheme.block_length, model.scheme.shift) == (block_length, 1)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_reserved_token_becomes_the_mask(tmp_path: Path) -> None:
    source("Llama", tmp_path / "source", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")
    tokenizer = load_tokenizer(tmp_path / "source")
    assert len(tokenizer) == 64  # one of which the model has no row for
    model = convert(str(tmp_path / "source"), tmp_path / "made", ConvertConfig())
    assert load_tokenizer(tmp_path / "made").mask_token == "<|reserved_special_token_0|>"
    assert (model.scheme.mask_token_id, model.scheme.block_length) == (62, 4)


def test_what_cannot_be_converted_is_one_line(tmp_path: Path) -> None:
    published.write(published.sdar(), tmp_path / "sdar")
    with pytest.raises(UserError, match=r"is a SDARForCausalLM: a diffusion model already"):
        convert(str(tmp_path / "sdar"), tmp_path / "made", ConvertConfig())
    with pytest.raises(UserError, match=r"no config\.json in 'nowhere/at/all'"):
        convert("nowhere/at/all", tmp_path / "made", ConvertConfig())
    with pytest.raises(UserError, match=r"is there already; name a new directory"):
        convert(str(tmp_path / "sdar"), tmp_path, ConvertConfig())
    assert not (tmp_path / "made").exists()
