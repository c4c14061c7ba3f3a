"""Documents and noisy views of their blocks -> one packed sequence with one attention rule, and its table of actions.

A view is one noisy copy of one block at one state. The packed sequence holds, for every document, its clean tokens once
and then its views; there is no padding. A document may carry several *branches*: completions of one prompt, which share
the clean tokens of the prompt's full blocks (branch 0, the trunk). Every token carries five ids, and

    q attends k  iff  document(k) == document(q)  and  branch(k) in {0, branch(q)}
                 and  ( view(k) == 0 and block(k) < block(q)   or   view(k) == view(q) and block(k) == block(q) )

with view 0 for clean tokens and a number of its own for every view. Under full attention (block_length 0) a document is
one block: its views are whole documents, nothing reads a clean copy, and there is none.

An action is predicted by its own row of the pack, or, where a model's prediction is shifted, by the row before it: that
of its view, and at the start of a block the last clean row of the block before, as in decoding.

An *action* is what happens at one masked position of a view: its token is revealed, or it is held. Reveals carry the
token and a weight; holds carry neither, and matter only to the trajectory likelihood.

Shapes: P prompt tokens, R completion tokens, V views, B block length, L packed tokens, T actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from dirl.diffusion.distribution import Confidence

BlockOrigin = Literal["start", "prompt_end"]


@dataclass(frozen=True, kw_only=True)
class DiffusionScheme:
    """How a model reads masks.

    Attributes:
        block_length: tokens a block; a block reads itself and the blocks before it. 0: full
            attention, where the whole document is one block.
        shift: 1: the row *before* a position predicts its token, as in the autoregressive model it was made of; at the
            start of a block that is the clean copy's last row. 0: its own row does.
        mask_token_id: the token that stands where there is none yet.
        confidence: what its decoder compares with a threshold, where sampling does not say.
        holds_at_threshold: a token of just the threshold's confidence stays masked, where sampling does not say.
        block_origin: where blocks are counted from. start: position 0, so that a prompt's last tokens may share a block
            with the completion's first; prompt_end: the completion's first token, so that a prompt's *first* block may
            lack tokens instead.
    """

    block_length: int
    mask_token_id: int
    shift: Literal[0, 1] = 0
    confidence: Confidence = "tempered"
    holds_at_threshold: bool = False
    block_origin: BlockOrigin = "start"

    def tail(self, prompt_length: int) -> int:
        """Tokens of a prompt in the block of the first completion token."""
        return prompt_length % self.block_length if self.block_length and self.block_origin == "start" else 0

    def lead(self, prompt_length: int) -> int:
        """Tokens that the first block of a document with such a prompt lacks before its first one."""
        return -prompt_length % self.block_length if self.block_length and self.block_origin == "prompt_end" else 0

    @property
    def is_full(self) -> bool:
        """Every position reads every other: no prefix is ever final."""
        return self.block_length == 0


@dataclass(frozen=True)
class Views:
    """One completion of a prompt and noisy copies of its blocks, sorted by block."""

    completion_ids: Tensor  # (R,) int64
    block_V: Tensor  # int64, block index in the document
    token_ids_VB: Tensor  # int64, mask_token_id where masked
    target_ids_VB: Tensor  # int64, the clean tokens
    revealed_VB: Tensor  # bool, masked positions whose token is scored
    held_VB: Tensor  # bool, masked positions that stay masked
    weight_VB: Tensor  # float32, weight of each scored token
    visited_VB: Tensor  # bool, positions the decoder decided about in this very state
    importance_V: Tensor  # float32, 1 over how often a view like this was expected to be drawn; 1: it always is
    lead: int  # tokens that the document's first block lacks before position 0
    engine_logprob_VB: Tensor  # float32 nats, as the engine recorded what it did in this very state; NaN: nothing
    confidence_threshold: float = math.nan  # the decoder's, where the completion had one of its own; NaN: the rule's

    def __len__(self) -> int:
        return len(self.block_V)

    def rows(self, rows: slice | Tensor) -> Views:
        """Some views of the same completion, in their order."""
        of_views = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith(("_V", "_VB"))}
        return replace(self, **{name: values[rows] for name, values in of_views.items()})

    def packed_length(self, tail: int, block_length: int) -> int:
        """Tokens these add to the trunk of a document, whose prompt has so many tokens in their first block."""
        if block_length == 0:
            return self.token_ids_VB.numel()
        return tail + len(self.completion_ids) + block_length * len(self)


@dataclass(frozen=True)
class ViewedDocument:
    """A prompt and the completions that share it."""

    prompt_ids: Tensor  # (P,) int64
    branches: Sequence[Views]

    @property
    def lead(self) -> int:
        """Tokens that its first block lacks before position 0."""
        return self.branches[0].lead

    def trunk(self, block_length: int) -> int:
        """Tokens of the prompt's full blocks, which the branches share."""
        prompt_length = len(self.prompt_ids)
        return prompt_length - (prompt_length + self.lead) % block_length if block_length else 0

    def packed_length(self, block_length: int) -> int:
        """Tokens this document takes in a pack."""
        trunk = self.trunk(block_length)
        tail = len(self.prompt_ids) - trunk
        return trunk + sum(views.packed_length(tail, block_length) for views in self.branches)


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a pack, one row each; branches are numbered over the whole pack in the order of the documents."""

    token_ids_L: Tensor  # int64
    position_L: Tensor  # int64, position in the original sequence
    document_L: Tensor  # int64
    branch_L: Tensor  # int64, 0 for a trunk, else 1 + the number of the branch in the pack
    block_L: Tensor  # int64, block in its document
    view_L: Tensor  # int64, 0 for clean tokens, else unique in the pack

    def __len__(self) -> int:
        return len(self.token_ids_L)

    @property
    def ids(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the attention rule compares."""
        return self.document_L, self.branch_L, self.block_L, self.view_L

    def to(self, device: torch.device | str) -> TokenTable:
        return TokenTable(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def padded(self, multiple: int) -> TokenTable:
        """The same rows, filled up to a multiple of some length by one more document that nobody scores.

        Its id is larger than the others, so that tiles of ids stay sorted and the mask block-sparse.
        """
        zeros = torch.zeros(-len(self) % multiple, dtype=torch.int64, device=self.token_ids_L.device)
        filled = TokenTable(*(torch.cat([getattr(self, f.name), zeros]) for f in fields(self)))
        return replace(filled, document_L=torch.cat([self.document_L, zeros + self.document_L[-1] + 1]))


@dataclass(frozen=True)
class Actions:
    """What happened at the masked positions of a pack, one row each, in the order of the tokens.

    The last two are facts for the host, which would otherwise have to wait for the device to learn them.
    """

    index_T: Tensor  # int64, the packed token whose row predicts it
    target_T: Tensor  # int64, the clean token
    is_reveal_T: Tensor  # bool, False: hold
    is_visited_T: Tensor  # bool, the decoder did this in this very state
    weight_T: Tensor  # float32, weight of a revealed token in the estimate of a likelihood; 0 for a hold
    importance_T: Tensor  # float32, 1 over how often its view was expected to be drawn
    view_T: Tensor  # int64, sorted; the actions of one view are one step
    block_T: Tensor  # int64, block in its document
    branch_T: Tensor  # int64, number of the action's branch in the pack, from 0
    completion_index_T: Tensor  # int64, index of the action's token in its completion
    threshold_T: Tensor  # float32, its completion's own confidence threshold; NaN: the rule's
    engine_logprob_T: Tensor  # float32 nats, recorded by the engine in this very state; NaN where none
    has_holds: bool
    view_ends: tuple[int, ...]  # after which row the actions of each view end

    @classmethod
    def of(cls, **columns: Tensor) -> Actions:
        """The table of these columns, which are on the host.

        Without `importance_T` all views are always there, without `threshold_T` completions have the rule's threshold,
        without `engine_logprob_T` nothing was recorded.
        """
        columns.setdefault("importance_T", torch.ones_like(columns["weight_T"]))
        for name in ("threshold_T", "engine_logprob_T"):
            columns.setdefault(name, torch.full(columns["target_T"].shape, math.nan))
        ends = columns["view_T"].unique_consecutive(return_counts=True)[1].cumsum(0)
        return cls(**columns, has_holds=not bool(columns["is_reveal_T"].all()), view_ends=tuple(ends.tolist()))

    def __len__(self) -> int:
        return len(self.target_T)

    def columns(self) -> dict[str, Tensor]:
        """Every column by its name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("has_holds", "view_ends")}

    def to(self, device: torch.device | str) -> Actions:
        moved = {name: column.to(device, non_blocking=True) for name, column in self.columns().items()}
        return Actions(**moved, has_holds=self.has_holds, view_ends=self.view_ends)

    def rows(self, rows: slice) -> Actions:
        """Consecutive actions; where views end among them is not asked again."""
        columns = {name: column[rows] for name, column in self.columns().items()}
        return Actions(**columns, has_holds=self.has_holds, view_ends=())


@dataclass(frozen=True)
class PackedViews:
    """Documents in one sequence, and what happened in it."""

    tokens: TokenTable
    actions: Actions

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> PackedViews:
        return PackedViews(self.tokens.to(device), self.actions.to(device))

    def reveals_only(self) -> PackedViews:
        """The same pack (on the host) without its hold actions: all that the reveal likelihood and SFT need."""
        kept_T = self.actions.is_reveal_T
        columns = {name: column[kept_T] for name, column in self.actions.columns().items()}
        return PackedViews(self.tokens, Actions.of(**columns))


def pack(documents: Sequence[ViewedDocument], block_length: int, shift: int = 0) -> PackedViews:
    """Lay documents one after another: trunk, then for each branch its clean tokens and its views.

    Args:
        block_length, shift: those of the model's `DiffusionScheme`.
    """
    rows: list[tuple[Tensor, ...]] = []  # token ids, positions, views of consecutive tokens
    owners: list[tuple[int, int, int, int]] = []  # their document, its lead, their branch, their number
    actions: list[dict[str, Tensor]] = []
    length, branch, next_view = 0, 0, 1

    def lay(document: int, branch: int, token_ids: Tensor, position: Tensor, view: Tensor) -> int:
        rows.append((token_ids, position, view))
        owners.append((document, documents[document].lead, branch, len(token_ids)))
        return len(token_ids)

    for number, document in enumerate(documents):
        prompt_length = len(document.prompt_ids)
        trunk = document.trunk(block_length)
        trunk_ids, tail_ids = document.prompt_ids[:trunk], document.prompt_ids[trunk:]
        trunk_start = length
        length += lay(number, 0, trunk_ids, torch.arange(trunk), torch.zeros_like(trunk_ids))
        for views in document.branches:
            branch += 1
            clean_ids = torch.cat([tail_ids, views.completion_ids]) if block_length else tail_ids[:0]
            position = torch.arange(trunk, trunk + len(clean_ids))
            clean_start = length
            length += lay(number, branch, clean_ids, position, torch.zeros_like(clean_ids))
            start_V = views.block_V * block_length - views.lead
            position_VB = start_V[:, None] + torch.arange(views.token_ids_VB.shape[1])
            view_VB = (torch.arange(len(views)) + next_view)[:, None].expand(position_VB.shape)
            row_VB = torch.arange(position_VB.numel()).view(position_VB.shape) + length
            if shift:
                before_VB = position_VB - 1
                clean_VB = before_VB + torch.where(before_VB < trunk, trunk_start, clean_start - trunk)
                row_VB = _rows_before(row_VB, clean_VB, position_VB)
            actions.append(_actions_of(views, view_VB, position_VB - prompt_length, row_VB, branch - 1))
            length += lay(number, branch, views.token_ids_VB.flatten(), position_VB.flatten(), view_VB.flatten())
            next_view += len(views)
    return PackedViews(_token_table(rows, owners, block_length), _joined(actions))


def _rows_before(row_VB: Tensor, clean_VB: Tensor, position_VB: Tensor) -> Tensor:
    """The row before each position of some views: in the view, or where a view begins its clean row.

    Nothing stands before a sequence, whose first position therefore keeps its own.
    """
    clean_V1 = torch.where(position_VB[:, :1] == 0, row_VB[:, :1], clean_VB[:, :1])
    return torch.cat([clean_V1, row_VB[:, :-1]], dim=1)


def _actions_of(
    views: Views, view_VB: Tensor, completion_index_VB: Tensor, row_VB: Tensor, branch: int
) -> dict[str, Tensor]:
    """The actions of one branch's views, which `row_VB` of the pack predict."""
    block_length = view_VB.shape[1]
    place_T = (views.revealed_VB | views.held_VB).flatten().nonzero().squeeze(1)
    is_reveal_T = views.revealed_VB.flatten()[place_T]
    return {
        "index_T": row_VB.flatten()[place_T],
        "target_T": views.target_ids_VB.flatten()[place_T],
        "is_reveal_T": is_reveal_T,
        "is_visited_T": views.visited_VB.flatten()[place_T],
        "weight_T": views.weight_VB.flatten()[place_T] * is_reveal_T,
        "importance_T": views.importance_V[place_T // block_length],
        "view_T": view_VB.flatten()[place_T],
        "block_T": views.block_V[place_T // block_length],
        "branch_T": torch.full_like(place_T, branch),
        "completion_index_T": completion_index_VB.flatten()[place_T],
        "threshold_T": torch.full(place_T.shape, views.confidence_threshold),
        "engine_logprob_T": views.engine_logprob_VB.flatten()[place_T],
    }


def _joined(actions: Sequence[dict[str, Tensor]]) -> Actions:
    return Actions.of(**{name: torch.cat([of_branch[name] for of_branch in actions]) for name in actions[0]})


def _token_table(
    rows: Sequence[tuple[Tensor, ...]], owners: Sequence[tuple[int, int, int, int]], block_length: int
) -> TokenTable:
    document, lead, branch, number = torch.tensor(owners).T
    token_ids_L, position_L, view_L = (torch.cat(columns) for columns in zip(*rows, strict=True))
    counted_L = position_L + lead.repeat_interleave(number)
    return TokenTable(
        token_ids_L=token_ids_L,
        position_L=position_L,
        document_L=document.repeat_interleave(number),
        branch_L=branch.repeat_interleave(number),
        block_L=counted_L // block_length if block_length else torch.zeros_like(position_L),
        view_L=view_L,
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
