"""Decoding under full attention: a prompt and the masks after it are one canvas, which every step reads whole.

Any position may read any other, so no key is ever final and none is kept: exact, and as dear as it looks. Tokens are
revealed window by window from left to right; a completion ends with the window that holds a stop token, and the masks
after it stay what they were, which replay knows of.

An approximate cache keeps keys all the same. The first step of a window reads its canvas whole and stores the keys and
values of every position; the further steps of that window read fewer rows anew, whose keys replace the stored ones, and
take all other keys as they were when the window began. `prefix` reads the window and what follows it, `dual` the window
alone; with a shift also the row before the window, which predicts its first token. Each canvas has windows of its own,
so what is stored of one depends on no other.

Shapes: N canvases in flight, S those a cache began with, L positions of the longest, W positions of a window, M masked
positions of the current windows, R canvases of a pass, K positions it reads of each, H query heads, G key/value heads,
E head dimension, D hidden.
Source: LLaDA's decoder (arXiv 2502.09992), whose blocks are windows here; the caches are those of Fast-dLLM (arXiv
2505.22618), whose first step of a block also is the pass that fills them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dirl.model.attention import AttentionPlan, DensePlan
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.block_step import Blocks, DenoisingStep
from dirl.rollout.engine import ApproximateCache, Request
from dirl.rollout.local.block_cache import BlockCache, Entries, read_slots
from dirl.rollout.watch import Frame

PASS_TOKENS = 65_536  # of all canvases together, where no other bound is set


class StoredKeys:
    """A plan of attention: rows read their own keys, which are stored, and all others as they were stored last.

    Args:
        slot_R: of the canvases in the cache.
        position_RK: of the rows.
        is_read_RL: bool, positions that hold something.
        is_whole: the rows are all of a canvas, in order.
    """

    def __init__(
        self, cache: BlockCache, slot_R: Tensor, position_RK: Tensor, is_read_RL: Tensor, *, is_whole: bool
    ) -> None:
        num_slots, self.length = cache.keys.shape[:2]
        self.entries = Entries((slot_R[:, None] * self.length + position_RK).flatten(), None)
        self.slot_R = None if len(slot_R) == num_slots else slot_R  # none has left: in order
        self.plan, self.is_whole = DensePlan(is_read_RL[:, None]), is_whole
        self.layers = iter(cache.layers)  # a forward pass asks once a layer, in their order

    def attend(self, query_RHKE: Tensor, key_RGKE: Tensor, value_RGKE: Tensor, scaling: float) -> Tensor:
        layer = next(self.layers)
        layer.write(self.entries, *(new.transpose(1, 2).flatten(0, 1) for new in (key_RGKE, value_RGKE)))
        if self.is_whole:
            return self.plan.attend(query_RHKE, key_RGKE, value_RGKE, scaling)
        keys, values = read_slots(*layer, self.slot_R, self.length)
        return self.plan.attend(query_RHKE.to(keys.dtype), keys, values, scaling)


class Canvases:
    """N canvases in flight; those that have ended leave.

    Args:
        window: tokens of a generation window, counted from the end of each prompt.
        dtype: of stored keys and values; None: that of the weights.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        model: BlockDiffusionModel,
        window: int,
        *,
        approximate_cache: ApproximateCache = "none",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.requests, self.model, self.window = list(requests), model, window
        self.shift, mask_token_id = model.scheme.shift, model.scheme.mask_token_id
        device = next(model.parameters()).device

        def column(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.start_N = column([len(r.prompt_ids) for r in requests])  # of the current window
        self.end_N, self.seed_N = column([r.end for r in requests]), column([r.seed for r in requests])
        self.threshold_N = column([r.threshold or 0.0 for r in requests], torch.float32)
        self.step_N = torch.zeros_like(self.seed_N)  # steps taken in the window ...
        self.earlier_N = torch.zeros_like(self.seed_N)  # ... and before it
        length = max(r.end for r in requests)
        self.position_L = torch.arange(length, device=device)
        self.token_ids_NL = torch.full((len(requests), length), mask_token_id, device=device)
        for row, request in enumerate(requests):
            self.token_ids_NL[row, : len(request.prompt_ids)] = column(request.prompt_ids)
        self.steps_NL = torch.zeros_like(self.token_ids_NL)  # that revealed a token; 0: none did
        self.logprobs_NL = torch.zeros(self.token_ids_NL.shape, device=device)
        self.approximate_cache = approximate_cache
        self.cache = None if approximate_cache == "none" else BlockCache(model, len(requests), length, dtype)
        self.slot_N = torch.arange(len(requests), device=device)  # in the cache, which keeps those that have left

    def __len__(self) -> int:
        return len(self.requests)

    def blocks(self) -> Blocks:
        """The current windows."""
        place_NW, is_inside_NW = self._window()
        masked_NW = is_inside_NW & (self.steps_NL.gather(1, place_NW) == 0)
        threshold_N = None if self.requests[0].threshold is None else self.threshold_N
        return Blocks(masked_NW, place_NW, self.step_N, self.seed_N, threshold_N)

    def forward(self, blocks: Blocks, masked_M: Tensor) -> Tensor:
        """Hidden states of the rows that predict the windows' masked positions, (M, D)."""
        begins_N = torch.ones_like(self.step_N, dtype=torch.bool) if self.cache is None else self.step_N == 0
        parts = [(True, begins_N.nonzero().squeeze(1)), (False, (~begins_N).nonzero().squeeze(1))]
        read = [self._read(row_R, blocks, is_whole=is_whole) for is_whole, row_R in parts if len(row_R)]
        row_N = torch.cat([row_R for _, row_R in parts])
        return torch.cat(read)[row_N.argsort()].flatten(0, 1).index_select(0, masked_M)

    def _read(self, row_R: Tensor, blocks: Blocks, *, is_whole: bool) -> Tensor:
        """Hidden states of the rows that predict the windows' positions, (R, W, D), by one pass over some canvases.

        Args:
            is_whole: read all there is; or only what has no stored keys that count.
        """
        length, shift, start_R = len(self.position_L), self.shift, self.start_N[row_R]
        first_R, end_R, num_read = torch.zeros_like(row_R), torch.full_like(row_R, length), length
        if not is_whole:
            first_R, end_R = (start_R - shift).clamp(min=0), self.end_N[row_R]
            if self.approximate_cache == "dual":
                end_R = end_R.minimum(start_R + self.window)
            num_read = int((end_R - first_R).max())
        # A canvas with fewer rows to read than another reads its last one several times.
        position_RK = (first_R[:, None] + self.position_L[:num_read]).minimum(end_R[:, None] - 1)
        hidden_RKD = self.model.model(
            input_ids=self.token_ids_NL[row_R].gather(1, position_RK),
            position_ids=position_RK,
            attention_plan=self._plan(row_R, position_RK, is_whole=is_whole),
            use_cache=False,
        ).last_hidden_state
        predicting_RW = (blocks.position_NB[row_R] - shift).clamp(min=0)  # nothing stands before position 0
        lane_RW = (predicting_RW - first_R[:, None]).clamp(max=num_read - 1)
        return hidden_RKD[torch.arange(len(row_R), device=row_R.device)[:, None], lane_RW]

    def _plan(self, row_R: Tensor, position_RK: Tensor, *, is_whole: bool) -> AttentionPlan:
        is_read_RL = self.position_L < self.end_N[row_R, None]
        if self.cache is None:
            return DensePlan(is_read_RL[:, None])
        return StoredKeys(self.cache, self.slot_N[row_R], position_RK, is_read_RL, is_whole=is_whole)

    def apply(self, step: DenoisingStep) -> None:
        """Reveal tokens in the current windows."""
        place_NW, _ = self._window()
        self.step_N += 1
        number_N1 = (self.earlier_N + self.step_N)[:, None]
        for held_NL, new_NW in (
            (self.token_ids_NL, step.token_ids_NB),
            (self.steps_NL, number_N1.expand_as(place_NW)),
            (self.logprobs_NL, step.logprobs_NB),
        ):
            row_M, lane_M = step.revealed_NB.nonzero(as_tuple=True)
            held_NL[row_M, place_NW[row_M, lane_M]] = new_NW[row_M, lane_M]

    def frames(self, step: DenoisingStep) -> list[Frame]:
        """The canvases after `apply`, up to the end of their windows."""
        place_NW, _ = self._window()
        frames = []
        for row, request in enumerate(self.requests):
            shown, done = self.token_ids_NL[row].clone(), self.steps_NL[row] > 0
            drawn_W = torch.where(done[place_NW[row]], shown[place_NW[row]], step.token_ids_NB[row])
            shown[place_NW[row]] = drawn_W
            written = slice(len(request.prompt_ids), int(min(self.start_N[row] + self.window, self.end_N[row])))
            frames.append(Frame(request.index, shown[written].tolist(), done[written].tolist()))
        return frames

    def finished(self, stop_ids: Tensor) -> list[tuple[Request, list[int], list[int], list[float]]]:
        """Move on from windows without masks; what has ended leaves: request, tokens, steps and logprobs."""
        place_NW, is_inside_NW = self._window()
        is_done_N = ((self.steps_NL.gather(1, place_NW) > 0) | ~is_inside_NW).all(dim=1)
        has_stopped_N = (torch.isin(self.token_ids_NL.gather(1, place_NW), stop_ids) & is_inside_NW).any(dim=1)
        self.start_N = torch.where(is_done_N, (self.start_N + self.window).minimum(self.end_N), self.start_N)
        self.earlier_N = torch.where(is_done_N, self.earlier_N + self.step_N, self.earlier_N)
        self.step_N = self.step_N.masked_fill(is_done_N, 0)
        has_ended_N = is_done_N & (has_stopped_N | (self.start_N >= self.end_N))
        ended = []
        for row in has_ended_N.nonzero().squeeze(1).tolist():
            request = self.requests[row]
            written = slice(len(request.prompt_ids), int(self.start_N[row]))
            columns = (self.token_ids_NL, self.steps_NL, self.logprobs_NL)
            ended.append((request, *(column[row, written].tolist() for column in columns)))
        if ended:
            self._keep((~has_ended_N).nonzero().squeeze(1))
        return ended

    def _window(self) -> tuple[Tensor, Tensor]:
        """Positions of the current windows, and which of them are the canvas's; (N, W) each."""
        position_NW = self.start_N[:, None] + torch.arange(self.window, device=self.start_N.device)
        return position_NW.clamp(max=len(self.position_L) - 1), position_NW < self.end_N[:, None]

    def _keep(self, row_N: Tensor) -> None:
        self.requests = [self.requests[row] for row in row_N.tolist()]
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "position_L":
                setattr(self, name, value.index_select(0, row_N))
