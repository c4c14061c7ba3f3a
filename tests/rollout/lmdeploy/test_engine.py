"""LMDeploy's engine: the contract of every engine, and what is its own. Real LMDeploy classes, see `on_cpu`."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

pytest.register_assert_rewrite("tests.rollout.engine_contract")

from dirl.data.chat import stop_token_ids  # noqa: E402
from dirl.data.problems import Problem  # noqa: E402
from dirl.diffusion.unmasking import UnmaskingStrategy  # noqa: E402
from dirl.eval.eval_config import Mode  # noqa: E402
from dirl.eval.evaluate import Evaluator  # noqa: E402
from dirl.model.families.block_diffusion import BlockDiffusionModel  # noqa: E402
from dirl.reward.rubric import RewardConfig, Rubric  # noqa: E402
from dirl.rollout.engine import Completion, RolloutError, SamplingConfig  # noqa: E402
from dirl.rollout.local.engine import TorchEngine  # noqa: E402
from dirl.rollout.replay import logprobs  # noqa: E402
from tests.oracle import sharp_tiny_model  # noqa: E402
from tests.rollout.engine_contract import (  # noqa: E402
    DYNAMIC,
    EngineContract,
    PreTrainedTokenizerBase,
    likely_to_stop,
    random_prompts,
)
from tests.rollout.lmdeploy.on_cpu import cpu_lmdeploy  # noqa: E402

if TYPE_CHECKING:
    from dirl.rollout.lmdeploy.engine import LMDeployEngine

pytestmark = pytest.mark.lmdeploy

STRATEGIES: tuple[UnmaskingStrategy, ...] = (
    "low_confidence_dynamic",
    "low_confidence_static",
    "sequential",
    "entropy_bounded",
    "random",
)
_open: list[LMDeployEngine] = []


@pytest.fixture(autouse=True)
def _cpu() -> Iterator[None]:
    with cpu_lmdeploy():
        yield
        while _open:
            _open.pop().close()


def make(
    model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256, **options: Any
) -> LMDeployEngine:
    from dirl.rollout.lmdeploy.engine import LMDeployEngine

    engine = LMDeployEngine(model, tokenizer, max_batch_size=max_batch_size, **{"block_size": 16, **options})
    _open.append(engine)
    return engine


def trained(completions: list[Completion]) -> list[tuple[list[int], list[int]]]:
    return [(c.token_ids, c.step_map) for c in completions]


class TestLMDeployEngine(EngineContract):
    takes_thresholds = False

    def make_engine(
        self, model: BlockDiffusionModel, tokenizer: PreTrainedTokenizerBase, *, max_batch_size: int = 256
    ) -> LMDeployEngine:
        return make(model, tokenizer, max_batch_size=max_batch_size)

    def test_an_empty_prompt_starts_at_block_zero(self) -> None:
        with pytest.raises(ValueError, match="LMDeploy decodes no empty prompt"):
            self.decode([[]])


# -- the recorder


@pytest.mark.parametrize("block_length", [2, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_decodes_what_the_torch_engine_decodes(strategy: UnmaskingStrategy, block_length: int) -> None:
    """Same weights, same seeds: the same tokens, steps and logprobs, through another scheduler and another cache."""
    model, tokenizer = likely_to_stop(block_length)
    sampling = SamplingConfig(
        unmasking_strategy=strategy, confidence_threshold=0.1, entropy_bound=3.0, max_completion_length=20, top_k=100
    )
    prompts, seeds = random_prompts([1, 9, 3, 8, 4, 2, 17, 5]), range(2**62, 2**62 + 8)
    expected = TorchEngine(model, tokenizer).generate(prompts, sampling, seeds)
    found = make(model, tokenizer).generate(prompts, sampling, seeds)
    assert trained(found) == trained(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replay_reproduces_every_logprob(strategy: UnmaskingStrategy) -> None:
    model, tokenizer = likely_to_stop()
    sampling = SamplingConfig(
        unmasking_strategy=strategy,
        confidence_threshold=0.1,
        denoising_steps=2,
        entropy_bound=3.0,
        max_completion_length=20,
        temperature=0.7,
        top_k=60,
        top_p=0.98,
    )
    completions = make(model, tokenizer).generate(random_prompts([2, 5, 8, 11]), sampling, range(4))
    with torch.no_grad():
        scored = logprobs(model, completions, sampling)
    for completion, expected in zip(completions, scored, strict=True):
        assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_group_is_diverse() -> None:
    """Stock gives 2 different rollouts of 8 here: it tiles the seeds of a batch the wrong way around."""
    engine = make(*sharp_tiny_model(sharpness=1.0))
    completions = engine.generate([[5, 6, 7, 8]] * 8, SamplingConfig(max_completion_length=8), range(8))
    assert len({tuple(c.token_ids) for c in completions}) == 8
    for completion in completions:  # nor do the positions of a block share one random number
        assert len(set(completion.token_ids[:4])) > 1


def test_tokens_after_an_eos_are_kept() -> None:
    model, tokenizer = likely_to_stop()
    stops = stop_token_ids(tokenizer)
    completions = make(model, tokenizer).generate(random_prompts([5, 8] * 8), DYNAMIC, range(16))
    cut = [c for c in completions if c.completion_length < len(c.token_ids)]
    assert cut
    assert all(c.token_ids[c.completion_length - 1] in stops for c in cut)


def test_preempted_sequences_decode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few pages for all: LMDeploy throws sequences out and reads them again, in the middle of blocks."""
    from lmdeploy.pytorch.paging import scheduler as paging

    model, tokenizer = sharp_tiny_model()
    sampling = SamplingConfig(confidence_threshold=0.2, max_completion_length=60, record_holds=True)
    prompts, seeds = random_prompts([9, 30, 14, 22, 6, 18, 25, 11]), range(8)
    expected = TorchEngine(model, tokenizer).generate(prompts, sampling, seeds)
    preempted = []
    stock = paging.Scheduler.preempt_seqs
    monkeypatch.setattr(
        paging.Scheduler, "preempt_seqs", lambda self, seqs: (preempted.extend(seqs := list(seqs)), stock(self, seqs))
    )
    engine = make(model, tokenizer, num_gpu_blocks=17)
    found = engine.generate(prompts, sampling, seeds)
    assert trained(found) == trained(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.hold_logprobs == pytest.approx(other.hold_logprobs, abs=1e-4)
    assert preempted, "nothing was preempted"


def test_long_prompts_read_in_chunks_decode_the_same() -> None:
    model, tokenizer = sharp_tiny_model()
    prompts, seeds = random_prompts([75, 9, 130, 66, 31]), range(5)
    expected = TorchEngine(model, tokenizer).generate(prompts, DYNAMIC, seeds)
    engine = make(model, tokenizer, max_batch_size=8, max_prefill_token_num=32)
    assert trained(engine.generate(prompts, DYNAMIC, seeds)) == trained(expected)


def test_sampling_may_change_between_batches() -> None:
    """Thresholds, strategies and temperatures, without a restart."""
    model, tokenizer = likely_to_stop()
    engine, reference = make(model, tokenizer), TorchEngine(model, tokenizer)
    prompts, seeds = random_prompts([6, 7]), [1, 2]
    for sampling in (
        DYNAMIC,
        SamplingConfig(confidence_threshold=0.9, max_completion_length=12),
        SamplingConfig(unmasking_strategy="low_confidence_static", denoising_steps=2, max_completion_length=12),
        SamplingConfig(temperature=0.0, confidence_threshold=0.05, max_completion_length=12),
    ):
        assert trained(engine.generate(prompts, sampling, seeds)) == trained(
            reference.generate(prompts, sampling, seeds)
        )


def test_the_mask_token_is_the_checkpoints() -> None:
    model, tokenizer = likely_to_stop()
    engine = make(model, tokenizer)
    assert engine._engine.model_config.dllm_mask_token == model.config.mask_token_id != 151669


@pytest.mark.parametrize("version", ["0.17.9", "0.18.1", "0.19.0"])
def test_other_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("lmdeploy"), "__version__", version)
    with pytest.raises(ValueError, match=rf"lmdeploy {version} is installed, and 0\.18\.0 is supported; pip install"):
        make(*likely_to_stop())


