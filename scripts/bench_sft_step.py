"""Forward and backward of one SFT step in packed views, against the rows of [noisy | clean] that others train on.

    python scripts/bench_sft_step.py [--model tiny|1.7b|4b|8b] [--documents 32] [--data FILE --tokenizer DIR]

Documents have the lengths of GSM8K's training set under SDAR's tokenizer (prompt: log-normal around 81 tokens,
standard deviation of the logarithm 0.24; completion: around 94, 0.38), or those of a file. Rows are padded (`own`:
one a document, to the longest of the batch, or to --max-length where a configured length is padded to, as dllm's
trainer; with attention over all pairs, `dense`, as there) or packed one after another under the same budget as packed
views (`none`: as DiRL's example does; with attention over the tiles that are read, `tiles`). All see the same noise
and must give the same loss.
One JSON line a layout; `ratio` is its seconds over those of packed views in this run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from bench_layouts import clean_and_noisy_row, joined, plan_of, score_row
from bench_setup import MODEL_NAMES, build_model, matmul_tflops, model_fields, print_line, rate_fields, time_in_turn
from torch import Tensor

from dirl.data.chat import load_tokenizer
from dirl.data.conversations import Document
from dirl.data.data_config import DataSource
from dirl.data.document_source import open_documents
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import DiffusionScheme, PackedViews, ViewedDocument, pack
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.sft.batch import Example, batch_noise_levels, make_example, view_document
from dirl.sft.loss import nelbo_loss
from dirl.training.balance import split_by_budget

BLOCK = 4
SCHEME = DiffusionScheme(block_length=BLOCK, mask_token_id=0)  # the mask is not read


def draw_documents(count: int, vocabulary: int) -> list[Document]:
    """Random tokens at GSM8K's lengths."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, 2, generator=generator)
    lengths = (torch.tensor([4.395, 4.544]) + normal * torch.tensor([0.243, 0.383])).exp().round().long().clamp(min=2)
    tokens = [torch.randint(5, vocabulary, (int(n),), generator=generator).tolist() for n in lengths.flatten()]
    return [Document(prompt, completion) for prompt, completion in zip(tokens[::2], tokens[1::2], strict=True)]


def rows_of(documents: Sequence[ViewedDocument], width: int) -> list[tuple[PackedViews, Tensor]]:
    """The same noise in one row a document, padded to `width`, and the weight of each scored token."""
    rows = []
    for document in documents:
        views = document.branches[0]
        clean_ids = torch.cat([document.prompt_ids, views.completion_ids])
        noisy_ids = clean_ids.clone()
        position_VB = views.block_V[:, None] * BLOCK + torch.arange(BLOCK)
        noisy_ids[position_VB] = views.token_ids_VB
        scored = position_VB[views.revealed_VB]
        row = clean_and_noisy_row(clean_ids, noisy_ids, scored, block_length=BLOCK, width=width)
        rows.append((row, views.weight_VB[views.revealed_VB]))
    return rows


def packed_rows(documents: Sequence[ViewedDocument], budget: int) -> list[tuple[PackedViews, Tensor]]:
    """The same, several in a row and no padding."""
    rows = rows_of(documents, 0)
    bins = split_by_budget([len(row) for row, _ in rows], budget)
    return [(joined([rows[i][0] for i in b]), torch.cat([rows[i][1] for i in b])) for b in bins]


class Bench:
    """A model, and one SFT step in either layout."""

    def __init__(self, model: BlockDiffusionModel, documents: Sequence[ViewedDocument], budget: int) -> None:
        self.model, self.scorer = model.train(), PackedScorer(model)
        self.rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
        device = next(model.parameters()).device
        bins = split_by_budget([document.packed_length(BLOCK) for document in documents], budget)
        self.packs = [pack([documents[i] for i in b], BLOCK).reveals_only().to(device) for b in bins]
        self.device = device

    def packed(self) -> float:
        self.model.zero_grad(set_to_none=True)
        total = 0.0
        for packed in self.packs:
            loss = nelbo_loss(self.scorer(packed, self.rule).logprob_T, packed.actions.weight_T, 1.0)
            loss.backward()
            total += float(loss.detach())
        return total

    def rows(self, rows: Sequence[tuple[PackedViews, Tensor]], attention: str) -> Callable[[], float]:
        on_device = [(row.to(self.device), weight.to(self.device)) for row, weight in rows]
        planned = [(row, plan_of(row, attention), weight_T) for row, weight_T in on_device]

        def run() -> float:
            self.model.zero_grad(set_to_none=True)
            total = 0.0
            for row, plan, weight_T in planned:
                loss = nelbo_loss(score_row(self.model, row, plan, self.rule), weight_T, 1.0)
                loss.backward()
                total += float(loss.detach())
            return total

        return run


