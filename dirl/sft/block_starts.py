"""The tokens that blocks begin with, and the rows they are learned from.

A pack holds every document's clean tokens beside its noisy views, and a model that keeps some of its autoregressive
ability predicts the next token from them, in the same forward pass. Inside a block the clean tokens read each other in
both directions, so the row before a token has seen that token; only the last row of a block has not seen what follows
it. So a completion's tokens at the start of a block are scored, each from the clean row before it: with blocks of one
token that is every token, with blocks of B every B-th.

A model whose row predicts the next token decodes the first token of a block from the clean row before it, and learns it
there. Fast-dLLM v2 learns it from the noisy copy of the block before instead: `with_noisy_starts`.

Shapes: C clean tokens of a pack, A scored ones among them, T actions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dirl.diffusion.packing import Actions, PackedViews
from dirl.diffusion.trajectory import Trajectory


def count_block_starts(trajectories: Iterable[Trajectory]) -> int:
    """How many tokens of some completions stand at the start of a block and have one before them."""
    return sum(int((t.steps_KB[:, 0] > 0).sum()) - (len(t.prompt_ids) == 0) for t in trajectories)


def with_block_starts(packed: PackedViews, prompt_lengths: Sequence[int]) -> PackedViews:
    """The same pack (on the host) with an action more for each token that `count_block_starts` counts.

    They come first, have no weight in the NELBO, and each is a view of its own with a negative number.

    Args:
        prompt_lengths: of each document of the pack, which has one completion.
    """
    tokens = packed.tokens
    clean_C = (tokens.view_L == 0).nonzero().squeeze(1)
    document_C, block_C, position_C = (ids[clean_C] for ids in (tokens.document_L, tokens.block_L, tokens.position_L))
    is_start_C = (document_C[1:] == document_C[:-1]) & (block_C[1:] != block_C[:-1])
    is_start_C &= position_C[1:] >= torch.tensor(prompt_lengths)[document_C[1:]]
    index_A, target_A = clean_C[:-1][is_start_C], tokens.token_ids_L[clean_C[1:][is_start_C]]
    columns = packed.actions.columns()
    added = {name: column.new_zeros(len(index_A)) for name, column in columns.items()}
    added |= {
        "index_T": index_A,
        "target_T": target_A,
        "is_reveal_T": torch.ones_like(index_A, dtype=torch.bool),
        "view_T": torch.arange(-len(index_A), 0),
    }
    return PackedViews(tokens, Actions.of(**{name: torch.cat([added[name], columns[name]]) for name in columns}))


def with_noisy_starts(packed: PackedViews, num_copies: int) -> PackedViews:
    """The same pack (on the host), with the first token of a block read from the last row of the noisy block before it.

    Where there is no noisy copy of the block before, it stays with the clean row.

    Args:
        num_copies: noisy copies of each block; the i-th of a block goes with the i-th of the block before.
    Source: Fast-dLLM v2 (arXiv 2509.26328), whose loss shifts labels inside the noisy copy.
    """
    tokens, actions = packed.tokens, packed.actions
    row_L = torch.arange(len(tokens))
    last_row_V = torch.zeros(int(tokens.view_L.max()) + 1, dtype=torch.int64)
    last_row_V = last_row_V.scatter_reduce(0, tokens.view_L, row_L, "amax")
    before_T = last_row_V[(actions.view_T - num_copies).clamp(min=0)]
    is_before_T = (actions.view_T > num_copies) & (tokens.view_L[actions.index_T] == 0)
    is_before_T &= tokens.branch_L[before_T] == actions.branch_T + 1
    is_before_T &= tokens.block_L[before_T] == actions.block_T - 1
    index_T = torch.where(is_before_T, before_T, actions.index_T)
    return PackedViews(tokens, replace(actions, index_T=index_T))


def next_token_loss(logprob_T: Tensor, actions: Actions, denominator: float) -> Tensor:
    """Cross-entropy of the block starts among a pack's actions, over a denominator of the global batch; nats."""
    return -torch.where(actions.view_T < 0, logprob_T, 0.0).sum() / denominator
