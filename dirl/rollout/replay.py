"""Completions -> the log-probability of each token at the step it was revealed, without decoding again.

Shapes: R completion tokens, T actions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import Branch, ViewedDocument, pack, replay_views
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.sdar import BlockDiffusionModel
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.training.balance import split_by_budget

_TOKENS_PER_PACK = 8192


def completion_branch(completion: Completion, block_length: int, mask_token_id: int) -> Branch:
    """A completion with the views of its exact replay."""
    completion_ids = torch.tensor(completion.token_ids, dtype=torch.int64)
    trajectory = Trajectory(
        torch.tensor(completion.prompt_ids, dtype=torch.int64),
        completion_ids,
        torch.tensor(completion.step_map, dtype=torch.int64),
    )
    return Branch(completion_ids, replay_views(trajectory, block_length, mask_token_id))


def logprobs(
    model: BlockDiffusionModel, completions: Sequence[Completion], sampling: SamplingConfig | None = None
) -> list[Tensor]:
    """Log-probability (nats) of each completion token at the step it was revealed, one (R,) float32 tensor each.

    With gradient, unless called under `torch.no_grad()`.

    Args:
        sampling: how the completions were sampled; temperature, top_k and top_p change what a token's probability was.
    """
    sampling = sampling or SamplingConfig()
    block_length, device = model.config.block_size, next(model.parameters()).device
    documents = [
        ViewedDocument(
            torch.tensor(completion.prompt_ids, dtype=torch.int64),
            [completion_branch(completion, block_length, model.config.mask_token_id)],
        )
        for completion in completions
    ]
    lengths = [document.packed_length(block_length) for document in documents]
    rule = ScoringRule(sampling.distribution, sampling.unmasking, suppressed_by(model))
    scorer = PackedScorer(model)
    found: dict[int, Tensor] = {}
    for members in split_by_budget(lengths, max([_TOKENS_PER_PACK, *lengths])):
        packed = pack([documents[i] for i in members], block_length).reveals_only().to(device)
        logprob_T = scorer(packed, rule).logprob_T
        for branch, index in enumerate(members):
            mine = packed.branch_T == branch
            # Actions stand in the order of steps; a completion wants them in the order of its tokens.
            found[index] = logprob_T[mine][packed.completion_index_T[mine].argsort()]
    return [found[i] for i in range(len(completions))]
