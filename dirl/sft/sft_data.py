"""The data of an SFT run: what is imitated, what is held out, and what of the former asks what the latter does."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from dirl.config import bounded
from dirl.data.data_config import DataConfig
from dirl.data.document_source import JoinedDocuments
from dirl.data.questions import EvaluationQuestions, Overlap, Overlaps, kept_apart
from dirl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class SFTDataConfig(DataConfig):
    """What is imitated."""

    num_heldout: int = bounded(128, least=0)  # documents set aside for the held-out loss, where heldout is 0
    # tokens of prompt + completion; longer documents are left out when they are drawn and counted, texts are cut
    max_length: int = bounded(4096, least=1)
    score_fill: bool = True  # also learn what fills the last block after EOS, so that the decoder ends in few steps
    # full attention: completions are filled with EOS to a multiple of so many tokens, as generation windows are
    fill_window: int = bounded(32, least=1)


@dataclass(frozen=True)
class DocumentSplit:
    """Which documents are trained on, and which are not."""

    trained: list[list[int]]  # of each source, by their numbers in it
    heldout: list[int]  # among all
    overlaps: Overlaps  # rows that ask what held-out ones do


def split_documents(documents: JoinedDocuments, data: SFTDataConfig, seed: int) -> DocumentSplit:
    """Documents in two: by the hashes of their questions, or the last of a fixed shuffle held out.

    Raises:
        UserError: nothing of a source is left to train on.
    """
    count = len(documents)
    if data.heldout:
        setting = f"data.heldout={data.heldout:g}"
        chosen = set(kept_apart(documents.question_keys, data.heldout))
        is_apart = [documents.row_of(index) in chosen for index in range(count)]
        trained = [index for index in range(count) if not is_apart[index]]
        heldout = [index for index in range(count) if is_apart[index]]
        if not heldout:
            raise UserError(f"{setting} keeps none of {len(documents.question_keys)} rows apart; raise it")
    else:
        setting = f"data.num_heldout={data.num_heldout}"
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        num_trained = max(count - data.num_heldout, 0)
        trained, heldout = order[:num_trained], order[num_trained:]
    rows = {documents.row_of(index) for index in trained}
    overlaps: dict[int, Overlap] = {}
    if data.decontaminate != "off" and heldout:
        overlaps = _overlaps(documents, rows, {documents.row_of(index) for index in heldout})
    if data.decontaminate == "drop" and overlaps:
        trained = [index for index in trained if documents.row_of(index) not in overlaps]
        setting += " with data.decontaminate=drop"
    of_sources = []
    for source, (first, end) in zip(documents.sources, itertools.pairwise(documents.firsts), strict=True):
        of_sources.append([index - first for index in trained if first <= index < end])
        if not of_sources[-1]:
            raise UserError(f"{setting} leaves none of {end - first} documents of {source.name} to train on; lower it")
    told = Overlaps(list(overlaps.values()), len(rows), data.decontaminate == "drop")
    return DocumentSplit(of_sources, heldout, told)


def _overlaps(documents: JoinedDocuments, trained: Collection[int], heldout: Iterable[int]) -> dict[int, Overlap]:
    """By row."""
    asked = EvaluationQuestions(documents.question(row) for row in heldout)
    found = ((row, asked.find(*told)) for row, told in enumerate(documents.questions()) if row in trained)
    return {row: overlap for row, overlap in found if overlap is not None}
