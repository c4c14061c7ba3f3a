"""Documents and noisy views of their blocks -> one packed sequence with one attention rule.

A view is one noisy copy of one block at one state. The packed sequence holds, for every document, its clean tokens once
and then its views; there is no padding. A document may carry several *branches*: completions of one prompt, which share
the clean tokens of the prompt's full blocks (branch 0, the trunk). Every token carries five ids, and

    q attends k  iff  document(k) == document(q)  and  branch(k) in {0, branch(q)}
                 and  ( view(k) == 0 and block(k) < block(q)   or   view(k) == view(q) and block(k) == block(q) )

with view 0 for clean tokens and a number of its own for every view. SFT and all RL objectives differ only in their view
builders: pure functions from a completion to its `Views`.

An *action* is what happens at one masked position of a view: its token is revealed, or it is held. Reveals carry the
token and a weight; holds carry neither, and matter only to the trajectory likelihood.

Shapes: P prompt tokens, R completion tokens, V views, B block length, L packed tokens, T actions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from dirl.diffusion.noising import NoiseConfig, draw_mask, nelbo_weights
from dirl.diffusion.trajectory import Trajectory, TrajectoryBlocks


@dataclass(frozen=True)
class Views:
    """Noisy copies of blocks of one completion, sorted by block."""

    block_V: Tensor  # int64, absolute block index
    token_ids_VB: Tensor  # int64, mask_token_id where masked
    target_ids_VB: Tensor  # int64, the clean tokens
    revealed_VB: Tensor  # bool, masked positions whose token is scored
    held_VB: Tensor  # bool, masked positions that stay masked
    weight_VB: Tensor  # float32, weight of each scored token

    def __len__(self) -> int:
        return len(self.block_V)


@dataclass(frozen=True)
class Branch:
    """One completion of a document's prompt with its views."""

    completion_ids: Tensor  # (R,) int64
    views: Views


@dataclass(frozen=True)
class ViewedDocument:
    """A prompt and the completions that share it."""

    prompt_ids: Tensor  # (P,) int64
    branches: Sequence[Branch]

    def packed_length(self, block_length: int) -> int:
        """Tokens this document takes in a pack."""
        prompt_length = len(self.prompt_ids)
        trunk = prompt_length - prompt_length % block_length
        return trunk + sum(branch_length(prompt_length, branch, block_length) for branch in self.branches)


def branch_length(prompt_length: int, branch: Branch, block_length: int) -> int:
    """Tokens a branch adds to its document's trunk."""
    return prompt_length % block_length + len(branch.completion_ids) + block_length * len(branch.views)


