"""Forward and backward of one RL step in packed views, against the layouts of DiRL, TraceRL and DARE, same model.

    python scripts/bench_train_step.py [--model tiny|1.7b|4b|8b] [--prompt 200] [--completion 1000] [--group 1] ...

Every layout scores the same trajectories, exactly, and the script stops if their log-probabilities differ. One JSON
line a layout; `ratio` is its seconds over those of packed views in this run. What a row of each layout holds, for B
tokens a block and K steps in the longest block:

    packed   clean tokens once and a view per block and step, the prompt once for the group, no padding
    dirl     B rows a trajectory of [noisy | clean], each half padded to the configured prompt + completion
    tracerl  K rows a trajectory of [prompt, padded | clean completion | noisy completion, padded]
    dare     K rows a trajectory of [noisy | clean], not padded

Each with attention over the tiles of 128 x 128 that are read (as DiRL's and DARE's own code, by FlexAttention; on a
CPU by SDPA, tile row by tile row) and over all pairs (as TraceRL's own), padded as its code pads (`own`: DiRL and
TraceRL to the configured widths; TraceRL at most, since it pads to the longest rollout of a step) and not at all
(`none`). They are treated kindly: only scored positions go through lm_head, rows go one at a time so that they need
little memory, masks are made beforehand, and the passes that their code makes for old log-probabilities are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from bench_layouts import clean_and_noisy_row, plan_of, score_row
from bench_setup import MODEL_NAMES, build_model, matmul_tflops, model_fields, print_line, rate_fields, time_in_turn
from torch import Tensor

from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.packing import PackedViews, ViewedDocument, pack
from dirl.diffusion.trajectory import Trajectory
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import replay_views
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.flex_attention import padded_for_flex, tile_reads
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.training.balance import split_by_budget

BLOCK = 4


def draw_trajectories(arguments: argparse.Namespace, vocabulary: int) -> list[Trajectory]:
    """Random tokens; blocks take 1 to B steps, as many on average as the asked tokens per step give."""
    generator = torch.Generator().manual_seed(0)
    prompt_ids = torch.randint(5, vocabulary, (arguments.prompt,), generator=generator)
    length = arguments.completion - (arguments.prompt + arguments.completion) % BLOCK
    num_blocks = -(-(arguments.prompt % BLOCK + length) // BLOCK)
    extra = min(max(BLOCK / arguments.tokens_per_step - 1, 0.0), BLOCK - 1.0) / (BLOCK - 1)
    trajectories = []
    for _ in range(arguments.group):
        steps_K = 1 + torch.bernoulli(torch.full((num_blocks, BLOCK - 1), extra), generator=generator).sum(1).long()
        steps_K[-1] = BLOCK  # some block always takes them all
        # The first positions of a block take the first steps, the others share the last: every step reveals something.
        steps_KB = torch.minimum(torch.arange(1, BLOCK + 1)[None], steps_K[:, None])
        order_KB = torch.rand(steps_KB.shape, generator=generator).argsort(1)
        step_map = steps_KB.gather(1, order_KB).flatten()[-length:]
        trajectories.append(
            Trajectory(
                prompt_ids,
                torch.randint(5, vocabulary, (length,), generator=generator),
                _dense_steps(step_map, length),
                BLOCK,
            )
        )
    return trajectories


def _dense_steps(step_map: Tensor, length: int) -> Tensor:
    """The first block may have lost a step to the prompt's tail: number what is left from 1."""
    first = length % BLOCK
    if first:
        step_map[:first] = step_map[:first].unique(return_inverse=True)[1] + 1
    return step_map


class Kind(NamedTuple):
    """A layout, how its attention is computed, and what it is padded to."""

    name: str
    attention: str
    padding: str


PACKED = Kind("packed", "tiles", "none")
Layout = list[tuple[list[int], PackedViews]]  # which trajectories a pack or row holds, and the pack