def test_heads_compute_float32_logits() -> None:
    """From half-precision weights: no rounding after the sum."""
    from dirl.rollout.lmdeploy.recorder import _Float32Head

    head = _Float32Head()
    head.lm_head = nn.Linear(64, 100, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(1, 5, 64).bfloat16()
    exact = hidden.double() @ head.lm_head.weight.double().T
    assert head.get_logits(hidden).dtype == torch.float32
    torch.testing.assert_close(head.get_logits(hidden), exact.float(), rtol=0, atol=1e-6)


# -- weights, sleep and failures


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_the_weights_can_be_pushed_and_nothing_be_decoded(level: int) -> None:
    prompts, seeds = random_prompts([3, 6, 8]), [1, 2, 3]
    donor, tokenizer = likely_to_stop(seed=5)
    expected = make(donor, tokenizer).generate(prompts, DYNAMIC, seeds)
    ours, _ = likely_to_stop(seed=6)
    engine = make(ours, tokenizer, sleep_level=level, enable_prefix_caching=True)
    before = engine.generate(prompts, DYNAMIC, seeds)
    for model, wanted in ((donor, expected), (ours, before)):
        engine.sleep()
        with pytest.raises(RolloutError, match="asleep"):
            engine.generate(prompts, DYNAMIC, seeds)
        engine.update_weights(model)
        with pytest.raises(RolloutError, match="asleep"):
            engine.generate(prompts, DYNAMIC, seeds)
        engine.wake()
        assert engine.generate(prompts, DYNAMIC, seeds) == wanted
    assert engine.weights_version == 2


def test_after_level_2_nothing_is_decoded_before_a_push() -> None:
    model, tokenizer = likely_to_stop()
    engine = make(model, tokenizer, sleep_level=2)
    before = engine.generate([[1, 2]], DYNAMIC, [0])
    engine.sleep()
    engine.wake()
    with pytest.raises(RolloutError, match="update_weights"):
        engine.generate([[1, 2]], DYNAMIC, [0])
    engine.update_weights(model)
    assert engine.generate([[1, 2]], DYNAMIC, [0]) == before


def test_level_0_does_not_sleep() -> None:
    engine = make(*likely_to_stop(), sleep_level=0)
    before = engine.generate([[1, 2]], DYNAMIC, [0])
    engine.sleep()
    assert engine.generate([[1, 2]], DYNAMIC, [0]) == before


def test_a_push_keeps_captured_graphs_unless_storage_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmdeploy.pytorch.engine.model_agent import agent as stock

    model, tokenizer = likely_to_stop()
    engine = make(model, tokenizer)
    runner = engine._agent.patched_model
    engine.update_weights(model)
    assert runner.num_resets == 0

    def move(module: Any) -> None:  # as a layer of experts may
        module.inner.model.norm.weight = nn.Parameter(module.inner.model.norm.weight.clone(), requires_grad=False)

    monkeypatch.setattr(stock, "process_weights_after_loading", move)
    engine.update_weights(model)
    assert runner.num_resets == 1


def test_a_push_empties_the_prefix_cache() -> None:
    """LMDeploy keeps it: the prompt's old keys would be read with the new weights, which the stand-in refuses."""
    prompts, seeds = random_prompts([40, 50]), [1, 2]
    donor, tokenizer = likely_to_stop(seed=5)
    engine = make(likely_to_stop(seed=6)[0], tokenizer, enable_prefix_caching=True)
    before = engine.generate(prompts, DYNAMIC, seeds)
    assert engine.generate(prompts, DYNAMIC, seeds) == before
    assert engine._engine.scheduler.block_trie.stats.hit_rate() > 0, "nothing was cached"
    engine.update_weights(donor)
    assert engine.generate(prompts, DYNAMIC, seeds) == make(donor, tokenizer).generate(prompts, DYNAMIC, seeds)


def test_what_does_not_fit_the_cache_is_refused() -> None:
    engine = make(*likely_to_stop(), num_gpu_blocks=16)
    with pytest.raises(ValueError, match=r"prompt of 300 tokens .* do not fit the KV cache, which holds 2\d\d"):
        engine.generate([[1] * 300], DYNAMIC, [0])


def test_an_engine_that_dies_is_an_error_and_not_a_shorter_list(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(*likely_to_stop())

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine._agent.patched_model, "read", fail)
    with pytest.raises(RolloutError, match="LMDeploy answered prompt 0"):
        engine.generate([[1, 2]], DYNAMIC, [0])
    for again in (lambda: engine.generate([[1, 2]], DYNAMIC, [0]), lambda: engine.update_weights(likely_to_stop()[0])):
        with pytest.raises(RolloutError, match="LMDeploy's loop has ended"):
            again()


def test_closing_frees_the_model_and_may_be_repeated() -> None:
    engine = make(*likely_to_stop())
    engine.generate([[1, 2]], DYNAMIC, [0])
    engine.close()
    engine.close()
    assert engine._agent.patched_model is None
    with pytest.raises(RolloutError, match="the engine was closed"):
        engine.generate([[1, 2]], DYNAMIC, [0])


def test_the_loop_runs_in_a_thread_of_its_own() -> None:
    """So the engine works where a loop is running already, as in notebooks."""
    engine = make(*likely_to_stop())

    async def inside() -> list[Completion]:
        return engine.generate([[1, 2]], DYNAMIC, [0])

    assert asyncio.run(inside()) == engine.generate([[1, 2]], DYNAMIC, [0])


@pytest.mark.parametrize("call", ["update_params", "init_weights_update_group", "update_weights_from_distributed"])
def test_stock_pushes_are_missing_on_one_gpu(call: str) -> None:
    """What docs/lmdeploy.md says of 0.18.0; when this fails, pushes to servers can become faster."""
    from lmdeploy.pytorch.engine.executor.base import ExecutorBase
    from lmdeploy.pytorch.engine.executor.uni_executor import UniExecutor

    assert getattr(UniExecutor, call) is getattr(ExecutorBase, call)
    with pytest.raises(NotImplementedError):
        getattr(UniExecutor, call)(object(), None)


def test_evaluation_runs_on_it() -> None:
    """Several modes, one engine: accuracy and tokens per step are those of the torch engine."""
    model, tokenizer = likely_to_stop()
    problems = [Problem("?" * length, "0", {}) for length in range(1, 5)]
    modes = [
        Mode(f"threshold {threshold}", SamplingConfig(confidence_threshold=threshold, max_completion_length=12), 2)
        for threshold in (0.0, 0.9)
    ]
    found = []
    with Rubric(RewardConfig(functions=["accuracy"])) as rubric:
        for engine in (make(model, tokenizer), TorchEngine(model, tokenizer)):
            evaluator = Evaluator(engine, tokenizer, rubric, seed=0)
            results = [evaluator.evaluate(problems, mode)[0] for mode in modes]
            found.append([(result.avg_at_k, result.tokens_per_step) for result in results])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1], "the threshold changed nothing"
