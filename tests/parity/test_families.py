"""Every family, from files as it publishes them: engine, packed replay and plain passes agree; all stages run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from dirl.cli import main
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.noising import NoiseConfig
from dirl.diffusion.packing import pack
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.model.checkpoint import load
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.rollout.engine import SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.replay import logprobs
from dirl.sft.loss import nelbo_loss
from tests.model import published
from tests.model.published import PUBLISHED
from tests.oracle import brute_force_logprobs
from tests.parity.packs import packed, replayed
from tests.parity.test_gradients import assert_same_gradient, noisy_document, sum_over_views
from tests.parity.test_replay import STRATEGIES, TOLERANCE

TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.content }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> {% endif %}"
)


def checkpoint(name: str, path: Path) -> Path:
    """The family's tiny files, with a chat template."""
    published.write(PUBLISHED[name](), path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def opened(name: str, path: Path) -> tuple[BlockDiffusionModel, object]:
    """In blocks of 4, where it has any: those of 32 would hold all of a test's tokens."""
    model, tokenizer = load(str(checkpoint(name, path)))
    model.config.block_size = 4
    return model, tokenizer


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_packed_replay_plain_passes_and_the_engine_agree(name: str, tmp_path: Path) -> None:
    model, tokenizer = opened(name, tmp_path)
    prompts = [torch.randint(0, 80, (length,)).tolist() for length in (3, 4, 9)]
    for strategy in STRATEGIES.values():
        asked = {"max_completion_length": 11, "generation_window": 5, "record_holds": True}
        sampling = SamplingConfig(**{**vars(strategy), **asked})
        completions = TorchEngine(model, tokenizer).generate(prompts, sampling, [0, 1, 2])  # type: ignore[arg-type]
        scored = logprobs(model, completions, sampling)
        for completion, found in zip(completions, scored, strict=True):
            plain = brute_force_logprobs(model, completion, sampling)
            assert float((found - plain).abs().max()) <= TOLERANCE, sampling.unmasking_strategy
            assert float((torch.tensor(completion.logprobs) - plain).abs().max()) <= TOLERANCE
        pack_ = packed([[completion] for completion in completions], model, shared=False)
        found_T, recorded_T = replayed(pack_, model, sampling), pack_.actions.engine_logprob_T
        assert float((found_T - recorded_T).abs().max()) <= TOLERANCE  # reveals and holds, row for row


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradient_of_a_packed_sft_step(name: str, tmp_path: Path) -> None:
    model, _ = opened(name, tmp_path)
    scheme = model.scheme
    viewed = [noisy_document(*pair, NoiseConfig(min_noise=0.1), scheme) for pair in ((5, 7), (8, 4), (0, 8))]
    packed = pack(viewed, scheme.block_length, scheme.shift)
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    loss = nelbo_loss(PackedScorer(model, "sdpa")(packed, rule).logprob_T, packed.actions.weight_T, denominator=19.0)
    by_hand = sum_over_views(model, viewed) / 19.0
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found, expected = (torch.autograd.grad(x, trained, allow_unused=True) for x in (loss, by_hand))
    assert [g is None for g in found] == [g is None for g in expected]
    assert_same_gradient(*(torch.cat([g.flatten() for g in x if g is not None]) for x in (found, expected)))


def rows_of(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_two_steps_of_sft_one_of_rl_and_an_evaluation(name: str, tmp_path: Path) -> None:
    model = str(checkpoint(name, tmp_path / "model"))
    said = [{"prompt": f"word{i} word{i + 1}", "completion": f"word{i + 2} word{i + 3} word7"} for i in range(12)]
    asked = [{"question": f"word{i} word{i + 1}", "answer": str(i)} for i in range(8)]
    problems = rows_of(tmp_path / "problems.jsonl", asked)
    common = {"max_steps": 2, "learning_rate": 1e-3, "max_tokens_per_micro_batch": 4096}
    sft = {
        **common,
        "output_dir": str(tmp_path / "sft"),
        "global_batch_size": 4,
        "model": {"path": model, "block_length": 4},
        "data": {"path": rows_of(tmp_path / "said.jsonl", said), "num_heldout": 4},
    }
    rl = {
        **common,
        "max_steps": 1,
        "output_dir": str(tmp_path / "rl"),
        "model": {"path": str(tmp_path / "sft/final")},
        "data": {"path": problems},
        "rollout": {"prompts_per_step": 2, "num_generations": 3, "max_completion_length": 12, "generation_window": 6},
        "reward": {"functions": ["tests.rl.test_update:even_length"]},
    }
    evaluation = {
        "output_dir": str(tmp_path / "eval"),
        "model": {"path": str(tmp_path / "rl/final")},
        "data": {"datasets": [problems]},
        "sampling": {"max_completion_length": 12, "generation_window": 6},
    }
    for stage, config in (("sft", sft), ("rl", rl), ("eval", evaluation)):
        file = tmp_path / f"{stage}.yaml"
        file.write_text(yaml.safe_dump(config))
        assert main([stage, str(file)]) == 0, stage
    (step,) = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert step["sampling/logp_difference/max"] < 1e-4
    trained, start = (load(str(path))[0].state_dict() for path in (tmp_path / "rl/final", Path(model)))
    assert trained.keys() == start.keys()
    assert any(not torch.equal(trained[key], start[key]) for key in start)
