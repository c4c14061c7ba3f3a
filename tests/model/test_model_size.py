"""The size of a model that costs are reckoned from, against the products that its forward pass takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dirl.model.checkpoint import ModelConfig, load_model
from dirl.model.logprobs import PackedScorer
from dirl.model.model_path import tokenizer_of
from dirl.training.full_parameters import model_size
from tests.model.published import PUBLISHED, write


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_that_a_token_meets_are_those_of_its_products(name: str, tmp_path: Path) -> None:
    """Of every family, with experts and without: two operations a weight and token, the head left out."""
    write(PUBLISHED[name](), tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path)), tokenizer_of(str(tmp_path)))
    ids_BL = torch.arange(16).view(1, -1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids_BL)
    operations = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for name, count in operations.items() if "attention" not in name)
    head = model.get_output_embeddings().weight.numel()
    size = model_size(PackedScorer(model, "sdpa", 1024))
    assert size["layer_weights_per_token"] == products / 2 / ids_BL.numel() - head
    assert size["parameters"] == sum(parameter.numel() for parameter in model.parameters())