def packed_layout(trajectories: Sequence[Trajectory], mask: int, budget: int) -> Layout:
    """Our layout: as few packs as the budget allows, trajectories of a pack sharing their prompt."""
    views = [replay_views(trajectory, mask) for trajectory in trajectories]
    prompt_ids = trajectories[0].prompt_ids
    lengths = [ViewedDocument(prompt_ids, [one]).packed_length(BLOCK) for one in views]
    bins = split_by_budget(lengths, max([budget, *lengths]))
    return [(b, pack([ViewedDocument(prompt_ids, [views[i] for i in b])], BLOCK).reveals_only()) for b in bins]


def row_layout(
    trajectory: Trajectory, mask: int, num_rows: int, *, prompt_width: int, completion_width: int, doubles_prompt: bool
) -> list[PackedViews]:
    """One row a step number: the clean sequence, and a copy in which every block is at that step; padded to widths."""
    prompt_ids, completion_ids, steps = trajectory.prompt_ids, trajectory.completion_ids, trajectory.step_map
    clean_ids = torch.cat([prompt_ids, completion_ids])
    first_copied = 0 if doubles_prompt else len(prompt_ids) - len(prompt_ids) % BLOCK
    width = (2 if doubles_prompt else 1) * prompt_width + 2 * completion_width
    rows = []
    for step in range(1, num_rows + 1):
        noisy_ids = torch.cat([prompt_ids, completion_ids.masked_fill(steps >= step, mask)])
        index = (steps == step).nonzero().squeeze(1) + len(prompt_ids)
        rows.append(
            clean_and_noisy_row(clean_ids, noisy_ids, index, block_length=BLOCK, start=first_copied, width=width)
        )
    return rows


def build_layouts(trajectories: Sequence[Trajectory], mask: int, arguments: argparse.Namespace) -> dict[Kind, Layout]:
    """The rows of every layout, with every attention and padding that was asked for."""
    most_steps = max(int(t.step_map.max()) for t in trajectories)
    lengths = {"prompt_width": 0, "completion_width": 0}
    limits = {"prompt_width": arguments.max_prompt, "completion_width": arguments.max_completion}
    kinds = {
        "dirl": (BLOCK, True, limits),
        "tracerl": (most_steps, False, limits),
        "dare": (most_steps, True, lengths),
    }
    layouts = {PACKED: packed_layout(trajectories, mask, arguments.max_tokens_per_micro_batch)}
    for name in arguments.layouts:
        num_rows, doubles_prompt, own = kinds[name]
        # What pads nothing is the same either way.
        for padding in dict.fromkeys("none" if own is lengths else padding for padding in arguments.padding):
            widths = own if padding == "own" else lengths
            rows = [
                ([i], row)
                for i, trajectory in enumerate(trajectories)
                for row in row_layout(trajectory, mask, num_rows, doubles_prompt=doubles_prompt, **widths)
            ]
            layouts |= {Kind(name, attention, padding): rows for attention in arguments.attention}
    return layouts


