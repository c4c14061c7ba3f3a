"""The embedded default: an SDAR model of 0.8 M parameters with a byte-level tokenizer, made in a second."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dirl.data.tasks import tiny_tokenizer
from dirl.errors import UserError
from dirl.files import whole_folder
from dirl.model.checkpoint import save_model
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.families.sdar import SDARConfig, SDARForCausalLM


def tiny(seed: int = 0) -> tuple[BlockDiffusionModel, PreTrainedTokenizerBase]:
    """A randomly initialised model and its tokenizer; the same for the same seed. Leaves the global RNG as it was."""
    tokenizer = tiny_tokenizer()
    config = SDARConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        # About 1 / sqrt(hidden): from 0.02, transformers' default, so narrow a model hardly learns.
        initializer_range=0.09,
        block_size=4,
        mask_token_id=tokenizer.mask_token_id,
        tokenizer_length=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SDARForCausalLM(config)
    return model, tokenizer


def save_tiny_model(path: str | Path, seed: int = 0) -> None:
    """Write the tiny model as a Hugging Face directory, complete or absent; or beside what stands there."""
    target = Path(path)
    if target.is_file():
        raise UserError(f"{path} is a file; name a directory for the model")
    model, tokenizer = tiny(seed)
    if target.is_dir() and any(target.iterdir()):
        save_model(model, tokenizer, target)
        return
    with whole_folder(target, "make room") as folder:
        save_model(model, tokenizer, folder)
