"""Documents and a step number -> packed micro-batches of noisy views.

Everything random is a function of (seed, step, place in the global batch), never of the rank or of what came before:
a resumed run, and a run on another number of processes, see the same noise.

Shapes: R completion tokens, K blocks, B block length, T scored tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dirl.data.conversations import Document
from dirl.diffusion.noising import NoiseConfig, draw_noise_levels
from dirl.diffusion.packing import DiffusionScheme, PackedViews, ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.views import noisy_views
from dirl.sft.block_starts import with_block_starts


@dataclass(frozen=True)
class Example:
    """A document whose completion is filled up to the end of its last block."""

    trajectory: Trajectory
    scored_KB: Tensor  # bool, tokens that may be masked and scored

    @property
    def num_scored(self) -> int:
        return int(self.scored_KB.sum())


def make_example(
    document: Document, scheme: DiffusionScheme, fill_id: int, *, score_fill: bool, window: int = 1
) -> Example:
    """Fill the last block: a decoder denoises whole blocks, so the model must know what follows EOS in one.

    Args:
        window: under full attention, where there are no blocks, the completion is filled to a multiple of it.
        score_fill: whether the fill is masked and scored too. Otherwise it is only context.
    """
    prompt_length, real_length = len(document.prompt_ids), len(document.completion_ids)
    lead, block_length = scheme.lead(prompt_length), scheme.block_length
    num_fill = -(lead + prompt_length + real_length) % block_length if block_length else -real_length % window
    prompt_ids = torch.tensor(document.prompt_ids, dtype=torch.int64)
    completion_ids = torch.tensor([*document.completion_ids, *[fill_id] * num_fill], dtype=torch.int64)
    trajectory = Trajectory(prompt_ids, completion_ids, torch.ones_like(completion_ids), block_length, lead=lead)
    scored_KB = trajectory.steps_KB > 0
    if num_fill and not score_fill:
        scored_KB.view(-1)[-num_fill:] = False
    return Example(trajectory, scored_KB)


def packed_tokens(
    prompt_length: int, completion_length: int, *, scheme: DiffusionScheme, num_views: int, window: int
) -> int:
    """Tokens that a document takes in a pack: its clean ones, and `num_views` noisy copies of each completion block.

    Under full attention the copies are of the whole document, and there is no clean one.
    """
    if scheme.is_full:
        return num_views * (prompt_length + completion_length + -completion_length % window)
    tail = scheme.tail(prompt_length)
    noisy = tail + completion_length + -(tail + completion_length) % scheme.block_length
    return prompt_length - tail + (1 + num_views) * noisy


def batch_noise_levels(examples: Sequence[Example], noise: NoiseConfig, seed: int) -> list[Tensor]:
    """Noise levels of every block of a global batch, spread evenly over it; one (K,) tensor an example."""
    generator = torch.Generator().manual_seed(seed)
    num_blocks = [len(example.scored_KB) for example in examples]
    if noise.noise_level == "sequence":
        levels = draw_noise_levels(len(examples), noise, generator)
        return [level.expand(count) for level, count in zip(levels, num_blocks, strict=True)]
    return list(draw_noise_levels(sum(num_blocks), noise, generator).split(num_blocks))


def view_document(
    example: Example, levels_K: Tensor, mask_token_id: int, *, noise: NoiseConfig, seed: int
) -> ViewedDocument:
    """One noisy copy (or complementary pair) of each block of an example."""
    generator = torch.Generator().manual_seed(seed)
    trajectory = example.trajectory
    views = noisy_views(trajectory, example.scored_KB, levels_K, mask_token_id, noise=noise, generator=generator)
    return ViewedDocument(trajectory.prompt_ids, [views])


def pack_micro_batches(
    documents: Sequence[ViewedDocument],
    scheme: DiffusionScheme,
    split: Callable[[Sequence[int]], list[list[int]]],
    *,
    starts: bool = False,
) -> list[PackedViews]:
    """Packs of documents, as `split` (lengths -> bins of indices) groups them.

    Args:
        starts: score the first tokens of blocks too, from the clean copy.
    """
    bins = split([document.packed_length(scheme.block_length) for document in documents])
    packs = [pack([documents[i] for i in members], scheme.block_length, scheme.shift) for members in bins]
    if not starts:
        return packs
    prompt_lengths = [[len(documents[i].prompt_ids) for i in members] for members in bins]
    return [with_block_starts(packed, lengths) for packed, lengths in zip(packs, prompt_lengths, strict=True)]