def load_examples(arguments: argparse.Namespace, vocabulary: int) -> list[Example]:
    if arguments.data:
        tokenizer = load_tokenizer(arguments.tokenizer)
        source = open_documents(DataSource(path=arguments.data, limit=arguments.documents), tokenizer)
        documents = [document for index in range(len(source)) if (document := source[index]) is not None]
        clip = [
            Document([t % vocabulary for t in d.prompt_ids], [t % vocabulary for t in d.completion_ids])
            for d in documents
            if len(d) <= 8192
        ]
        return [make_example(d, SCHEME, 1, score_fill=True) for d in clip]
    return [make_example(d, SCHEME, 1, score_fill=True) for d in draw_documents(arguments.documents, vocabulary)]


def measure(arguments: argparse.Namespace) -> None:
    model = build_model(arguments.model)
    if arguments.model != "tiny":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    examples = load_examples(arguments, min(250, model.config.vocab_size - 10))
    noise = NoiseConfig()
    levels = batch_noise_levels(examples, noise, seed=0)
    documents = [
        view_document(example, level_K, model.config.mask_token_id, noise=noise, seed=i)
        for i, (example, level_K) in enumerate(zip(examples, levels, strict=True))
    ]
    bench = Bench(model, documents, arguments.max_tokens_per_micro_batch)
    longest = arguments.max_length or max(len(d.prompt_ids) + len(d.branches[0].completion_ids) for d in documents)
    peers = {
        "own": rows_of(documents, 2 * longest),
        "none": packed_rows(documents, arguments.max_tokens_per_micro_batch),
    }
    layouts = {("packed", "tiles", "none"): bench.packs}
    works: dict[tuple[str, str, str], Callable[[], float]] = {("packed", "tiles", "none"): bench.packed}
    for padding in arguments.padding:
        for attention in arguments.attention:
            layouts[("rows", attention, padding)] = [row for row, _ in peers[padding]]
            works[("rows", attention, padding)] = bench.rows(peers[padding], attention)
    losses = {kind: work() for kind, work in works.items()}
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    if max(losses.values()) - min(losses.values()) > tolerance * abs(losses[("packed", "tiles", "none")]):
        sys.exit(f"the layouts disagree: loss {losses}")
    timings = time_in_turn(works, repeats=arguments.repeats)
    lengths = [len(e.trajectory.prompt_ids) + len(e.trajectory.completion_ids) for e in examples]
    rate = matmul_tflops()
    for kind, timing in timings.items():
        name, attention, padding = kind
        print_line(
            "sft_step",
            layout=name,
            attention=attention,
            padding=padding,
            **model_fields(arguments.model, model),
            documents=len(documents),
            mean_length=round(sum(lengths) / len(lengths), 1),
            row_length=2 * longest,
            tokens=sum(map(len, layouts[kind])),
            **timing.as_fields(),
            ratio=round(timing.best / timings[("packed", "tiles", "none")].best, 2),
            loss=round(losses[kind], 4),
            **rate_fields(model, layouts[kind], timing.best, rate),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=MODEL_NAMES, help="random weights of that shape")
    parser.add_argument("--documents", type=int, default=32, help="documents of a step")
    parser.add_argument("--max-length", type=int, default=0, help="length rows are padded to; 0: the longest document")
    parser.add_argument(
        "--attention", nargs="*", default=["tiles", "dense"], choices=["tiles", "dense"], help="of rows"
    )
    parser.add_argument("--padding", nargs="*", default=["own", "none"], choices=["own", "none"], help="of rows")
    parser.add_argument("--data", default="", help="SFT file whose lengths are used")
    parser.add_argument("--tokenizer", default="", help="tokenizer directory for --data")
    parser.add_argument("--max-tokens-per-micro-batch", type=int, default=8192, help="budget of a pack")
    parser.add_argument("--repeats", type=int, default=3)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