class Bench:
    """A model and the two ways to score a row with it."""

    def __init__(self, model: BlockDiffusionModel) -> None:
        self.model, self.scorer = model.train(), PackedScorer(model)
        # With the entropy that a step of RL reports.
        self.rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model), wants_entropy=True)
        self.device = next(model.parameters()).device

    def scores(self, kind: Kind, layout: Layout) -> Iterator[Callable[[], Tensor]]:
        """For each row what gives the log-probabilities of its actions; peers' masks are made here."""
        for _, row in layout:
            if kind == PACKED:
                yield lambda row=row: self.scorer(row, self.rule).logprob_T  # type: ignore[misc]
            else:
                yield partial(score_row, self.model, row, plan_of(row, kind.attention), self.rule)

    def step(self, kind: Kind, layout: Layout) -> Callable[[], None]:
        """Forward and backward over all rows, gradients accumulated, as a training step does."""
        scores = list(self.scores(kind, layout))

        def run() -> None:
            self.model.zero_grad(set_to_none=True)
            for score in scores:
                score().sum().backward()

        return run

    @torch.no_grad()
    def all_logprobs(self, kind: Kind, layout: Layout, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """(R,) of each trajectory, in the order of its tokens."""
        found = [torch.full((len(t.completion_ids),), torch.nan) for t in trajectories]
        for (members, row), score in zip(layout, self.scores(kind, layout), strict=True):
            logprob_T = score().cpu()
            for branch, member in enumerate(members):
                mine = (row.actions.branch_T == branch).cpu()
                # A row of one trajectory counts from the start of its prompt.
                index = row.actions.completion_index_T.cpu()[mine] - (
                    0 if kind == PACKED else len(trajectories[0].prompt_ids)
                )
                found[member][index] = logprob_T[mine]
        return found


def share_of_tiles(layout: Layout) -> float:
    """FlexAttention tiles that are computed, of those that a dense mask would compute."""
    read = total = 0
    for _, row in layout:
        for reads in tile_reads(padded_for_flex(row.tokens)):
            read += int(reads.sum())
        total += reads.numel()
    return read / total


def measure(arguments: argparse.Namespace) -> None:
    model = build_model(arguments.model)
    if arguments.model != "tiny":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bench = Bench(model)
    vocabulary = min(250, model.config.vocab_size - 10)
    trajectories = draw_trajectories(arguments, vocabulary)
    layouts = {
        kind: [(i, row.to(bench.device)) for i, row in layout]
        for kind, layout in build_layouts(trajectories, model.config.mask_token_id, arguments).items()
    }
    expected = torch.cat(bench.all_logprobs(PACKED, layouts[PACKED], trajectories))
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    differences = {}
    for kind, layout in layouts.items():
        found = torch.cat(bench.all_logprobs(kind, layout, trajectories))
        differences[kind] = float((found - expected).abs().max())
        if not differences[kind] <= tolerance:
            sys.exit(f"{kind}: log-probabilities differ from packed views by {differences[kind]:.2e} nats")
    timings = time_in_turn({n: bench.step(n, layout) for n, layout in layouts.items()}, repeats=arguments.repeats)
    rate = matmul_tflops()
    for kind, layout in layouts.items():
        print_line(
            "train_step",
            layout=kind.name,
            attention=kind.attention,
            padding=kind.padding,
            **model_fields(arguments.model, model),
            prompt=arguments.prompt,
            completion=len(trajectories[0].completion_ids),
            tokens_per_step=arguments.tokens_per_step,
            group=arguments.group,
            config=f"{arguments.max_prompt}+{arguments.max_completion}",
            rows=len(layout),
            tokens=sum(len(row) for _, row in layout),
            computed_tiles=round(share_of_tiles(layout), 4),
            **timings[kind].as_fields(),
            ratio=round(timings[kind].best / timings[PACKED].best, 2),
            **rate_fields(model, [row for _, row in layout], timings[kind].best, rate),
            largest_difference=differences[kind],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", choices=MODEL_NAMES, help="random weights of that shape")
    parser.add_argument("--layouts", nargs="*", default=["dirl", "tracerl", "dare"], help="what to compare with")
    parser.add_argument(
        "--attention", nargs="*", default=["tiles"], choices=["tiles", "dense"], help="of these layouts"
    )
    parser.add_argument(
        "--padding", nargs="*", default=["own", "none"], choices=["own", "none"], help="of these layouts"
    )
    parser.add_argument("--prompt", type=int, default=200, help="tokens")
    parser.add_argument("--completion", type=int, default=1000, help="tokens")
    parser.add_argument("--tokens-per-step", type=float, default=2.2)
    parser.add_argument("--group", type=int, default=1, help="completions of the one prompt")
    parser.add_argument("--max-prompt", type=int, default=1024, help="configured width that DiRL and TraceRL pad to")
    parser.add_argument("--max-completion", type=int, default=2048)
    parser.add_argument("--max-tokens-per-micro-batch", type=int, default=8192, help="budget of a pack")
    parser.add_argument("--repeats", type=int, default=3)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
