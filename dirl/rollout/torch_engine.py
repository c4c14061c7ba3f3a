"""An in-process engine over the trainer's own PyTorch model: many prompts decoded block by block, all at once.

Continuous batching: a sequence that ends leaves its slot to the next prompt at once. One forward pass a denoising step:
the block that was just finished writes its clean keys in the same pass that denoises the block after it. Prompts that
stand several times are read once. A sample depends on its prompt, its seed and the sampling configuration only: random
numbers come from a counter (seed, position, step), not from a shared generator.

Shapes: S slots, A active slots, M masked positions of the active slots, B block length, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dirl.data.chat import stop_token_ids
from dirl.diffusion.distribution import counter_uniform, entropy, sample
from dirl.diffusion.unmasking import reveal_positions
from dirl.model.block_cache import BlockCache, BlockRows, CachePlan, PromptRows, QueryRows
from dirl.model.logprobs import suppressed_by
from dirl.model.sdar import BlockDiffusionModel
from dirl.rollout.decoded import make_completion, touched_tokens
from dirl.rollout.engine import Completion, RolloutError, SamplingConfig
from dirl.rollout.slots import Request, Slots, Step
from dirl.rollout.watch import Observer, frames_of
from dirl.training.full_parameters import full_parameter_shapes, named_full_parameters

_PREFILL_TOKENS = 16_384  # prompt tokens read in one pass
_COMPACT_BELOW = 7 / 8  # share of slots in use at which the empty ones, each a row of every pass, are dropped


class TorchEngine:
    """Decodes with the module it is given; no copy of the weights where trainer and engine share a process."""

    def __init__(
        self, model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256
    ) -> None:
        self.model, self.tokenizer, self.max_batch_size = model, tokenizer, max_batch_size
        self.weights_version = 0
        self.observer = Observer()  # told of every step and completion
        self._is_stale = False
        self.stop_ids = stop_token_ids(tokenizer)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seeds: Sequence[int]
    ) -> list[Completion]:
        if self._is_stale:
            raise RolloutError("the last push of weights did not finish; call update_weights before generate")
        block_length = self.model.config.block_size
        touched = touched_tokens(prompts, seeds, sampling, block_length)
        requests = [
            Request(i, prompt, seed, (len(prompt) + num_tokens) // block_length)
            for i, (prompt, seed, num_tokens) in enumerate(zip(prompts, seeds, touched, strict=True))
        ]
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                finished = self._watched(requests, sampling) if requests else {}
        finally:
            self.observer.ended()
            self.model.train(was_training)
        if len(finished) != len(prompts):
            raise RolloutError(f"{len(prompts) - len(finished)} of {len(prompts)} completions are missing")
        return [finished[i] for i in range(len(prompts))]

    def update_weights(self, model: nn.Module) -> None:
        if model is not self.model:
            self._is_stale = True
            ours, theirs = dict(self.model.named_parameters()), full_parameter_shapes(model)
            for name in theirs.keys() | ours.keys():
                pushed = theirs.get(name, "absent")
                held = tuple(ours[name].shape) if name in ours else "absent"
                if pushed != held:  # copy_ would broadcast, and skip what the engine lacks
                    raise ValueError(
                        f"update_weights: {name} is {pushed} in the pushed model and {held} in the engine; "
                        "push a model of the same configuration"
                    )
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

    def _watched(self, requests: Sequence[Request], sampling: SamplingConfig) -> dict[int, Completion]:
        self.observer.started(len(requests))
        finished = {}
        for index, completion in self._decode(requests, sampling):
            finished[index] = completion
            self.observer.finished(completion)
        return finished

    def _decode(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[tuple[int, Completion]]:
        block_length, queue = self.model.config.block_size, deque(requests)
        device = next(self.model.parameters()).device
        num_slots = min(self.max_batch_size, len(requests))
        touched = max(r.end_block * block_length - len(r.prompt_ids) for r in requests)
        slots = Slots(num_slots, touched, block_length, self.model.config.mask_token_id, device)
        cache = BlockCache(self.model, num_slots, max(r.end_block for r in requests) * block_length)
        sampler = _Sampler(self.model, sampling)
        stop_ids = torch.tensor(self.stop_ids, device=device)
        while True:
            admitted = {slot: queue.popleft() for slot in slots.free() if queue}
            if admitted:
                slots.admit(admitted)
                self._prefill(admitted, cache)
            slot_A = slots.is_active_S.nonzero().squeeze(1)
            if len(slot_A) == 0:
                return
            if not queue and len(slot_A) <= _COMPACT_BELOW * len(slots.requests):
                slots.keep(slot_A)
                cache.keep_slots(slot_A)
                slot_A = torch.arange(len(slot_A), device=device)
            hidden_ABD = self._forward(slots, slot_A, cache)
            step = sampler.step(hidden_ABD, slots, slot_A)
            slots.apply(step, slot_A)
            self.observer.stepped(partial(frames_of, slots, slot_A, step))
            for slot in slots.finish_blocks(stop_ids):
                yield self._completion(*slots.release(slot))

    def _prefill(self, admitted: dict[int, Request], cache: BlockCache) -> None:
        """Write the keys of the prompts' full blocks, reading each distinct prompt once."""
        block_length = self.model.config.block_size
        slots_of: dict[tuple[int, ...], list[int]] = {}
        for slot, request in admitted.items():
            full = len(request.prompt_ids) - len(request.prompt_ids) % block_length
            slots_of.setdefault(tuple(request.prompt_ids[:full]), []).append(slot)
        slots_of.pop((), None)
        if not slots_of:
            return
        for prompts in _budgeted(list(slots_of), _PREFILL_TOKENS):
            self._read_prompts(prompts, [slots_of[prompt][0] for prompt in prompts], cache)
        copies = [(group[0], slot) for group in slots_of.values() for slot in group[1:]]
        if copies:
            source_N, target_N = torch.tensor(copies, device=cache.keys[0].device).unbind(1)
            cache.copy_slots(source_N, target_N, max(map(len, slots_of)))

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]], slots: Sequence[int], cache: BlockCache) -> None:
        device = cache.keys[0].device
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        slot_R = torch.tensor(slots, device=device)
        row_T = torch.arange(len(prompts), device=device).repeat_interleave(lengths)
        position_T = torch.cat([torch.arange(len(prompt), device=device) for prompt in prompts])
        token_ids_T = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        rows = PromptRows(slot_R, row_T, position_T, self.model.config.block_size)
        self._run(token_ids_T, slot_R[row_T], position_T, cache, [(len(row_T), rows)])

    def _forward(self, slots: Slots, slot_A: Tensor, cache: BlockCache) -> Tensor:
        """Hidden states of the active slots' current blocks, (A, B, D); commits previous blocks on the way."""
        block_length = slots.block_length
        slot_P = slot_A[slots.has_previous_S[slot_A]]
        slot_X = torch.cat([slot_P, slot_A])
        block_X = torch.cat([slots.block_S[slot_P] - 1, slots.block_S[slot_A]])
        position_XB = block_X[:, None] * block_length + torch.arange(block_length, device=slot_A.device)
        token_ids_XB = torch.cat([slots.previous_ids_SB[slot_P], slots.token_ids_SB[slot_A]])
        cut, num_slots = len(slot_P), len(slots.requests)
        parts: list[tuple[int, QueryRows]] = [
            (len(slot_X[part]) * block_length, BlockRows(slot_X[part], block_X[part], num_slots, block_length))
            for part in (slice(cut), slice(cut, None))
            if len(slot_X[part])
        ]
        slot_T = slot_X.repeat_interleave(block_length)
        hidden_TD = self._run(token_ids_XB.flatten(), slot_T, position_XB.flatten(), cache, parts)
        return hidden_TD.unflatten(0, (-1, block_length))[cut:]

    def _run(
        self,
        token_ids_T: Tensor,
        slot_T: Tensor,
        position_T: Tensor,
        cache: BlockCache,
        parts: Sequence[tuple[int, QueryRows]],
    ) -> Tensor:
        return self.model.model(
            input_ids=token_ids_T[None],
            position_ids=position_T[None],
            attention_plan=CachePlan(cache, slot_T, position_T, parts),
            use_cache=False,
        ).last_hidden_state[0]

    def _completion(
        self, request: Request, token_ids: list[int], step_map: list[int], logprobs: list[float]
    ) -> tuple[int, Completion]:
        completion = make_completion(
            request.prompt_ids,
            token_ids,
            step_map,
            logprobs,
            tokenizer=self.tokenizer,
            block_length=self.model.config.block_size,
        )
        return request.index, completion


