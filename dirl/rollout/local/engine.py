"""An in-process engine over the trainer's own PyTorch model: many prompts decoded block by block, all at once.

Continuous batching: a sequence that ends leaves its slot to the next prompt at once. One forward pass a denoising step:
the block that was just finished writes its clean keys in the same pass that denoises the block after it. Prompts that
stand several times are read once. A sample depends on its prompt, its seed and the sampling configuration only: random
numbers come from (seed, position, denoising step), not from a shared generator.

Shapes: S slots, A active slots, P those with a finished block to commit, M masked positions of the active slots,
B block length, D hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import stop_token_ids
from dirl.errors import UserError
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import suppressed_by
from dirl.model.memory import cache_bytes_per_token, free_bytes
from dirl.rollout.block_step import Sampler
from dirl.rollout.decoded import HoldRecord, check_thresholds, in_windows, make_completion, touched_tokens
from dirl.rollout.engine import Completion, EngineConfig, Request, RolloutError, SamplingConfig
from dirl.rollout.local.block_cache import BlockCache, BlockRows, PromptRows, QueryRows
from dirl.rollout.local.cached_forward import CachedForward
from dirl.rollout.local.canvas import PASS_TOKENS, Canvases
from dirl.rollout.local.slots import Slots, num_blocks_of
from dirl.rollout.watch import Observer
from dirl.rollout.weights import check_shapes
from dirl.training.balance import consecutive
from dirl.training.full_parameters import full_parameter_kinds, named_full_parameters

PREFILL_TOKENS = 16_384  # prompt tokens read in one pass

_Section = tuple[Tensor, QueryRows]  # tokens of a pass and how they are laid out


class TorchEngine:
    """Decodes with the module it is given; no copy of the weights where trainer and engine share a process.

    Args:
        config: what is decoded at once (fewer sequences where the KV cache has no room), and over which cache.
        compiled: fuse small operations with torch.compile.
        autocast: what a trainer autocasts to when it scores, so that decoding rounds likewise; the cache has it too.
        observer: told of every step and completion.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EngineConfig | None = None,
        *,
        compiled: bool = False,
        autocast: torch.dtype | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config, self.autocast = config or EngineConfig(), autocast
        self.forward = CachedForward(model, compiled=compiled)
        self.weights_version = 0
        self.observer = observer or Observer()
        self._is_stale = False
        self.stop_ids = stop_token_ids(tokenizer)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        thresholds: Sequence[float] | None = None,
    ) -> list[Completion]:
        touched = touched_tokens(prompts, seeds, sampling, self.model.scheme)
        check_thresholds(thresholds, prompts, sampling)
        own = [None] * len(prompts) if thresholds is None else thresholds
        requests = [
            Request(i, prompt, seed, len(prompt) + num_tokens, threshold)
            for i, (prompt, seed, num_tokens, threshold) in enumerate(zip(prompts, seeds, touched, own, strict=True))
        ]
        finished = dict(self.decode(deque(requests), sampling))
        if len(finished) != len(prompts):
            raise RolloutError(f"{len(prompts) - len(finished)} of {len(prompts)} completions are missing")
        return [finished[i] for i in range(len(prompts))]

    def decode(self, queue: deque[Request], sampling: SamplingConfig) -> Iterator[tuple[int, Completion]]:
        if self._is_stale:
            raise RolloutError("the last push of weights did not finish; call update_weights before generate")
        was_training = self.model.training
        self.model.eval()
        try:
            if queue:
                self.observer.started(len(queue))
            while queue:
                has_blocks = self.model.scheme.block_length > 0
                ended = (self._decode if has_blocks else self._decode_canvases)(queue, sampling)
                while (found := self._next(ended)) is not None:
                    self.observer.finished(found[1])
                    yield found
        finally:
            self.observer.ended()
            self.model.train(was_training)

    def _next(self, ended: Iterator[tuple[int, Completion]]) -> tuple[int, Completion] | None:
        """In modes that hold while it decodes, and not for whoever takes what has ended."""
        with torch.inference_mode(), self._precision():
            return next(ended, None)

    def update_weights(self, model: nn.Module) -> None:
        if model is not self.model:
            self._is_stale = True
            ours = dict(self.model.named_parameters())
            theirs = {name: shape for name, (_, shape) in full_parameter_kinds(model).items()}
            # copy_ would broadcast, and skip what the engine lacks
            check_shapes(theirs, {name: tuple(parameter.shape) for name, parameter in ours.items()})
            with torch.no_grad():
                for name, tensor in named_full_parameters(model):
                    ours[name].copy_(tensor)
        self._is_stale = False
        self.weights_version += 1

    def sleep(self) -> None:
        """Nothing to give back: the cache lives only while `generate` runs."""

    def wake(self) -> None:
        """Nothing to undo."""

    def close(self) -> None:
        """Nothing to release."""

    def _decode(self, queue: deque[Request], sampling: SamplingConfig) -> Iterator[tuple[int, Completion]]:
        scheme, like = self.model.scheme, next(self.model.parameters())
        device, own_thresholds = like.device, queue[0].threshold is not None
        length = max(r.end for r in queue)
        num_tokens = self._tokens_that_fit(length)
        num_slots = min(self.config.max_batch_size, len(queue), num_tokens // length)
        num_blocks = max(num_blocks_of(r, scheme) for r in queue)
        carried = like.new_zeros(num_slots, self.model.config.hidden_size if scheme.shift else 0)
        slots = Slots(num_slots, num_blocks, scheme, carried)
        cache = BlockCache(self.model, num_slots, length, self.autocast)
        sampler, holds = self._sampler(sampling), HoldRecord()
        stop_ids = torch.tensor(self.stop_ids, device=device)
        while True:
            prompts: Sequence[_Section] = []
            if admitted := self._let_in(queue, slots, cache, num_tokens):
                slots.admit(admitted)
                prompts = self._read_prompts(admitted, slots, cache)
            elif slots.free():  # an empty slot is a row of every pass
                cache.keep_slots(slots.compact())
            slot_A = slots.is_active_S.nonzero().squeeze(1)
            if len(slot_A) == 0:
                return
            blocks = slots.blocks(slot_A, own_thresholds=own_thresholds)
            masked_M = blocks.masked_NB.flatten().nonzero().squeeze(1)
            hidden_MD = self._forward(slots, slot_A, masked_M, prompts, cache)
            step = sampler.denoise(hidden_MD, blocks, masked_M)
            slots.apply(step, slot_A)
            if sampling.record_holds:
                holds.add([slots.requests[slot] for slot in slot_A.tolist()], step)
            self.observer.stepped(partial(slots.frames, step, slot_A))
            for slot in slots.finish_blocks(stop_ids):
                index, completion = self._completion(*slots.release(slot))
                yield index, in_windows(completion, sampling, scheme, holds.pop(index))

    def _decode_canvases(self, queue: deque[Request], sampling: SamplingConfig) -> Iterator[tuple[int, Completion]]:
        """The same under full attention, in batches: what has ended leaves room that the next batch takes."""
        requests = [queue.popleft() for _ in range(len(queue))]
        if any(request.prefix for request in requests):
            raise ValueError("under full attention no block is ever final: a request can have no prefix")
        kind, length = self.config.approximate_cache, max(request.end for request in requests)
        num_rows = min(
            self.config.max_batch_size,
            max(1, (self.config.max_cached_tokens or PASS_TOKENS) // length),
            len(requests) if kind == "none" else self._tokens_that_fit(length) // length,
        )
        sampler, holds = self._sampler(sampling), HoldRecord()
        stop_ids = torch.tensor(self.stop_ids, device=next(self.model.parameters()).device)
        window = min(sampling.generation_window or length, sampling.max_completion_length)
        for first in range(0, len(requests), num_rows):
            batch = requests[first : first + num_rows]
            canvases = Canvases(batch, self.model, window, approximate_cache=kind, dtype=self.autocast)
            while len(canvases):
                blocks = canvases.blocks()
                masked_M = blocks.masked_NB.flatten().nonzero().squeeze(1)
                step = sampler.denoise(canvases.forward(blocks, masked_M), blocks, masked_M)
                canvases.apply(step)
                if sampling.record_holds:
                    holds.add(canvases.requests, step)
                self.observer.stepped(partial(canvases.frames, step))
                for written in canvases.finished(stop_ids):
                    index, completion = self._completion(*written)
                    yield index, in_windows(completion, sampling, self.model.scheme, holds.pop(index))

    def _sampler(self, sampling: SamplingConfig) -> Sampler:
        rules = sampling.rules(self.model.scheme)
        return Sampler(self.model.lm_head, *rules, suppressed_by(self.model), sampling.record_holds)

    def _precision(self) -> torch.autocast:
        device_type = next(self.model.parameters()).device.type
        return torch.autocast(device_type, self.autocast or torch.bfloat16, enabled=self.autocast is not None)

    def _tokens_that_fit(self, length: int) -> int:
        """How many tokens the KV cache may hold; at least `length`, those of one sequence.

        Raises:
            UserError: not even one fits the bound that was set.
        """
        parameter = next(self.model.parameters())
        if 0 < self.config.max_cached_tokens < length:
            raise UserError(
                f"max_cached_tokens={self.config.max_cached_tokens} has no room for the longest prompt and completion, "
                f"{length} tokens; raise it, or lower max_completion_length"
            )
        bytes_per_token = cache_bytes_per_token(self.model.config, (self.autocast or parameter.dtype).itemsize)
        return max(length, self.config.max_cached_tokens or free_bytes(parameter.device) // 2 // bytes_per_token)

    def _let_in(self, queue: deque[Request], slots: Slots, cache: BlockCache, num_tokens: int) -> dict[int, Request]:
        """The first requests of the queue, each with a free slot; for those that came late slots are added, or longer.

        None where the slots would have no room in the cache's tokens, until those in flight have left.
        """
        num_free, longest, let_in = len(slots.free()), cache.keys.shape[1], list[Request]()
        num_active = cache.keys.shape[0] - num_free
        while queue and num_active + len(let_in) < self.config.max_batch_size:
            longest = max(longest, queue[0].end)
            if (num_active + len(let_in) + 1) * longest > num_tokens and num_active + len(let_in):
                break
            let_in.append(queue.popleft())
        length = max(cache.keys.shape[1], *(request.end for request in let_in), 0)
        num_blocks = max(slots.num_blocks, *(num_blocks_of(request, self.model.scheme) for request in let_in), 0)
        if len(let_in) > num_free or length > cache.keys.shape[1] or num_blocks > slots.num_blocks:
            cache.keep_slots(slots.compact())
            cache.resize(self.model, num_active + len(let_in), length)
            slots.resize(num_active + len(let_in), num_blocks)
        return dict(zip(slots.free(), let_in, strict=False))

    def _read_prompts(self, admitted: dict[int, Request], slots: Slots, cache: BlockCache) -> Sequence[_Section]:
        """The full blocks of what is known of the admitted, each distinct one once, as a section of the next pass.

        What goes beyond a pass's budget is read at once.
        """
        scheme = self.model.scheme
        slots_of: dict[tuple[int, ...], list[int]] = {}
        for slot, request in admitted.items():
            known_ids = request.known_ids
            full = len(known_ids) - (len(known_ids) + scheme.lead(len(request.prompt_ids))) % scheme.block_length
            slots_of.setdefault(tuple(known_ids[:full]), []).append(slot)
        slots_of.pop((), None)
        sections = [
            (
                torch.tensor([token for prompt in prompts for token in prompt], device=cache.keys.device),
                PromptRows([len(p) for p in prompts], [slots_of[p] for p in prompts], cache.keys, scheme.block_length),
            )
            for prompts in consecutive(slots_of, len, PREFILL_TOKENS)
        ]
        for token_ids_T, rows in sections[:-1]:
            if scheme.shift:
                hidden_CD = self.forward(cache, token_ids_T, [rows], rows.last_token_C)
                slots.last_hidden_SD[rows.last_slot_C] = hidden_CD.to(slots.last_hidden_SD.dtype)
            else:
                self.forward(cache, token_ids_T, [rows])
        return sections[-1:]

    def _forward(
        self, slots: Slots, slot_A: Tensor, masked_M: Tensor, prompts: Sequence[_Section], cache: BlockCache
    ) -> Tensor:
        """Hidden states of the active slots' masked positions, (M, D).

        The same pass reads the prompts that were admitted and commits the blocks that were finished.
        """
        slot_P = slot_A[slots.has_previous_S[slot_A]]
        sections = list(prompts)
        if len(slot_P):
            committed = self._blocks(slot_P, slots.starts(slot_P) - slots.block_length, cache)
            sections.append((slots.previous_ids_SB[slot_P], committed))
        sections.append((slots.token_ids_SB[slot_A], self._blocks(slot_A, slots.starts(slot_A), cache)))
        token_ids_T = torch.cat([token_ids.flatten() for token_ids, _ in sections])
        rows = [rows for _, rows in sections]
        if not self.model.scheme.shift:
            return self.forward(cache, token_ids_T, rows, masked_M)
        return self._shifted(slots, slot_A, masked_M, token_ids_T, rows, cache)

    def _shifted(
        self,
        slots: Slots,
        slot_A: Tensor,
        masked_M: Tensor,
        token_ids_T: Tensor,
        rows: Sequence[QueryRows],
        cache: BlockCache,
    ) -> Tensor:
        """The same where the row before a position predicts it; before a block stands its slot's last clean row."""
        block_length, *clean = self.model.scheme.block_length, *rows[:-1]
        starts = [0, *accumulate(len(section.position_T) for section in clean)]
        last_T = torch.cat([masked_M[:0], *(s.last_token_C + i for s, i in zip(clean, starts, strict=False))])
        last_slot_T = torch.cat([slot_A[:0], *(section.last_slot_C for section in clean)])
        slot_M = slot_A[masked_M // block_length]
        is_first_M = masked_M % block_length == 0
        is_kept_M = is_first_M & (slots.block_S[slot_M] > 0)
        before_M = masked_M - (~is_first_M).long()  # nothing stands before a sequence, whose first row is its own
        wanted_N = torch.cat([last_T, before_M[~is_kept_M] + starts[-1]])
        hidden_ND = self.forward(cache, token_ids_T, rows, wanted_N, first_section=0)
        slots.last_hidden_SD[last_slot_T] = hidden_ND[: len(last_T)].to(slots.last_hidden_SD.dtype)
        hidden_MD = slots.last_hidden_SD[slot_M]
        hidden_MD[~is_kept_M] = hidden_ND[len(last_T) :].to(hidden_MD.dtype)
        return hidden_MD

    def _blocks(self, slot_A: Tensor, start_A: Tensor, cache: BlockCache) -> BlockRows:
        return BlockRows(slot_A, start_A, cache.keys, self.model.scheme.block_length)

    def _completion(
        self, request: Request, token_ids: list[int], step_map: list[int], logprobs: list[float]
    ) -> tuple[int, Completion]:
        if (before := request.prefix) is not None:
            token_ids, step_map = before.token_ids + token_ids, before.step_map + step_map
            assert before.logprobs is not None
            logprobs = before.logprobs + logprobs
        completion = make_completion(
            request.prompt_ids,
            token_ids,
            step_map,
            logprobs,
            tokenizer=self.tokenizer,
            scheme=self.model.scheme,
            confidence_threshold=request.threshold,
        )
        return request.index, completion