@dataclass(frozen=True)
class PackedViews:
    """Documents in one sequence. Branches are numbered over the whole pack in the order of the documents."""

    token_ids_L: Tensor  # int64
    position_L: Tensor  # int64, position in the original sequence
    document_L: Tensor  # int64
    branch_L: Tensor  # int64, 0 for a trunk, else 1 + the number of the branch in the pack
    block_L: Tensor  # int64, position // block_length
    view_L: Tensor  # int64, 0 for clean tokens, else unique in the pack
    action_index_T: Tensor  # int64, where in L each action happens; sorted
    target_T: Tensor  # int64, clean token at the action
    is_reveal_T: Tensor  # bool, False: hold
    weight_T: Tensor  # float32, weight of a revealed token; 0 for a hold
    branch_T: Tensor  # int64, number of the action's branch in the pack, from 0
    completion_index_T: Tensor  # int64, index of the action's token in its completion
    num_branches: int

    def __len__(self) -> int:
        return len(self.token_ids_L)

    @property
    def view_T(self) -> Tensor:
        return self.view_L[self.action_index_T]

    def to(self, device: torch.device | str) -> PackedViews:
        return self._map(lambda name, tensor: tensor.to(device, non_blocking=True))

    def reveals_only(self) -> PackedViews:
        """The same pack without its hold actions: all that the reveal likelihood and SFT need."""
        kept = self.is_reveal_T
        return self._map(lambda name, tensor: tensor[kept] if name.endswith("_T") else tensor)

    def padded(self, multiple: int) -> PackedViews:
        """The same pack, filled up to a multiple of some length by one more document without actions.

        Its id is larger than the others, so that tiles of ids stay sorted and the mask block-sparse.
        """
        zeros = torch.zeros(-len(self) % multiple, dtype=torch.int64, device=self.token_ids_L.device)
        document = zeros + self.document_L[-1] + 1

        def fill(name: str, tensor: Tensor) -> Tensor:
            if not name.endswith("_L"):
                return tensor
            return torch.cat([tensor, document if name == "document_L" else zeros])

        return self._map(fill)

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> PackedViews:
        changed: dict[str, Any] = {k: change(k, v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **changed)


def noisy_views(
    blocks: TrajectoryBlocks,
    scored_KB: Tensor,
    levels_K: Tensor,
    mask_token_id: int,
    *,
    noise: NoiseConfig,
    generator: Generator,
) -> Views:
    """SFT: one random noisy copy of each completion block, or a complementary pair of copies.

    Args:
        blocks: the blocks of the example; positions of step 0 are prompt and never masked.
        scored_KB: completion positions that may be masked and scored; the others stay visible as context.
        levels_K: noise level of each block, drawn by the caller so that levels can be spread over a batch.
    """
    maskable_KB = scored_KB & (blocks.steps_KB > 0)
    masked_KB = draw_mask(levels_K, maskable_KB, generator)
    weights_K = nelbo_weights(levels_K)
    block_K = torch.arange(len(masked_KB)) + blocks.first_block
    token_ids_KB = blocks.token_ids_KB
    if noise.complementary:
        # Both halves are unbiased on their own, the complement at level 1 - t; a pair is their mean.
        masked_KB = torch.stack([masked_KB, maskable_KB & ~masked_KB], dim=1).flatten(0, 1)
        complement_K = nelbo_weights((1 - levels_K).clamp(min=noise.min_noise))
        weights_K = torch.stack([weights_K, complement_K], dim=1).flatten() / 2
        block_K, token_ids_KB = block_K.repeat_interleave(2), token_ids_KB.repeat_interleave(2, dim=0)
    return Views(
        block_V=block_K,
        token_ids_VB=token_ids_KB.masked_fill(masked_KB, mask_token_id),
        target_ids_VB=token_ids_KB,
        revealed_VB=masked_KB,
        held_VB=torch.zeros_like(masked_KB),
        weight_VB=weights_K[:, None].expand(masked_KB.shape).contiguous(),
    )


def replay_views(trajectory: Trajectory, block_length: int, mask_token_id: int) -> Views:
    """Exact replay: one view per denoising step the decoder took, in the state it saw, with the actions it chose."""
    blocks = trajectory.blocks(block_length)
    num_steps_K = blocks.steps_KB.max(dim=1).values
    block_V = torch.arange(len(num_steps_K)).repeat_interleave(num_steps_K)
    first_view_K = num_steps_K.cumsum(0) - num_steps_K
    step_V = torch.arange(len(block_V)) - first_view_K[block_V] + 1
    steps_VB, token_ids_VB = blocks.steps_KB[block_V], blocks.token_ids_KB[block_V]
    return Views(
        block_V=block_V + blocks.first_block,
        token_ids_VB=token_ids_VB.masked_fill(steps_VB >= step_V[:, None], mask_token_id),
        target_ids_VB=token_ids_VB,
        revealed_VB=steps_VB == step_V[:, None],
        held_VB=steps_VB > step_V[:, None],
        weight_VB=torch.ones(steps_VB.shape),
    )


def pack(documents: Sequence[ViewedDocument], block_length: int) -> PackedViews:
    """Lay documents one after another: trunk, then for each branch its clean tokens and its views."""
    pieces: list[_Piece] = []
    branch, next_view = 0, 1
    for document_index, document in enumerate(documents):
        prompt_length = len(document.prompt_ids)
        trunk = prompt_length - prompt_length % block_length
        pieces.append(_clean_piece(document.prompt_ids[:trunk], 0, document=document_index, branch=0))
        tail_ids = document.prompt_ids[trunk:]
        for completion in document.branches:
            branch += 1
            clean_ids = torch.cat([tail_ids, completion.completion_ids])
            pieces.append(_clean_piece(clean_ids, trunk, document=document_index, branch=branch))
            pieces.append(_view_piece(completion.views, next_view, document_index, branch, prompt_length))
            next_view += len(completion.views)
    return _join(pieces, block_length, num_branches=branch)


def placeholder_pack(block_length: int, mask_token_id: int) -> PackedViews:
    """One block of one view: something to run a forward and a backward pass on where a rank has nothing to do."""
    ids_R = torch.zeros(block_length, dtype=torch.int64)
    views = replay_views(Trajectory(ids_R[:0], ids_R, torch.ones_like(ids_R)), block_length, mask_token_id)
    return pack([ViewedDocument(ids_R[:0], [Branch(ids_R, views)])], block_length)


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of a pack before they are joined; actions as masks over its tokens."""

    token_ids: Tensor
    position: Tensor
    view: Tensor
    target: Tensor
    is_reveal: Tensor
    is_hold: Tensor
    weight: Tensor
    completion_index: Tensor
    document: int
    branch: int


def _clean_piece(token_ids: Tensor, first_position: int, *, document: int, branch: int) -> _Piece:
    nothing = torch.zeros(len(token_ids), dtype=torch.bool)
    zeros = torch.zeros_like(token_ids)
    position = torch.arange(len(token_ids)) + first_position
    return _Piece(token_ids, position, zeros, token_ids, nothing, nothing, zeros.float(), zeros, document, branch)


def _view_piece(views: Views, first_view: int, document: int, branch: int, prompt_length: int) -> _Piece:
    num_views, block_length = views.token_ids_VB.shape
    position_VB = views.block_V[:, None] * block_length + torch.arange(block_length)
    view_VB = (torch.arange(num_views) + first_view)[:, None].expand(num_views, block_length)
    return _Piece(
        token_ids=views.token_ids_VB.flatten(),
        position=position_VB.flatten(),
        view=view_VB.flatten(),
        target=views.target_ids_VB.flatten(),
        is_reveal=views.revealed_VB.flatten(),
        is_hold=views.held_VB.flatten(),
        weight=views.weight_VB.flatten(),
        completion_index=(position_VB - prompt_length).flatten(),
        document=document,
        branch=branch,
    )


def _join(pieces: Sequence[_Piece], block_length: int, *, num_branches: int) -> PackedViews:
    def cat(name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in pieces])

    lengths = torch.tensor([len(piece.token_ids) for piece in pieces])
    branch_L = torch.tensor([piece.branch for piece in pieces]).repeat_interleave(lengths)
    position_L, is_reveal_L = cat("position"), cat("is_reveal")
    action_index_T = (is_reveal_L | cat("is_hold")).nonzero().squeeze(1)
    is_reveal_T = is_reveal_L[action_index_T]
    return PackedViews(
        token_ids_L=cat("token_ids"),
        position_L=position_L,
        document_L=torch.tensor([piece.document for piece in pieces]).repeat_interleave(lengths),
        branch_L=branch_L,
        block_L=position_L // block_length,
        view_L=cat("view"),
        action_index_T=action_index_T,
        target_T=cat("target")[action_index_T],
        is_reveal_T=is_reveal_T,
        weight_T=cat("weight")[action_index_T] * is_reveal_T,
        branch_T=branch_L[action_index_T] - 1,
        completion_index_T=cat("completion_index")[action_index_T],
        num_branches=num_branches,
    )


def attention_rule(q: tuple[Tensor, ...], k: tuple[Tensor, ...]) -> Tensor:
    """The one rule of the package; True where q may read k; arguments are (document, branch, block, view).

    Compares integers and combines bools only, so that FlexAttention can compile it as a mask_mod.
    """
    document_q, branch_q, block_q, view_q = q
    document_k, branch_k, block_k, view_k = k
    same_sequence = (document_q == document_k) & ((branch_k == 0) | (branch_k == branch_q))
    clean_earlier = (view_k == 0) & (block_k < block_q)
    same_view = (view_k == view_q) & (block_k == block_q)
    return same_sequence & (clean_earlier | same_view)
