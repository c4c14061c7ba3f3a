"""The in-process engine: the contract of every engine, and what is its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

pytest.register_assert_rewrite("tests.rollout.engine_contract")

from dirl.errors import UserError  # noqa: E402
from dirl.model.families.block_diffusion import BlockDiffusionModel  # noqa: E402
from dirl.rollout.decoded import touched_tokens  # noqa: E402
from dirl.rollout.engine import Completion, EngineConfig, Request, SamplingConfig  # noqa: E402
from dirl.rollout.local.block_cache import BlockCache, LayerCache  # noqa: E402
from dirl.rollout.local.cached_forward import compiled_of  # noqa: E402
from dirl.rollout.local.engine import TorchEngine  # noqa: E402
from dirl.rollout.replay import logprobs  # noqa: E402
from dirl.rollout.watch import Frame, Observer  # noqa: E402
from tests.oracle import brute_force_logprobs, sharp_tiny_model, tiny_moe  # noqa: E402
from tests.rollout.engine_contract import (  # noqa: E402
    DYNAMIC,
    EngineContract,
    PreTrainedTokenizerBase,
    likely_to_stop,
    random_prompts,
)


class TestTorchEngine(EngineContract):
    def make_engine(
        self, model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256
    ) -> TorchEngine:
        return TorchEngine(model, tokenizer, EngineConfig(max_batch_size=max_batch_size))


def test_the_trainers_module_keeps_its_mode_and_its_gradients() -> None:
    model, tokenizer = likely_to_stop()
    model.train()
    TorchEngine(model, tokenizer).generate([[1, 2, 3]], DYNAMIC, [0])
    assert model.training
    model(torch.tensor([[1, 2, 3, 4]])).logits.sum().backward()
    assert model.model.norm.weight.grad is not None


def test_mode_is_restored_when_decoding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = likely_to_stop()
    model.train()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    engine = TorchEngine(model, tokenizer)
    monkeypatch.setattr(engine, "_forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.generate([[1, 2, 3]], DYNAMIC, [0])
    assert model.training


def test_it_decodes_with_the_module_it_was_given() -> None:
    """No copy: a change of the trainer's weights is a change of the engine's."""
    model, tokenizer = likely_to_stop()
    engine = TorchEngine(model, tokenizer)
    before = engine.generate(random_prompts([5, 6]), DYNAMIC, [0, 1])
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    assert engine.generate(random_prompts([5, 6]), DYNAMIC, [0, 1]) != before


@pytest.mark.parametrize("wrong", ["broadcast", "more", "fewer"])
def test_a_push_from_another_configuration_is_named(wrong: str) -> None:
    (ours, tokenizer), (donor, _) = likely_to_stop(), likely_to_stop(seed=5)
    if wrong == "broadcast":
        donor.model.norm.weight = nn.Parameter(torch.ones(1))
    elif wrong == "more":  # untied where the engine's are tied
        donor.lm_head.weight = nn.Parameter(torch.zeros_like(donor.lm_head.weight))
    else:
        ours.lm_head.weight = nn.Parameter(torch.zeros_like(ours.lm_head.weight))
    name = "model.norm.weight" if wrong == "broadcast" else "lm_head.weight"
    with pytest.raises(ValueError, match=rf"update_weights: {name} is .* same configuration"):
        TorchEngine(ours, tokenizer).update_weights(donor)


def counting_engine(num_slots: int) -> tuple[TorchEngine, Mock]:
    engine = TorchEngine(*likely_to_stop(), EngineConfig(max_batch_size=num_slots))
    passes = Mock(wraps=engine.forward)
    engine.forward = passes
    return engine, passes


@pytest.mark.parametrize(("num_slots", "num_rounds"), [(1, 11), (3, 4), (20, 1)])
def test_prompts_and_finished_blocks_take_no_passes_of_their_own(num_slots: int, num_rounds: int) -> None:
    engine, passes = counting_engine(num_slots)
    engine.stop_ids = []
    sampling = SamplingConfig(unmasking_strategy="low_confidence_static", denoising_steps=2, max_completion_length=12)
    # A tail of two tokens: one step for the rest of its block, two for each of the two blocks after it.
    engine.generate(random_prompts([6, 2, 10, 14, 6, 18, 22, 6, 2, 10, 30]), sampling, range(11))
    assert passes.call_count == num_rounds * (1 + 2 * 2)


@pytest.mark.parametrize("num_slots", [1, 3, 5])
def test_a_free_slot_takes_the_next_prompt_at_once(num_slots: int) -> None:
    engine, passes = counting_engine(num_slots)
    completions = engine.generate(random_prompts([9, 4, 1, 14, 6, 3, 8, 11]) * 2, DYNAMIC, range(16))
    busy_until = [0] * num_slots
    for completion in completions:
        busy_until[busy_until.index(min(busy_until))] += completion.num_denoising_steps
    assert passes.call_count == max(busy_until)


def test_prompts_read_in_several_passes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = likely_to_stop()
    prompts, seeds = random_prompts([30, 5, 17, 3, 24, 40]) * 2, list(range(12))
    expected = TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds)
    monkeypatch.setattr("dirl.rollout.local.engine.PREFILL_TOKENS", 32)
    found = TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_a_mixture_of_experts_records_the_logprobs_of_the_states_it_visits() -> None:
    model, tokenizer = tiny_moe()
    completions = TorchEngine(model, tokenizer, EngineConfig(max_batch_size=3)).generate(
        random_prompts([9, 4, 1, 14]) * 2, DYNAMIC, list(range(8))
    )
    assert any(c.num_denoising_steps < len(c.token_ids) for c in completions), "several tokens a step"
    for completion in completions:
        expected = brute_force_logprobs(model, completion, DYNAMIC).tolist()
        assert completion.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("make_model", [likely_to_stop, pytest.param(tiny_moe, marks=pytest.mark.slow)])
def test_compiled_layers_decode_the_same_and_are_compiled_once(
    make_model: Callable[[], tuple[BlockDiffusionModel, PreTrainedTokenizerBase]], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    compiled_of.cache_clear()
    model, tokenizer = make_model()
    prompts, seeds = random_prompts([30, 5, 17, 3, 24, 40]) * 2, list(range(12))
    engine = TorchEngine(model, tokenizer, EngineConfig(max_batch_size=5), compiled=True)
    found = engine.generate(prompts, DYNAMIC, seeds)
    num_graphs = len(graphs)
    engine.generate(random_prompts([11, 2, 50, 28]), DYNAMIC, [3, 2, 1, 0])
    assert num_graphs == len(graphs) > 0, "other lengths and batches share what was compiled"
    compiled_of.cache_clear()
    for ours, plain in zip(found, TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds), strict=True):
        assert (ours.token_ids, ours.step_map) == (plain.token_ids, plain.step_map)
        assert ours.logprobs == pytest.approx(plain.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_completion_length", 0),
        ("confidence_threshold", 1.5),
        ("denoising_steps", -1),
        ("entropy_bound", -0.1),
    ],
)
def test_bad_sampling_is_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{key} must be .*got {value}"):
        SamplingConfig(**{key: value})  # type: ignore[arg-type]


@pytest.fixture
def cached_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each KV cache that is made has room for, counted in elements."""
    rooms: list[int] = []

    class Counted(BlockCache):
        def __init__(self, model: BlockDiffusionModel, *rest: Any) -> None:
            super().__init__(model, *rest)
            heads = model.config.num_key_value_heads * model.config.head_dim
            sizes = {tensor.numel() for layer in self.layers for tensor in layer}
            assert len(sizes) == 1
            rooms.append(sizes.pop() // heads)

    monkeypatch.setattr("dirl.rollout.local.engine.BlockCache", Counted)
    return rooms


@pytest.mark.parametrize("bound", [60, 61, 119, 120, 300, 10_000])
def test_the_cache_is_bounded_and_completions_do_not_depend_on_it(bound: int, cached_tokens: list[int]) -> None:
    model, tokenizer = likely_to_stop()
    prompts, seeds = random_prompts([30, 5, 17, 3, 24, 40]) * 2, list(range(12))
    expected = TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds)
    found = TorchEngine(model, tokenizer, EngineConfig(max_cached_tokens=bound)).generate(prompts, DYNAMIC, seeds)
    assert [(c.token_ids, c.step_map) for c in found] == [(c.token_ids, c.step_map) for c in expected]
    assert cached_tokens == [12 * 60, 60 * min(12, bound // 60)]


def test_a_bound_without_room_for_one_sequence_is_one_line() -> None:
    with pytest.raises(UserError, match=r"max_cached_tokens=59 has no room .* 60 tokens; raise it") as refused:
        TorchEngine(*likely_to_stop(), EngineConfig(max_cached_tokens=59)).generate(
            random_prompts([4, 40]), DYNAMIC, [0, 1]
        )
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("num_sequences", "num_slots"), [(0.5, 1), (1, 1), (3.5, 3), (99, 12)])
def test_without_a_bound_half_of_the_free_memory_is_taken(
    num_sequences: float, num_slots: int, cached_tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = likely_to_stop()
    per_token = 4 * 2 * model.config.num_hidden_layers * model.config.num_key_value_heads * model.config.head_dim
    monkeypatch.setattr("dirl.rollout.local.engine.free_bytes", lambda _: int(2 * num_sequences * 60 * per_token))
    TorchEngine(model, tokenizer).generate(random_prompts([40] * 12), DYNAMIC, range(12))
    assert cached_tokens == [60 * num_slots]


def difference_from_the_trainer(
    make_model: Callable[[], tuple[BlockDiffusionModel, PreTrainedTokenizerBase]], autocast: torch.dtype | None
) -> Tensor:
    """Recorded log-probabilities less those of a trainer with `bf16: true`, over some completions; nats."""
    model, tokenizer = make_model()
    engine = TorchEngine(model, tokenizer, autocast=autocast)
    completions = engine.generate(random_prompts([5, 8, 11, 30] * 8), DYNAMIC, range(32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scored = logprobs(model, completions, DYNAMIC)
    return torch.cat([torch.tensor(c.logprobs) - found for c, found in zip(completions, scored, strict=True)])


@pytest.mark.parametrize(
    "make_model",
    [*(partial(likely_to_stop, seed=seed) for seed in range(3)), partial(likely_to_stop, block_length=8), tiny_moe],
)
def test_under_autocast_it_decodes_as_a_trainer_under_autocast_scores(
    make_model: Callable[[], tuple[BlockDiffusionModel, PreTrainedTokenizerBase]],
) -> None:
    """What is left is how products of other sizes are rounded: a trainer's own packs differ among each other as much.

    Measured means: 8e-3 to 2e-2 nats without, 0 to 3e-3 with it.
    """
    without, within = (difference_from_the_trainer(make_model, dtype).abs().mean() for dtype in (None, torch.bfloat16))
    assert within < without / 2 and within < 6e-3


def test_under_autocast_the_cache_has_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []
    stock = LayerCache.write

    def write(self: LayerCache, *arguments: Any) -> None:
        dtypes.extend({self.keys.dtype, self.values.dtype})
        stock(self, *arguments)

    monkeypatch.setattr(LayerCache, "write", write)
    for autocast, expected in ((torch.bfloat16, torch.bfloat16), (None, torch.float32)):
        dtypes.clear()
        TorchEngine(*likely_to_stop(), autocast=autocast).generate([[1, 2, 3, 4, 5]], DYNAMIC, [0])
        assert set(dtypes) == {expected}


class Latecomers(Observer):
    """Requests that come one after another, each after some more steps of those before it."""

    def __init__(self, queue: deque[Request], late: list[Request], every: int) -> None:
        self.queue, self.late, self.every, self.num_steps, self.most = queue, deque(late), every, 0, 0

    def stepped(self, frames: Callable[[], list[Frame]]) -> None:
        self.num_steps += 1
        self.most = max(self.most, len(frames()))
        if self.late and self.num_steps % self.every == 0:
            self.queue.append(self.late.popleft())


@pytest.mark.parametrize("bounds", [{}, {"max_batch_size": 2}, {"max_cached_tokens": 64}])
@pytest.mark.parametrize(("block_length", "shift"), [(4, 0), (4, 1), (0, 0)])
def test_a_request_that_comes_late_gets_what_it_gets_alone(
    block_length: int, shift: int, bounds: dict[str, int]
) -> None:
    """Longer ones and more than there were slots for; they join what is in flight, or follow it on canvases."""
    model, tokenizer = sharp_tiny_model(block_length=block_length, shift=shift)
    prompts, seeds = random_prompts([3, 9, 2, 20, 8, 31]), range(6)
    touched = touched_tokens(prompts, seeds, DYNAMIC, model.scheme)
    alone = TorchEngine(model, tokenizer, EngineConfig(**bounds))
    expected = [alone.generate([prompt], DYNAMIC, [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    rows = zip(prompts, seeds, touched, strict=True)
    requests = [Request(i, prompt, seed, len(prompt) + num) for i, (prompt, seed, num) in enumerate(rows)]
    for every in (1, 3):
        queue = deque(requests[:1])
        watch = Latecomers(queue, requests[1:], every)
        found = dict(TorchEngine(model, tokenizer, EngineConfig(**bounds), observer=watch).decode(queue, DYNAMIC))
        for i, completion in enumerate(expected):
            assert (found[i].token_ids, found[i].step_map) == (completion.token_ids, completion.step_map)
        if block_length and every == 1:
            assert watch.most > 1, "nobody joined"


def test_who_comes_late_may_take_a_slot_and_have_more_blocks_than_who_left_it() -> None:
    model, tokenizer = sharp_tiny_model()
    at_once = SamplingConfig(confidence_threshold=0.0, max_completion_length=22)  # a block a step
    first, late = Request(0, list(range(20)), 0, 24), Request(1, [1, 2], 1, 24)
    queue = deque([first])
    engine = TorchEngine(model, tokenizer, observer=Latecomers(queue, [late], 1))
    assert dict(engine.decode(queue, at_once))[1] == TorchEngine(model, tokenizer).generate([[1, 2]], at_once, [1])[0]


def test_slots_that_become_longer_keep_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three short ones end, one goes on; a long one comes, for which four slots of its length would be too many."""
    model, tokenizer = sharp_tiny_model()
    sizes: list[int] = []
    stock = BlockCache.resize

    def resize(self: BlockCache, *arguments: Any) -> None:
        stock(self, *arguments)
        sizes.append(self.keys.shape[0] * self.keys.shape[1])

    monkeypatch.setattr(BlockCache, "resize", resize)
    at_once = SamplingConfig(confidence_threshold=0.0)
    short = [Request(i, [i], i, 4) for i in range(3)]
    queue = deque([*short, Request(3, [3], 3, 20)])
    late = Request(4, [4], 4, 40)
    watch = Latecomers(queue, [late], 1)
    engine = TorchEngine(model, tokenizer, EngineConfig(max_cached_tokens=80), observer=watch)
    assert sorted(dict(engine.decode(queue, at_once))) == list(range(5))
    assert sizes == [80]


def test_what_is_enough_ends_after_its_block() -> None:
    model, tokenizer = sharp_tiny_model()
    whole = TorchEngine(model, tokenizer).generate([[1, 2]] * 2, DYNAMIC, [0, 1])
    requests = [Request(i, [1, 2], i, 20, is_enough=(lambda: True) if i == 0 else None) for i in range(2)]
    found = dict(TorchEngine(model, tokenizer).decode(deque(requests), DYNAMIC))
    assert found[0].token_ids == whole[0].token_ids[:2] and found[1].token_ids == whole[1].token_ids


@pytest.mark.parametrize(("shift", "origin"), [(0, "start"), (1, "start"), (1, "prompt_end")])
@pytest.mark.parametrize("cuts", [(1,), (2, 3), (1, 2, 3, 4)], ids=str)
def test_in_parts_is_at_once(shift: int, origin: Any, cuts: tuple[int, ...]) -> None:
    """Every other one is cut after so many blocks: the weights stay, so the completion is the same."""
    model, tokenizer = sharp_tiny_model(shift=shift, block_origin=origin)
    prompts, sampling = random_prompts([1, 3, 4, 6, 7, 8]), replace(DYNAMIC, record_holds=True)
    engine = TorchEngine(model, tokenizer)
    whole = engine.generate(prompts, sampling, range(len(prompts)))
    sizes = touched_tokens(prompts, range(len(prompts)), sampling, model.scheme)
    found: dict[int, Completion] = {}
    for cut in (*cuts, 99):
        queue = deque[Request]()
        for i, prompt in enumerate(prompts):
            size, before = sizes[i], found.get(i)
            if before is None or len(before.token_ids) < len(whole[i].token_ids):
                size = min(size, 4 * cut - model.scheme.tail(len(prompt))) if i % 2 else size
                end = len(prompt) + size
                queue.append(Request(i, prompt, i, end, prefix=before))
        found |= dict(engine.decode(queue, sampling))
    for i, expected in enumerate(whole):
        one, nothing = found[i], {"logprobs": None, "hold_logprobs": None}
        assert replace(one, **nothing) == replace(expected, **nothing)
        assert one.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert one.hold_logprobs == pytest.approx(expected.hold_logprobs, abs=1e-5)


def test_frames_of_a_continued_completion_show_all_of_it() -> None:
    model, tokenizer = sharp_tiny_model()
    whole = TorchEngine(model, tokenizer).generate([[1, 2]], DYNAMIC, [0])[0]
    before = TorchEngine(model, tokenizer).generate([[1, 2]], replace(DYNAMIC, max_completion_length=6), [0])[0]
    frames: list[Frame] = []
    watch = Observer()
    watch.stepped = lambda shown: frames.extend(shown())  # type: ignore[method-assign]
    request = Request(0, [1, 2], 0, 20, prefix=before)
    dict(TorchEngine(model, tokenizer, observer=watch).decode(deque([request]), DYNAMIC))
    assert all(frame.token_ids[:6] == whole.token_ids[:6] and all(frame.is_committed[:6]) for frame in frames)
    assert frames[-1].token_ids == whole.token_ids and all(frames[-1].is_committed)


@pytest.mark.parametrize(("length", "end"), [(5, 20), (6, 8), (10, 8)])
def test_a_prefix_that_is_not_whole_or_leaves_nothing_is_refused(length: int, end: int) -> None:
    model, tokenizer = sharp_tiny_model()
    before = TorchEngine(model, tokenizer).generate([[1, 2]], DYNAMIC, [0])[0]
    cut = replace(before, token_ids=before.token_ids[:length])
    with pytest.raises(ValueError, match="request 0: its prefix must end with a block of 4 before"):
        dict(TorchEngine(model, tokenizer).decode(deque([Request(0, [1, 2], 0, end, prefix=cut)]), DYNAMIC))
    full, tokenizer = sharp_tiny_model(block_length=0)
    with pytest.raises(ValueError, match="a request can have no prefix"):
        dict(TorchEngine(full, tokenizer).decode(deque([Request(0, [1, 2], 0, end, prefix=before)]), DYNAMIC))


def test_the_modes_of_decoding_hold_for_nobody_else() -> None:
    """Whoever scores a completion while others are decoded may train a model of its own, or run one in float32."""
    model, tokenizer = sharp_tiny_model()
    engine = TorchEngine(model, tokenizer, autocast=torch.bfloat16)
    for _ in engine.decode(deque(Request(i, [1, 2], i, 20) for i in range(3)), DYNAMIC):
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
