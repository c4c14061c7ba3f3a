"""Decoded groups of completions and the packs that replay them: what the parity tests are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import PackedViews, ViewedDocument, pack
from dirl.diffusion.views import replay_views
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import trajectory_of
from tests.oracle import make_extreme, sharp_tiny_model


def group_of_completions(
    sampling: SamplingConfig, block_length: int, *, group_size: int = 2, **scheme: Any
) -> tuple[BlockDiffusionModel, list[list[Completion]]]:
    """Completions of prompts of every length modulo the block, some ended by EOS inside a block.

    Args:
        scheme: what else `sharp_tiny_model` takes.
    """
    model, tokenizer = sharp_tiny_model(block_length=block_length, **scheme)
    assert isinstance(tokenizer.eos_token_id, int)
    make_extreme(model, [tokenizer.eos_token_id], 4.0)
    lengths = range(1, 2 * (block_length or 4) + 2) if block_length <= 4 else (1, 3, 7, 8, 10, 13, 16)
    prompts = [torch.randint(0, 256, (length,)).tolist() for length in lengths]
    repeated = [prompt for prompt in prompts for _ in range(group_size)]
    completions = TorchEngine(model, tokenizer).generate(repeated, sampling, list(range(len(repeated))))
    return model, [completions[i : i + group_size] for i in range(0, len(completions), group_size)]


def packed(groups: Sequence[Sequence[Completion]], model: BlockDiffusionModel, *, shared: bool) -> PackedViews:
    """All completions in one pack, a group's prompt once or once per completion."""
    scheme = model.scheme
    documents = [
        ViewedDocument(
            torch.tensor(part[0].prompt_ids),
            [replay_views(trajectory_of(completion, scheme), scheme.mask_token_id) for completion in part],
        )
        for group in groups
        for part in ([group] if shared else [[completion] for completion in group])
    ]
    return pack(documents, scheme.block_length, scheme.shift)


def replayed(pack_: PackedViews, model: BlockDiffusionModel, sampling: SamplingConfig) -> Tensor:
    rule = ScoringRule(*sampling.rules(model.scheme), suppressed_by(model))
    return PackedScorer(model, "sdpa")(pack_, rule).logprob_T
