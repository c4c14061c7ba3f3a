"""The state of sequences that are being decoded: one slot each, all slots advanced together, no loop over sequences.

A slot has the current block (tokens, which are still masked, the denoising step each was revealed at, its logprob), the
block before it until its clean keys are in the cache, and everything finished so far. A step is a denoising step here.

Shapes: S slots, A active slots, F slots whose block is finished, B block length, K blocks of a completion at most,
D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dirl.diffusion.packing import DiffusionScheme
from dirl.rollout.block_step import Blocks, DenoisingStep
from dirl.rollout.engine import Request
from dirl.rollout.watch import Frame


def padded(tensor: Tensor, *shape: int) -> Tensor:
    """A copy with as many leading dimensions of these sizes, zeros behind what there was."""
    larger = tensor.new_zeros(*shape, *tensor.shape[len(shape) :])
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger


def num_blocks_of(request: Request, scheme: DiffusionScheme) -> int:
    """Blocks that are to be decoded of it at most.

    Raises:
        ValueError: its prefix does not end with a block, or leaves none to decode.
    """
    block_length, lead, num_known = scheme.block_length, scheme.lead(len(request.prompt_ids)), len(request.known_ids)
    if request.prefix and ((lead + num_known) % block_length or num_known >= request.end):
        raise ValueError(
            f"request {request.index}: its prefix must end with a block of {block_length} before {request.end}, and "
            f"ends at {num_known}"
        )
    return (lead + request.end) // block_length - (lead + num_known) // block_length


class Slots:
    """S sequences in flight.

    Args:
        last_hidden_SD: room for a hidden state of each; D is 0 where none is carried from block to block.
    """

    def __init__(self, num_slots: int, num_blocks: int, scheme: DiffusionScheme, last_hidden_SD: Tensor) -> None:
        block_length, device = scheme.block_length, last_hidden_SD.device
        self.scheme, self.block_length, self.mask_token_id = scheme, block_length, scheme.mask_token_id
        self.device = device

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=device)

        self.requests: list[Request | None] = [None] * num_slots
        self.threshold_S = zeros(dtype=torch.float32)
        self.is_active_S = zeros(dtype=torch.bool)
        self.seed_S, self.first_block_S, self.block_S, self.end_block_S, self.step_S = (zeros() for _ in range(5))
        self.lead_S = zeros()  # tokens that the first block of each lacks
        self.token_ids_SB, self.step_map_SB, self.previous_ids_SB = (zeros(block_length) for _ in range(3))
        self.masked_SB = zeros(block_length, dtype=torch.bool)
        self.logprob_SB = zeros(block_length, dtype=torch.float32)
        # Where predictions are shifted: hidden state of the token before the block, which predicts the block's first.
        self.last_hidden_SD = last_hidden_SD
        self.has_previous_S = zeros(dtype=torch.bool)  # the previous block's clean keys are not in the cache yet
        self.done_ids_SKB, self.done_steps_SKB = (zeros(num_blocks, block_length) for _ in range(2))
        self.done_logprobs_SKB = zeros(num_blocks, block_length, dtype=torch.float32)

    @property
    def num_blocks(self) -> int:
        """Of a completion at most."""
        return self.done_ids_SKB.shape[1]

    def free(self) -> list[int]:
        return [slot for slot, request in enumerate(self.requests) if request is None]

    def resize(self, num_slots: int, num_blocks: int) -> None:
        """More slots, and room for completions of more blocks."""
        self.requests += [None] * (num_slots - len(self.requests))
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                shape = (num_slots, num_blocks) if name.startswith("done_") else (num_slots,)
                setattr(self, name, padded(value, *shape))

    def admit(self, requests: dict[int, Request]) -> None:
        """Put requests into free slots, each at the block that follows the full blocks of what is known of it."""
        block_length = self.block_length
        slot_N = torch.tensor(list(requests), device=self.device)
        leads, counted, blocks = [], [], []
        for slot, request in requests.items():
            self.requests[slot], known_ids = request, request.known_ids
            leads.append(self.scheme.lead(len(request.prompt_ids)))
            counted.append(leads[-1] + len(known_ids))
            tail = known_ids[len(known_ids) - counted[-1] % block_length :]
            blocks.append(tail + [self.mask_token_id] * (block_length - len(tail)))
        lead_N, counted_N = torch.tensor([leads, counted], device=self.device)
        end_N = torch.tensor([request.end for request in requests.values()], device=self.device)
        self.seed_S[slot_N] = torch.tensor([r.seed for r in requests.values()], device=self.device)
        self.threshold_S[slot_N] = torch.tensor([r.threshold or 0.0 for r in requests.values()], device=self.device)
        self.lead_S[slot_N], self.end_block_S[slot_N] = lead_N, (end_N + lead_N) // block_length
        self.first_block_S[slot_N] = self.block_S[slot_N] = counted_N // block_length
        self.token_ids_SB[slot_N] = torch.tensor(blocks, device=self.device)
        self.masked_SB[slot_N] = torch.arange(block_length, device=self.device) >= (counted_N % block_length)[:, None]
        self.step_S[slot_N] = 0
        self.step_map_SB[slot_N] = 0
        self.has_previous_S[slot_N] = False
        self.is_active_S[slot_N] = True

    def blocks(self, slot_A: Tensor, *, own_thresholds: bool = False) -> Blocks:
        """The current blocks of the active slots."""
        position_AB = self.starts(slot_A)[:, None] + torch.arange(self.block_length, device=self.device)
        threshold_A = self.threshold_S[slot_A] if own_thresholds else None
        return Blocks(self.masked_SB[slot_A], position_AB, self.step_S[slot_A], self.seed_S[slot_A], threshold_A)

    def starts(self, slot_A: Tensor) -> Tensor:
        """Position at which the current block of each begins."""
        return self.block_S[slot_A] * self.block_length - self.lead_S[slot_A]

    def apply(self, step: DenoisingStep, slot_A: Tensor) -> None:
        """Reveal tokens in the active slots."""
        self.step_S[slot_A] += 1
        revealed_AB = step.revealed_NB
        self.token_ids_SB[slot_A] = torch.where(revealed_AB, step.token_ids_NB, self.token_ids_SB[slot_A])
        self.step_map_SB[slot_A] = torch.where(revealed_AB, self.step_S[slot_A, None], self.step_map_SB[slot_A])
        self.logprob_SB[slot_A] = torch.where(revealed_AB, step.logprobs_NB, self.logprob_SB[slot_A])
        self.masked_SB[slot_A] &= ~revealed_AB
        self.has_previous_S[slot_A] = False

    def frames(self, step: DenoisingStep, slot_A: Tensor) -> list[Frame]:
        """The active slots after `apply`, before their blocks are filed."""
        shown_AB = torch.where(self.masked_SB[slot_A], step.token_ids_NB, self.token_ids_SB[slot_A]).tolist()
        committed_AB = (~self.masked_SB[slot_A]).tolist()
        frames = []
        for row, slot in enumerate(slot_A.tolist()):
            request, done = self.requests[slot], self.done(slot)
            assert request is not None
            filed = request.known_ids[len(request.prompt_ids) :] + self.done_ids_SKB[slot].flatten()[done].tolist()
            tail = max(done.start - done.stop, 0)  # tokens of the prompt in this block
            is_committed = [True] * len(filed) + committed_AB[row][tail:]
            frames.append(Frame(request.index, filed + shown_AB[row][tail:], is_committed))
        return frames

    def finish_blocks(self, stop_ids: Tensor) -> list[int]:
        """File finished blocks and move their slots on; returns the slots whose sequence ended."""
        slot_F = (self.is_active_S & ~self.masked_SB.any(dim=1)).nonzero().squeeze(1)
        if len(slot_F) == 0:
            return []
        filed = (slot_F, (self.block_S - self.first_block_S)[slot_F])
        token_ids_FB, step_map_FB = self.token_ids_SB[slot_F], self.step_map_SB[slot_F]
        self.done_ids_SKB[filed] = token_ids_FB
        self.done_steps_SKB[filed] = step_map_FB
        self.done_logprobs_SKB[filed] = self.logprob_SB[slot_F]
        # No step revealed the prompt's tokens in the first block.
        has_stopped_F = (torch.isin(token_ids_FB, stop_ids) & (step_map_FB > 0)).any(dim=1)
        has_ended_F = has_stopped_F | (self.block_S[slot_F] + 1 >= self.end_block_S[slot_F])
        if any(request and request.is_enough for request in self.requests):
            has_ended_F |= torch.tensor([self._is_enough(slot) for slot in slot_F.tolist()], device=self.device)
        self._next_block(slot_F)
        self.is_active_S[slot_F[has_ended_F]] = False
        return slot_F[has_ended_F].tolist()

    def _is_enough(self, slot: int) -> bool:
        request = self.requests[slot]
        return request is not None and request.is_enough is not None and request.is_enough()

    def _next_block(self, slot_F: Tensor) -> None:
        self.previous_ids_SB[slot_F] = self.token_ids_SB[slot_F]
        self.has_previous_S[slot_F] = True
        self.token_ids_SB[slot_F] = self.mask_token_id
        self.masked_SB[slot_F] = True
        self.step_map_SB[slot_F] = 0
        self.step_S[slot_F] = 0
        self.block_S[slot_F] += 1

    def release(self, slot: int) -> tuple[Request, list[int], list[int], list[float]]:
        """Empty an ended slot: its request, completion ids, step map and logprobs."""
        request, done = self.requests[slot], self.done(slot)
        assert request is not None
        self.requests[slot] = None
        return (
            request,
            self.done_ids_SKB[slot].flatten()[done].tolist(),
            self.done_steps_SKB[slot].flatten()[done].tolist(),
            self.done_logprobs_SKB[slot].flatten()[done].tolist(),
        )

    def done(self, slot: int) -> slice:
        """Which tokens of a slot's filed blocks are its completion's: those after the prompt's tail.

        Empty while no block is filed; the tail is then in the current block.
        """
        request = self.requests[slot]
        assert request is not None
        num_blocks = int(self.block_S[slot] - self.first_block_S[slot])
        counted = self.scheme.lead(len(request.prompt_ids)) + len(request.known_ids)
        return slice(counted % self.block_length, num_blocks * self.block_length)

    def compact(self) -> Tensor:
        """Drop the empty slots; returns the old number of each slot. As few as can be change theirs."""
        slot_A = self.is_active_S.nonzero().squeeze(1)
        num_kept = len(slot_A)
        order_A = torch.arange(num_kept, device=self.device)
        order_A[~self.is_active_S[:num_kept]] = slot_A[slot_A >= num_kept]
        self.requests = [self.requests[slot] for slot in order_A.tolist()]
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.index_select(0, order_A))
        return order_A
