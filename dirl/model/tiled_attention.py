"""A pack -> a few batches of small dense attention problems: SDPA that skips what the rule forbids.

Each branch of each document is cut into chunks of consecutive blocks. The queries of a chunk are its clean tokens and
the tokens of its views; its keys are the document's trunk, the branch's clean tokens up to the end of the chunk, and
its own views. Chunks of similar size are padded into one batch. Nothing of size L x L exists.

Shapes: L packed tokens, N tiles in a batch, Q and K their padded queries and keys, H query heads, G
key/value heads, E head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dirl.diffusion.packing import TokenTable, attention_rule
from dirl.model.attention import masked_attention

_CHUNK_TOKENS = 256  # queries a chunk aims at: fewer means less wasted work, more means fewer calls
_PADDING_ALLOWED = 1.3  # padded over real keys in a batch


@dataclass(frozen=True)
class _Batch:
    query_index: Tensor  # (N * Q,) int64 into L
    key_index: Tensor  # (N * K,) int64 into L
    mask_N1QK: Tensor  # bool


class TiledPlan:
    """Attention of a pack by batches of tiles."""

    def __init__(self, tokens: TokenTable) -> None:
        tiles = sorted(_tiles(tokens), key=lambda tile: (len(tile[1]), len(tile[0])))
        ids = torch.stack(tokens.ids)
        self._batches: list[_Batch] = []
        inverse_L = torch.empty(len(tokens), dtype=torch.int64, device=ids.device)
        rows = 0
        for group in _similar(tiles):
            query_index, is_query = _padded([queries for queries, _ in group])
            key_index, is_key = _padded([keys for _, keys in group])
            row_NQ = torch.arange(query_index.numel(), device=ids.device).view_as(query_index) + rows
            inverse_L[query_index[is_query]] = row_NQ[is_query]
            rows += query_index.numel()
            mask_NQK = attention_rule(
                tuple(ids[:, query_index][..., :, None].unbind(0)), tuple(ids[:, key_index][..., None, :].unbind(0))
            )
            mask_NQK &= is_key[:, None, :]
            mask_NQK[..., 0] |= ~is_query  # padding reads one key: softmax over nothing is NaN
            self._batches.append(_Batch(query_index.flatten(), key_index.flatten(), mask_NQK[:, None]))
        self._inverse_L = inverse_L

    def attend(self, query_NHLE: Tensor, key_NGLE: Tensor, value_NGLE: Tensor, scaling: float) -> Tensor:
        query_LHE, key_LGE, value_LGE = (x[0].transpose(0, 1) for x in (query_NHLE, key_NGLE, value_NGLE))
        outputs = []
        for batch in self._batches:
            num_tiles = len(batch.mask_N1QK)
            query, key, value = (
                x.index_select(0, index).unflatten(0, (num_tiles, -1)).transpose(1, 2)
                for x, index in (
                    (query_LHE, batch.query_index),
                    (key_LGE, batch.key_index),
                    (value_LGE, batch.key_index),
                )
            )
            output = masked_attention(query, key, value, batch.mask_N1QK, scaling)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self._inverse_L)[None]


def _padded(indices: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Index vectors as one matrix, and where it is real; padding points at token 0."""
    matrix = torch.nn.utils.rnn.pad_sequence(indices, batch_first=True, padding_value=-1)
    return matrix.clamp(min=0), matrix >= 0


def _similar(tiles: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Consecutive tiles (sorted by size) whose sizes are close enough to share a padded batch."""
    group: list[tuple[Tensor, Tensor]] = []
    for tile in tiles:
        if group and len(tile[1]) > _PADDING_ALLOWED * len(group[0][1]) + 16:
            yield group
            group = []
        group.append(tile)
    if group:
        yield group


def _tiles(tokens: TokenTable) -> Iterator[tuple[Tensor, Tensor]]:
    """(query index, key index) of every chunk; every token is a query of exactly one."""
    block_L = tokens.block_L
    trunks: dict[int, range] = {}
    for document, branch, clean, views in _segments(tokens):
        if branch == 0:
            trunks[document] = clean
        trunk = trunks.get(document, range(0)) if branch else range(0)
        if not clean and not trunk:  # each view reads itself alone, as under full attention
            yield from ((rows, rows) for rows in _whole_views(tokens.view_L, views))
            continue
        bounds = _chunk_bounds(block_L, clean, views)
        for first, end in pairwise(bounds):
            chunk_clean = _blocks_between(block_L, clean, first, end)
            chunk_views = _blocks_between(block_L, views, first, end)
            prefix = range(clean.start, chunk_clean.stop)
            yield _index(block_L, chunk_clean, chunk_views), _index(block_L, trunk, prefix, chunk_views)


def _segments(tokens: TokenTable) -> Iterator[tuple[int, int, range, range]]:
    """(document, branch, its clean tokens, its view tokens) in the order of the pack."""
    ids = torch.stack([tokens.document_L, tokens.branch_L, (tokens.view_L > 0).long()])
    runs, counts = ids.unique_consecutive(dim=1, return_counts=True)
    start = 0
    pending: tuple[int, int, range] | None = None
    for (document, branch, is_view), count in zip(runs.T.tolist(), counts.tolist(), strict=True):
        segment = range(start, start + count)
        start += count
        if is_view:
            # pack() puts a branch's clean tokens before its views; a part of a completion may have none.
            if pending is not None and pending[:2] != (document, branch):
                yield (*pending, range(0))
                pending = None
            yield (*(pending or (document, branch, segment[:0])), segment)
            pending = None
            continue
        if pending is not None:
            yield (*pending, range(0))
        pending = (document, branch, segment)
    if pending is not None:
        yield (*pending, range(0))


def _chunk_bounds(block_L: Tensor, *segments: range) -> list[int]:
    """Block numbers that cut the segments of a branch (each sorted by block) into chunks of about _CHUNK_TOKENS.

    A completion that is cut may have views of blocks whose clean tokens are not there.
    """
    present = [segment for segment in segments if segment]
    first = min(int(block_L[segment[0]]) for segment in present)
    end = max(int(block_L[segment[-1]]) for segment in present) + 1
    num_chunks = min(max(1, round(sum(map(len, present)) / _CHUNK_TOKENS)), end - first)
    return [first + (end - first) * i // num_chunks for i in range(num_chunks + 1)]


def _whole_views(view_L: Tensor, views: range) -> Iterator[Tensor]:
    """Indices of consecutive views of one length, about _CHUNK_TOKENS of them together."""
    view_length = int((view_L[views.start : views.stop] == view_L[views.start]).sum())
    size = max(1, _CHUNK_TOKENS // view_length) * view_length
    yield from torch.arange(views.start, views.stop, device=view_L.device).split(size)


def _blocks_between(block_L: Tensor, segment: range, first: int, end: int) -> range:
    """The part of a segment (sorted by block) whose blocks are in [first, end)."""
    blocks = block_L[segment.start : segment.stop]
    start, stop = torch.searchsorted(blocks, torch.tensor([first, end], device=blocks.device)).tolist()
    return range(segment.start + start, segment.start + stop)


def _index(like: Tensor, *ranges: range) -> Tensor:
    return torch.cat([torch.arange(r.start, r.stop, device=like.device) for r in ranges])
