"""Decoding under full attention: a prompt and the masks after it are one canvas, which every step reads whole.

Any position may read any other, so no key is ever final and none is kept: exact, and as dear as it looks. Tokens are
revealed window by window from left to right; a completion ends with the window that holds a stop token, and the masks
after it stay what they were, which replay knows of.

Shapes: N canvases in flight, L positions of the longest, W positions of a window, M masked positions of the current
windows, D hidden.
Source: LLaDA's decoder (arXiv 2502.09992), whose blocks are windows here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dirl.diffusion.packing import DiffusionScheme
from dirl.model.attention import DensePlan
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.block_step import Blocks, DenoisingStep
from dirl.rollout.engine import Request
from dirl.rollout.watch import Frame

PASS_TOKENS = 65_536  # of all canvases together, where no other bound is set


class Canvases:
    """N canvases in flight; those that have ended leave.

    Args:
        window: tokens of a generation window, counted from the end of each prompt.
    """

    def __init__(self, requests: Sequence[Request], scheme: DiffusionScheme, window: int, device: torch.device) -> None:
        self.requests, self.scheme, self.window = list(requests), scheme, window

        def column(values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.start_N = column([len(r.prompt_ids) for r in requests])  # of the current window
        self.end_N, self.seed_N = column([r.end for r in requests]), column([r.seed for r in requests])
        self.threshold_N = column([r.threshold or 0.0 for r in requests], torch.float32)
        self.step_N = torch.zeros_like(self.seed_N)  # steps taken in the window ...
        self.earlier_N = torch.zeros_like(self.seed_N)  # ... and before it
        length = max(r.end for r in requests)
        self.position_L = torch.arange(length, device=device)
        self.token_ids_NL = torch.full((len(requests), length), scheme.mask_token_id, device=device)
        for row, request in enumerate(requests):
            self.token_ids_NL[row, : len(request.prompt_ids)] = column(request.prompt_ids)
        self.steps_NL = torch.zeros_like(self.token_ids_NL)  # that revealed a token; 0: none did
        self.logprobs_NL = torch.zeros(self.token_ids_NL.shape, device=device)

    def __len__(self) -> int:
        return len(self.requests)

    def blocks(self) -> Blocks:
        """The current windows."""
        place_NW, is_inside_NW = self._window()
        masked_NW = is_inside_NW & (self.steps_NL.gather(1, place_NW) == 0)
        threshold_N = None if self.requests[0].threshold is None else self.threshold_N
        return Blocks(masked_NW, place_NW, self.step_N, self.seed_N, threshold_N)

    def forward(self, model: BlockDiffusionModel, blocks: Blocks, masked_M: Tensor) -> Tensor:
        """Hidden states of the rows that predict the windows' masked positions, (M, D)."""
        is_read_NL = self.position_L < self.end_N[:, None]
        hidden_NLD = model.model(
            input_ids=self.token_ids_NL,
            position_ids=self.position_L[None].expand_as(self.token_ids_NL),
            attention_plan=DensePlan(is_read_NL[:, None]),
            use_cache=False,
        ).last_hidden_state
        row_NW = (blocks.position_NB - self.scheme.shift).clamp(min=0)  # nothing stands before position 0
        row_NW = row_NW + torch.arange(len(self), device=row_NW.device)[:, None] * len(self.position_L)
        return hidden_NLD.flatten(0, 1).index_select(0, row_NW.flatten()[masked_M])

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
