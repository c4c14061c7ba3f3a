"""Three roads to one number: packed replay == one forward per denoising step == what the engine recorded.

Float32, to 1e-5 nats, on a model whose distributions are sharp and whose layers amplify what they read.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from dirl.diffusion.packing import PackedViews
from dirl.rollout.engine import Completion, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import logprobs
from tests.oracle import brute_force_actions, brute_force_logprobs, sharp_tiny_model
from tests.parity.packs import group_of_completions, packed, replayed

TOLERANCE = 1e-5
STRATEGIES = {
    "dynamic": SamplingConfig(confidence_threshold=0.05, max_completion_length=20),
    "static": SamplingConfig(
        unmasking_strategy="low_confidence_static", denoising_steps=2, max_completion_length=20, temperature=0.8
    ),
    "sequential": SamplingConfig(unmasking_strategy="sequential", max_completion_length=16),
    "entropy_bounded": SamplingConfig(
        unmasking_strategy="entropy_bounded", entropy_bound=4.0, max_completion_length=20, temperature=0.8
    ),
    "random": SamplingConfig(unmasking_strategy="random", denoising_steps=2, max_completion_length=20),
}
# Other schemes that test the same in other places.
MORE_SCHEMES = [pytest.param(*pair, marks=pytest.mark.matrix) for pair in ((1, 1), (0, 0), (4, 1))]
DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "hot": {"temperature": 1.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "greedy": {"temperature": 0.0},
}


def in_token_order(logprob_T: Tensor, pack_: PackedViews) -> list[Tensor]:
    """Reveal log-probabilities of each completion, in the order of its tokens."""
    found, actions = [], pack_.actions
    for branch in range(int(actions.branch_T.max()) + 1):
        mine_T = (actions.branch_T == branch) & actions.is_reveal_T
        by_index = dict(zip(actions.completion_index_T[mine_T].tolist(), logprob_T[mine_T], strict=True))
        found.append(torch.stack([by_index[i] for i in range(len(by_index))]))
    return found


@torch.no_grad()
def assert_three_roads_meet(sampling: SamplingConfig, block_length: int, **scheme: Any) -> list[Completion]:
    group_size = 6 if block_length == 2 else 2
    model, groups = group_of_completions(sampling, block_length, group_size=group_size, **scheme)
    completions = [completion for group in groups for completion in group]
    brute = [brute_force_logprobs(model, completion, sampling) for completion in completions]
    roads: dict[str, list[Tensor]] = {
        "engine": [torch.tensor(completion.logprobs) for completion in completions],
        "replay.logprobs": logprobs(model, completions, sampling),
    }
    for shared in (False, True):
        pack_ = packed(groups, model, shared=shared)
        roads[f"pack, shared={shared}"] = in_token_order(replayed(pack_, model, sampling), pack_)
    for road, found in roads.items():
        differences = [float((one - oracle).abs().max()) for one, oracle in zip(found, brute, strict=True)]
        assert max(differences) <= TOLERANCE, (road, differences)
    return completions


@pytest.mark.parametrize("block_length", [2, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replay_equals_brute_force_equals_engine(strategy: str, block_length: int) -> None:
    completions = assert_three_roads_meet(STRATEGIES[strategy], block_length)
    # The cases that go wrong elsewhere are among them.
    assert sum(c.num_denoising_steps for c in completions) < sum(len(c.token_ids) for c in completions) or (
        strategy == "sequential" or block_length == 2
    )
    assert {"stop", "length"} == {completion.finish_reason for completion in completions}
    assert any(completion.completion_length < len(completion.token_ids) for completion in completions)
    assert {len(completion.prompt_ids) % block_length for completion in completions} >= {0, 1, block_length - 1}


@pytest.mark.parametrize(("block_length", "shift"), [(4, 1), (0, 1), MORE_SCHEMES[0], MORE_SCHEMES[1]])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replay_of_shifted_predictions_and_of_full_attention(strategy: str, block_length: int, shift: int) -> None:
    """Block length 0 is full attention; one token a block and a shift are autoregressive decoding."""
    sampling = replace(STRATEGIES[strategy], generation_window=6)
    completions = assert_three_roads_meet(sampling, block_length, shift=shift)
    if block_length == 0:
        assert any(completion.num_unwritten for completion in completions)  # read all the same
        assert all(len(c.token_ids) + c.num_unwritten == sampling.max_completion_length for c in completions)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("strategy", ["dynamic", "static"])
def test_replay_under_the_distribution_that_was_sampled(strategy: str, distribution: str) -> None:
    sampling = replace(STRATEGIES[strategy], **DISTRIBUTIONS[distribution])
    assert_three_roads_meet(sampling, block_length=4)


@pytest.mark.parametrize(("block_length", "shift"), [(4, 0), (0, 1), MORE_SCHEMES[1], MORE_SCHEMES[2]])
@pytest.mark.parametrize("strategy", STRATEGIES)
@torch.no_grad()
def test_holds_of_a_pack_equal_brute_force(strategy: str, block_length: int, shift: int) -> None:
    sampling = replace(STRATEGIES[strategy], generation_window=6)
    assert_holds_equal_brute_force(sampling, block_length, shift)


@pytest.mark.parametrize("confidence", ["processed", "untempered"])
@pytest.mark.parametrize("strategy", ["dynamic", "static"])
@torch.no_grad()
def test_holds_under_a_confidence_that_is_not_tempered(strategy: str, confidence: Literal["processed"]) -> None:
    asked = {"temperature": 0.6, "top_k": 30, "confidence_threshold": 0.2, "at_threshold": "hold"}
    sampling = replace(STRATEGIES[strategy], **asked, confidence=confidence)  # type: ignore[arg-type]
    assert_holds_equal_brute_force(sampling, 4)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("strategy", ["dynamic", "static"])
@torch.no_grad()
def test_sub_blocks_are_revealed_from_left_to_right(strategy: str, shift: int) -> None:
    """Blocks of 8 in parts of 3, 3 and 2: what stands right of a part is read, and nobody decides about it."""
    sampling = replace(STRATEGIES[strategy], sub_block_length=3, denoising_steps=8)
    for completion in assert_three_roads_meet(sampling, 8, shift=shift):
        steps = [0] * len(completion.prompt_ids) + completion.step_map
        for first in range(0, len(steps), 8):
            parts = [steps[first : first + 3], steps[first + 3 : first + 6], steps[first + 6 : first + 8]]
            assert all(max(left) < min(right) for left, right in pairwise(parts) if min(right) > 0)
    assert_holds_equal_brute_force(sampling, 8, shift)


def assert_holds_equal_brute_force(sampling: SamplingConfig, block_length: int, shift: int = 0) -> None:
    """Three roads once more: what the engine recorded of them, in the order of its record, is the replay's too."""
    sampling = replace(sampling, record_holds=True)
    model, groups = group_of_completions(sampling, block_length, shift=shift)
    pack_ = packed(groups, model, shared=True)
    found_T = replayed(pack_, model, sampling)
    completions = [completion for group in groups for completion in group]
    held_T = ~pack_.actions.is_reveal_T
    assert int(held_T.sum()) > 20
    for branch, completion in enumerate(completions):
        oracle_T, mine_T = brute_force_actions(model, completion, sampling), pack_.actions.branch_T == branch
        torch.testing.assert_close(found_T[mine_T], oracle_T, atol=2 * TOLERANCE, rtol=0)
        recorded_T = torch.tensor(completion.hold_logprobs)
        torch.testing.assert_close(recorded_T, found_T[mine_T & held_T], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(pack_.actions.engine_logprob_T[mine_T], found_T[mine_T], atol=TOLERANCE, rtol=0)


def test_the_states_matter() -> None:
    """A completion scored under another step map is far off: the tolerance has teeth."""
    sampling = STRATEGIES["sequential"]
    model, groups = group_of_completions(sampling, 4)
    completion = max((c for group in groups for c in group), key=lambda c: len(c.token_ids))
    other = replace(completion, step_map=[1] * len(completion.token_ids))
    with torch.no_grad():
        (right,), (wrong,) = (logprobs(model, [c], sampling) for c in (completion, other))
    assert float((right - wrong).abs().max()) > 0.1


def test_replay_of_many_completions_spans_several_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirl.rollout.replay._TOKENS_PER_PACK", 60)
    sampling = STRATEGIES["dynamic"]
    model, groups = group_of_completions(sampling, 4, group_size=1)
    completions = [completion for group in groups for completion in group]
    with torch.no_grad():
        found = logprobs(model, completions, sampling)
    for one, completion in zip(found, completions, strict=True):
        torch.testing.assert_close(one, torch.tensor(completion.logprobs), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cut", [{"top_k": 20}, {"top_p": 0.9}], ids=str)
def test_rounding_never_rules_out_what_was_drawn(cut: dict[str, Any]) -> None:
    """In bfloat16 the kept sets of decoder and trainer differ at their edges; a drawn token keeps a probability."""
    model, tokenizer = sharp_tiny_model()
    model.bfloat16()
    sampling = SamplingConfig(confidence_threshold=0.1, max_completion_length=40, **cut)
    prompts = torch.randint(0, 256, (64, 6)).tolist()
    completions = TorchEngine(model, tokenizer).generate(prompts, sampling, range(64))
    with torch.no_grad():
        found = torch.cat(logprobs(model, completions, sampling))
    recorded = torch.tensor([x for completion in completions for x in completion.logprobs or []])
    assert found.isfinite().all()
    assert float((found - recorded).abs().mean()) < 0.1
