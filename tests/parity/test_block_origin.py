"""Blocks counted from the end of the prompt: decoding, replay, SFT and RL, against plain passes and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from dirl.cli import main
from dirl.data.conversations import Document
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import DiffusionScheme, pack
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.errors import UserError
from dirl.model.checkpoint import ModelConfig, load, load_model
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.rl.micro_batches import Layout, pack_groups
from dirl.rl.objective import ObjectiveConfig
from dirl.rollout.build import chosen_engine
from dirl.rollout.engine import EngineConfig, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.sft.batch import make_example
from dirl.sft.loss import nelbo_loss
from tests.oracle import brute_force_actions, sharp_tiny_model
from tests.parity.packs import group_of_completions, packed, replayed
from tests.parity.test_families import checkpoint, rows_of
from tests.parity.test_gradients import assert_same_gradient, gradient, noisy_document, sum_over_views
from tests.parity.test_replay import STRATEGIES, TOLERANCE, assert_three_roads_meet
from tests.rl.test_actions import make_groups

PROMPT_END = DiffusionScheme(block_length=4, mask_token_id=99, block_origin="prompt_end")


@pytest.mark.parametrize(
    ("prompt_length", "start", "end"),
    [(0, (0, 0), (0, 0)), (4, (0, 0), (0, 0)), (5, (1, 0), (0, 3)), (7, (3, 0), (0, 1))],
)
def test_a_prompt_has_a_tail_or_a_lead(prompt_length: int, start: tuple[int, int], end: tuple[int, int]) -> None:
    for scheme, expected in ((replace(PROMPT_END, block_origin="start"), start), (PROMPT_END, end)):
        assert (scheme.tail(prompt_length), scheme.lead(prompt_length)) == expected


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_engine_replay_and_plain_passes_agree(strategy: str, shift: int) -> None:
    """The first block of the completion holds nothing of the prompt, whatever the prompt's length."""
    completions = assert_three_roads_meet(STRATEGIES[strategy], 4, shift=shift, block_origin="prompt_end")
    assert all(len(completion.token_ids) % 4 == 0 for completion in completions)
    assert {len(completion.prompt_ids) % 4 for completion in completions} == {0, 1, 2, 3}


@pytest.mark.parametrize("strategy", ["dynamic", "static"])
@torch.no_grad()
def test_holds_equal_plain_passes(strategy: str) -> None:
    sampling = STRATEGIES[strategy]
    model, groups = group_of_completions(sampling, 4, block_origin="prompt_end")
    pack_ = packed(groups, model, shared=True)
    found_T = replayed(pack_, model, sampling)
    for branch, completion in enumerate(completion for group in groups for completion in group):
        oracle_T = brute_force_actions(model, completion, sampling)
        torch.testing.assert_close(found_T[pack_.actions.branch_T == branch], oracle_T, atol=2 * TOLERANCE, rtol=0)


