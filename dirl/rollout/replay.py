"""Completions -> the log-probability of each token at the denoising step that revealed it, without decoding again.

Shapes: R completion tokens, T actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import DiffusionScheme, ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import replay_views
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.training.balance import split_by_budget

_TOKENS_PER_PACK = 8192


def trajectory_of(completion: Completion, scheme: DiffusionScheme) -> Trajectory:
    """The prompt, tokens and steps of a completion as tensors."""
    prompt_ids, completion_ids, step_map = (
        torch.tensor(ids, dtype=torch.int64)
        for ids in (completion.prompt_ids, completion.token_ids, completion.step_map)
    )
    recorded, holds = (
        None if values is None else torch.tensor(values, dtype=torch.float32)
        for values in (completion.logprobs, completion.hold_logprobs)
    )
    threshold = math.nan if completion.confidence_threshold is None else completion.confidence_threshold
    unwritten_ids = None
    if scheme.block_length == 0:
        unwritten_ids = torch.full((completion.num_unwritten,), scheme.mask_token_id)
    return Trajectory(
        *(prompt_ids, completion_ids, step_map, scheme.block_length, recorded, threshold),
        completion.generation_window,
        unwritten_ids,
        hold_logprobs=holds,
        lead=scheme.lead(len(prompt_ids)),
    )


def logprobs(
    model: BlockDiffusionModel, completions: Sequence[Completion], sampling: SamplingConfig | None = None
) -> list[Tensor]:
    """Log-probability (nats) of each completion token at the denoising step that revealed it.

    One (R,) float32 tensor a completion; with gradient, unless called under `torch.no_grad()`.

    Args:
        sampling: how the completions were sampled; temperature, top_k and top_p change what a token's probability was.
    """
    sampling = sampling or SamplingConfig()
    scheme, device = model.scheme, next(model.parameters()).device
    trajectories = [trajectory_of(completion, scheme) for completion in completions]
    documents = [
        ViewedDocument(trajectory.prompt_ids, [replay_views(trajectory, scheme.mask_token_id)])
        for trajectory in trajectories
    ]
    lengths = [document.packed_length(scheme.block_length) for document in documents]
    rule = ScoringRule(*sampling.rules(scheme), suppressed_by(model))
    scorer = PackedScorer(model)
    found: dict[int, Tensor] = {}
    for members in split_by_budget(lengths, max([_TOKENS_PER_PACK, *lengths])):
        packed = pack([documents[i] for i in members], scheme.block_length, scheme.shift).reveals_only().to(device)
        logprob_T = scorer(packed, rule).logprob_T
        for branch, index in enumerate(members):
            mine_T = packed.actions.branch_T == branch
            # Actions stand in the order of denoising steps; a completion wants them in the order of its tokens.
            found[index] = logprob_T[mine_T][packed.actions.completion_index_T[mine_T].argsort()]
    return [found[i] for i in range(len(completions))]