class _Sampler:
    """Hidden states of masked positions -> sampled tokens and which of them are revealed."""

    def __init__(self, model: BlockDiffusionModel, sampling: SamplingConfig) -> None:
        self.lm_head, self.sampling = model.lm_head, sampling
        self.suppressed_V = suppressed_by(model)

    def step(self, hidden_ABD: Tensor, slots: Slots, slot_A: Tensor) -> Step:
        sampling, masked_AB = self.sampling, slots.masked_SB[slot_A]
        lane_B = torch.arange(slots.block_length, device=slot_A.device)
        position_AB = slots.block_S[slot_A, None] * slots.block_length + lane_B
        seed_AB, draw_AB = (x[slot_A, None].expand_as(position_AB) for x in (slots.seed_S, slots.step_S))
        confidence_MV = sampling.distribution.confidence_logprobs(
            self.lm_head(hidden_ABD[masked_AB]), self.suppressed_V
        )
        sampling_MV = sampling.distribution.sampling_logprobs(confidence_MV)
        if sampling.temperature == 0:
            token_M = sampling_MV.argmax(dim=-1)
        else:
            # Two draws a step and position: the token, and (for `random`) the order of revealing.
            uniform_AB = counter_uniform(seed_AB, position_AB, 2 * draw_AB)
            token_M = sample(sampling_MV, uniform_AB[masked_AB])
        token_ids_AB, logprob_AB, confidence_AB, entropy_AB = (
            torch.zeros(masked_AB.shape, dtype=dtype, device=masked_AB.device)
            for dtype in (torch.int64, torch.float32, torch.float32, torch.float32)
        )
        token_ids_AB[masked_AB] = token_M
        logprob_AB[masked_AB] = sampling_MV.gather(1, token_M[:, None]).squeeze(1)
        confidence_AB[masked_AB] = confidence_MV.gather(1, token_M[:, None]).squeeze(1).exp()
        if sampling.unmasking_strategy == "entropy_bounded":
            entropy_AB[masked_AB] = entropy(sampling_MV)
        order_AB = counter_uniform(seed_AB, position_AB, 2 * draw_AB + 1)
        revealed_AB = reveal_positions(sampling.unmasking, masked_AB, confidence_AB, entropy_AB, order_AB)
        return Step(revealed_AB, token_ids_AB, logprob_AB)


def _budgeted(prompts: Sequence[tuple[int, ...]], budget: int) -> Iterator[list[tuple[int, ...]]]:
    """Consecutive prompts of at most `budget` tokens together (a longer one goes alone)."""
    group: list[tuple[int, ...]] = []
    for prompt in prompts:
        if group and sum(map(len, group)) + len(prompt) > budget:
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group