def test_only_prompts_that_fill_no_block_are_decoded_otherwise() -> None:
    sampling = SamplingConfig(max_completion_length=12)
    prompts = [list(range(10, 10 + length)) for length in (4, 8, 5, 7)]
    found = []
    for origin in ("start", "prompt_end"):
        model, tokenizer = sharp_tiny_model(block_origin=origin)  # type: ignore[arg-type]
        completions = TorchEngine(model, tokenizer).generate(prompts, sampling, range(4))
        found.append([(completion.token_ids, completion.step_map) for completion in completions])
    assert [one == other for one, other in zip(*found, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize("shift", [0, 1])
def test_gradient_of_an_sft_step(shift: int) -> None:
    model, _ = sharp_tiny_model(shift=shift, block_origin="prompt_end")
    noise = NoiseConfig(min_noise=0.1)
    viewed = [noisy_document(*pair, noise, model.scheme) for pair in ((5, 8), (1, 12), (7, 4), (8, 4), (0, 8))]
    pack_ = pack(viewed, 4, shift)
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    loss = nelbo_loss(PackedScorer(model, "sdpa")(pack_, rule).logprob_T, pack_.actions.weight_T, denominator=36.0)
    by_hand = sum_over_views(model, viewed) / 36.0
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert_same_gradient(gradient(loss, model), gradient(by_hand, model))


@pytest.mark.parametrize("prompt_length", range(1, 6))
def test_completions_alone_are_filled(prompt_length: int) -> None:
    example = make_example(Document([1] * prompt_length, [50] * 6), PROMPT_END, 98, score_fill=True)
    assert example.trajectory.completion_ids.tolist() == [50] * 6 + [98] * 2
    assert example.trajectory.token_ids_KB.tolist() == [[50] * 4, [50, 50, 98, 98]]
    assert example.trajectory.start == prompt_length


def test_a_split_completion_has_every_action_of_the_whole() -> None:
    groups = make_groups()
    for group in groups:  # whole blocks behind the prompt
        group.completions[:] = [
            replace(c, token_ids=c.token_ids[:n], step_map=[1, 1, 2, 2] * (n // 4), logprobs=(c.logprobs or [])[:n])
            for c in group.completions
            for n in [len(c.token_ids) // 4 * 4 or 4]
            if len(c.token_ids) >= 4
        ]
    groups = [group for group in groups if len(group.completions) == 2]
    tables = []
    for budget in (4096, 20):
        batches = pack_groups(groups, ObjectiveConfig(), Layout(PROMPT_END, budget))
        assert all(len(batch.packed) <= budget for batch in batches)
        tables.append(
            sorted(
                (*row, recorded)
                for batch in batches
                for *row, recorded in zip(
                    batch.completion_T.tolist(),
                    batch.row_T.tolist(),
                    batch.packed.actions.target_T.tolist(),
                    batch.packed.actions.block_T.tolist(),
                    batch.engine_logprob_T.tolist(),
                    strict=True,
                )
            )
        )
        is_split = any(batch.is_split for batch in batches)
    assert is_split and tables[0] == tables[1]


def test_sft_rl_and_evaluation_from_the_command_line(tmp_path: Path) -> None:
    """bd3lm's files, decoded as dllm does; what is saved says so itself."""
    model = str(checkpoint("a2d_qwen3", tmp_path / "model"))
    said = [{"prompt": f"word{i} word{i + 1}", "completion": f"word{i + 2} word7"} for i in range(8)]
    problems = rows_of(tmp_path / "problems.jsonl", [{"question": f"word{i} word3", "answer": "4"} for i in range(8)])
    common = {"learning_rate": 1e-3, "max_tokens_per_micro_batch": 4096}
    configs = {
        "sft": {
            **common,
            "max_steps": 2,
            "global_batch_size": 4,
            "model": {"path": model, "block_length": 4, "block_origin": "prompt_end"},
            "data": {"path": rows_of(tmp_path / "said.jsonl", said), "num_heldout": 2},
        },
        "rl": {
            **common,
            "max_steps": 1,
            "model": {"path": str(tmp_path / "sft/final")},
            "data": {"path": problems},
            "rollout": {"prompts_per_step": 2, "num_generations": 3, "max_completion_length": 12},
            "reward": {"functions": ["tests.rl.test_update:even_length"]},
            "completions_steps": 1,
        },
        "eval": {
            "model": {"path": str(tmp_path / "rl/final")},
            "data": {"datasets": [problems]},
            "sampling": {"max_completion_length": 12},
        },
    }
    for stage, config in configs.items():
        file = tmp_path / f"{stage}.yaml"
        file.write_text(yaml.safe_dump({**config, "output_dir": str(tmp_path / stage)}))
        assert main([stage, str(file)]) == 0, stage
    assert load(str(tmp_path / "rl/final"))[0].scheme.block_origin == "prompt_end"
    (step,) = [yaml.safe_load(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert step["sampling/logp_difference/max"] < 1e-4
    rows = [yaml.safe_load(line) for line in next((tmp_path / "rl/completions").iterdir()).read_text().splitlines()]
    assert all(row["tail"] == 0 and len(row["token_ids"]) % 4 == 0 for row in rows)
    back = load_model(ModelConfig(path=str(tmp_path / "rl/final"), block_origin="start"), load(model)[1])
    assert back.scheme.block_origin == "start"


def test_who_cannot_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(checkpoint("llada", tmp_path))
    with pytest.raises(UserError, match=r"block_origin=prompt_end is of blocks, and the model of model.path has none"):
        load_model(ModelConfig(path=path, block_origin="prompt_end"), load(path)[1])
    model, _ = sharp_tiny_model(block_origin="prompt_end")
    with pytest.raises(UserError, match=r"rollout.engine=lmdeploy: it counts blocks from position 0"):
        chosen_engine(EngineConfig(engine="lmdeploy"), model)
    with pytest.raises(ValueError, match="a plain pass needs an attention_plan"):
        model(torch.tensor([[1, 2, 3]]))
