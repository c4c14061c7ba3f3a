"""Rows of queries over the cache == softmax over what each query may read, one query after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dirl.model.checkpoint import default_device
from dirl.model.tiny import tiny
from dirl.rollout.local import block_cache
from dirl.rollout.local.block_cache import BlockCache, BlockRows, PromptRows

SLOTS, HEADS, KEY_HEADS, LENGTH, HEAD_DIM, BLOCK, SCALING = 5, 4, 2, 24, 8, 4, 0.3


def cache() -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, SLOTS, LENGTH, KEY_HEADS, HEAD_DIM).unbind(0)
    return keys, values


def by_hand(query_HE: Tensor, keys: Tensor, values: Tensor, slot: int, end: int) -> Tensor:
    """One query over the first `end` positions of a slot; (H, E)."""
    outputs = []
    for head in range(HEADS):
        key_LE, value_LE = (x[slot, :end, head // (HEADS // KEY_HEADS)] for x in (keys, values))
        outputs.append(((key_LE @ query_HE[head]) * SCALING).softmax(0) @ value_LE)
    return torch.stack(outputs)


def flash_by_hand(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, cache_batch_idx: Tensor, **options: Any
) -> Tensor:
    """What flash_attn_with_kvcache documents: q (A, B, H, E), caches (S, L, G, E), int32 lengths and slots."""
    assert options == {"softmax_scale": SCALING, "causal": False}
    assert cache_seqlens.dtype == cache_batch_idx.dtype == torch.int32
    assert k_cache.shape == v_cache.shape == (SLOTS, LENGTH, KEY_HEADS, HEAD_DIM)
    rows = zip(q, cache_seqlens.tolist(), cache_batch_idx.tolist(), strict=True)
    return torch.stack(
        [torch.stack([by_hand(query, k_cache, v_cache, slot, end) for query in queries]) for queries, end, slot in rows]
    )


@pytest.mark.parametrize("uses_flash", [False, True])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4], [0, 1, 3, 4], [1, 3, 4], [2]])
def test_blocks_read_up_to_their_end(slots: list[int], uses_flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if uses_flash:
        monkeypatch.setattr(block_cache, "flash_decode", lambda device, dtype: flash_by_hand)
    blocks = [(7 * slot + 1) % (LENGTH // BLOCK) for slot in slots]
    query_THE = torch.randn(len(slots) * BLOCK, HEADS, HEAD_DIM)
    keys, values = cache()
    rows = BlockRows(torch.tensor(slots), BLOCK * torch.tensor(blocks), keys, BLOCK)
    found_THE = rows.attend(query_THE, keys, values, SCALING)
    expected = [
        by_hand(query_THE[i * BLOCK + lane], keys, values, slot, (block + 1) * BLOCK)
        for i, (slot, block) in enumerate(zip(slots, blocks, strict=True))
        for lane in range(BLOCK)
    ]
    torch.testing.assert_close(found_THE, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_prompts_of_different_lengths() -> None:
    lengths, slots = [8, 20, 4], [3, 0, 2]
    row_T = torch.tensor([row for row, length in enumerate(lengths) for _ in range(length)])
    position_T = torch.tensor([position for length in lengths for position in range(length)])
    query_THE = torch.randn(len(row_T), HEADS, HEAD_DIM)
    keys, values = cache()
    rows = PromptRows(lengths, [[slot] for slot in slots], keys, BLOCK)
    assert rows.position_T.tolist() == position_T.tolist()
    found_THE = rows.attend(query_THE, keys, values, SCALING)
    expected = [
        by_hand(query_THE[i], keys, values, slots[row], (position // BLOCK + 1) * BLOCK)
        for i, (row, position) in enumerate(zip(row_T.tolist(), position_T.tolist(), strict=True))
    ]
    torch.testing.assert_close(found_THE, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_every_slot_of_a_prompt_receives_its_keys_and_moves_with_them() -> None:
    model, _ = tiny()
    ours = BlockCache(model, SLOTS, LENGTH)
    rows = PromptRows([4, 8], [[3], [0, 4]], ours.keys, BLOCK)
    blocks = BlockRows(torch.tensor([1]), torch.tensor([8]), ours.keys, BLOCK)
    shape = (len(rows.position_T) + BLOCK, *ours.keys.shape[2:])
    key_TGE, value_TGE = torch.randn(2, *shape).unbind(0)
    ours.layers[1].write(ours.entries([rows, blocks]), key_TGE, value_TGE)
    expected = torch.zeros_like(ours.keys)
    expected[3, :4] = key_TGE[:4]
    expected[0, :8] = expected[4, :8] = key_TGE[4:12]
    expected[1, 8:12] = key_TGE[12:]
    assert ours.layers[1].keys.equal(expected) and not ours.layers[0].keys.any()
    ours.keep_slots(torch.tensor([0, 4, 3]))
    assert ours.layers[1].keys.equal(expected[[0, 4, 3]])


def test_flash_is_for_half_precision_on_cuda() -> None:
    assert block_cache.flash_decode("cpu", torch.bfloat16) is None
    assert block_cache.flash_decode("cuda", torch.float32) is None


@pytest.mark.gpu
def test_flash_decode_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flash_attn")
    slots, blocks = torch.tensor([0, 2, 3], device="cuda"), torch.tensor([5, 0, 3], device="cuda")
    keys, values = (torch.randn(SLOTS, LENGTH, KEY_HEADS, 64, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    query = torch.randn(3 * BLOCK, HEADS, 64, device="cuda", dtype=torch.bfloat16)
    rows = BlockRows(slots, BLOCK * blocks, keys, BLOCK)
    found = rows.attend(query, keys, values, SCALING)
    monkeypatch.setattr(block_cache, "flash_decode", lambda device, dtype: None)
    torch.testing.assert_close(found, rows.attend(query, keys, values, SCALING), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_engine_on_cuda_decodes_what_it_decodes_on_a_cpu(compiled: bool) -> None:
    from dirl.rollout.engine import SamplingConfig
    from dirl.rollout.local.engine import TorchEngine
    from tests.oracle import sharp_tiny_model

    model, tokenizer = sharp_tiny_model()
    prompts = [[5 + i] * (3 + i) for i in range(8)]
    sampling = SamplingConfig(max_completion_length=32)
    outcomes = []
    for device in (torch.device("cpu"), default_device()):
        engine = TorchEngine(model.to(device), tokenizer, compiled=compiled and device.type == "cuda")
        outcomes.append(engine.generate(prompts, sampling, list(range(8))))
    for on_cpu, on_gpu in zip(*outcomes, strict=True):
        assert on_cpu.token_ids == on_gpu.token_ids and on_cpu.step_map == on_gpu.step_map
        assert on_cpu.logprobs == pytest.approx(on_gpu.logprobs, abs=1e-3)
