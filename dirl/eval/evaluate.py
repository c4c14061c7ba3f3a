"""A model and data sets -> samples.jsonl, results.json and report.md, by one process or many.

Samples are written as they come, so that a killed evaluation continues.
Each has a seed of its own, from (seed, problem, sample): it does not matter which are decoded together, or by which
process. Several processes share each chunk; the main one keeps the files.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dirl.config import config_to_dict, save_config
from dirl.data.chat import prompt_text, render_prompt
from dirl.data.problems import Problem
from dirl.errors import UserError
from dirl.eval.benchmarks import Benchmark
from dirl.eval.eval_config import EvalConfig, Mode
from dirl.eval.report import write_report
from dirl.eval.results import ModeResult, Sample, summarise
from dirl.eval.rules import rule_of
from dirl.eval.sample_store import SampleStore, Which
from dirl.model.checkpoint import load_model
from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.model.model_path import tokenizer_of
from dirl.reward.rubric import RewardConfig, Rubric, right_ones
from dirl.rollout.build import build_engine
from dirl.rollout.engine import Completion, RolloutEngine
from dirl.rollout.scoring import score
from dirl.rollout.watch import EvaluationProgress
from dirl.training.distributed import Distributed
from dirl.training.full_parameters import digest_of_weights
from dirl.training.run_lock import check_free, hold
from dirl.training.run_state import write_run_json
from dirl.training.seeds import stable_seed

logger = logging.getLogger(__name__)


class Evaluator:
    """Decodes problems and judges the answers; with `distributed`, all its processes take part in every call."""

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        rubric: Rubric,
        *,
        seed: int = 0,
        system_prompt: str = "",
        suffix: str = "",
        distributed: Distributed | None = None,
    ) -> None:
        self.engine, self.tokenizer, self.rubric, self.seed = engine, tokenizer, rubric, seed
        self.system_prompt, self.suffix, self.distributed = system_prompt, suffix, distributed

    def evaluate(self, problems: Sequence[Problem], mode: Mode) -> tuple[ModeResult, list[Sample]]:
        """All samples of all problems in one go, and what they come to."""
        judged = self.judge(problems, mode, list(product(range(len(problems)), range(mode.num_samples))))
        samples = [sample for sample, _ in judged]
        return summarise("", mode.name, mode.sampling, samples), samples

    def judge(self, problems: Sequence[Problem], mode: Mode, todo: Sequence[Which]) -> list[tuple[Sample, Completion]]:
        """The samples named by (problem index, sample index), in that order, on every process."""
        mine = self.distributed.share(todo) if self.distributed else todo
        asked = [problems[problem] for problem, _ in mine]
        start = time.perf_counter()
        prompts = self._render(asked)
        completions = self._decode(prompts, mode, mine)
        seconds = time.perf_counter() - start
        if self.distributed:
            seconds = self.distributed.max(seconds)
        is_right = self._grade(asked, prompts, completions, mode)
        judged = [
            (_sample(which, problem, completion, is_right=right, seconds=seconds / len(todo)), completion)
            for which, problem, completion, right in zip(mine, asked, completions, is_right, strict=True)
        ]
        return self.distributed.gather(judged) if self.distributed else judged

    def _render(self, asked: Sequence[Problem]) -> list[list[int]]:
        how = {"system_prompt": self.system_prompt, "suffix": self.suffix}
        once = {id(problem): problem for problem in asked}
        prompts = {key: render_prompt(self.tokenizer, p.prompt, tools=p.tools, **how) for key, p in once.items()}
        return [prompts[id(problem)] for problem in asked]

    def _decode(self, prompts: Sequence[list[int]], mode: Mode, todo: Sequence[Which]) -> list[Completion]:
        """One completion for each; none on a process that has nothing to do."""
        if not todo:
            return []
        return self.engine.generate(
            list(prompts),
            mode.sampling,
            [stable_seed(self.seed, *which) for which in todo],
            mode.thresholds_of(prompts) if mode.thresholds_of else None,
        )

    def _grade(
        self, asked: Sequence[Problem], prompts: Sequence[list[int]], completions: Sequence[Completion], mode: Mode
    ) -> list[bool]:
        if not asked:
            return []
        limit = mode.sampling.max_completion_length
        texts = [prompt_text(self.tokenizer, prompt) for prompt in prompts]
        scores = score(self.rubric, asked, completions, prompts=texts, max_completion_length=limit)
        return right_ones(scores.parts, scores.total)


def run_evaluation(config: EvalConfig, benchmarks: Sequence[Benchmark] | None = None) -> Path:
    """Evaluate every data set (None: those of the configuration) in every mode; returns the report's path."""
    distributed = Distributed()
    check_free(config.output_dir, distributed, foreign=("metrics.jsonl", "checkpoints"))
    directory = Path(config.output_dir)
    benchmarks = benchmarks or config.data.load()
    tokenizer = tokenizer_of(config.model.path)
    model = load_model(config.model, tokenizer)
    chunk_size = config.chunk_size * distributed.world_size
    results = []
    with ExitStack() as stack:
        stack.enter_context(hold(config.output_dir, distributed))
        store = _open_store(config, model, tokenizer, benchmarks, distributed)
        model.to(distributed.device)  # type: ignore[arg-type]
        progress = EvaluationProgress() if distributed.is_main else None
        engine = stack.enter_context(closing(build_engine(model, tokenizer, config.engine, observer=progress)))
        for benchmark in benchmarks:
            evaluator = Evaluator(
                engine,
                tokenizer,
                stack.enter_context(Rubric(_reward_of(benchmark, config.reward))),
                seed=config.seed,
                system_prompt=config.data.system_prompt,
                suffix="" if benchmark.rule.has_own_form else config.data.suffix,
                distributed=distributed,
            )
            for mode in config.decoding_modes:
                results.append(_evaluate_resumably(evaluator, store, benchmark, mode, chunk_size))
    if distributed.is_main:
        write_report(directory, config.model.path, results, directory / "run.json")
    distributed.barrier()
    distributed.close()
    return directory / "report.md"


def _open_store(
    config: EvalConfig,
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    distributed: Distributed,
) -> SampleStore | None:
    """The main process's store, beside the record of the run; None on the others, which fail with it."""
    store, refusal = None, ""
    if distributed.is_main:
        directory = Path(config.output_dir)
        try:
            store = SampleStore(
                directory, sample_settings(config, model, tokenizer, benchmarks), overwrite=config.overwrite
            )
        except UserError as error:
            refusal = str(error)
        else:
            save_config(config, directory / "config.yaml")
            write_run_json(directory, config_to_dict(config))
    if refusal := distributed.from_main(refusal):
        raise UserError(refusal)
    return store


def _reward_of(benchmark: Benchmark, reward: RewardConfig) -> RewardConfig:
    """The configured reward, except where only one can judge."""
    judge = benchmark.rule.judge
    if judge is None or judge in reward.functions:
        return reward
    parameters = {name: values for name, values in reward.parameters.items() if name == judge}
    return replace(reward, functions=[judge], weights=[], parameters=parameters)


def sample_settings(
    config: EvalConfig,
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
) -> dict[str, object]:
    """Everything a sample depends on besides its data set's name, its mode and its two indices, by dotted key.

    Weights count by content, not by path: a model trained again under the same name is another model.
    """
    sections = config_to_dict(config)
    settings: dict[str, object] = {"seed": config.seed, "engine.engine": config.engine.engine}
    settings["engine.approximate_cache"] = config.engine.approximate_cache
    settings |= {f"model.{key}": sections["model"][key] for key in ("dtype", "block_length", "block_origin")}
    settings |= {f"data.{key}": sections["data"][key] for key in ("system_prompt", "suffix")}
    settings |= {f"sampling.{key}": value for key, value in sections["sampling"].items()}
    settings |= {f"reward.{key}": value for key, value in sections["reward"].items() if not key.startswith("grader_")}
    settings |= {f"problems.{benchmark.name}": benchmark.digest for benchmark in benchmarks}
    settings |= {f"rule.{benchmark.name}": benchmark.rule.title for benchmark in benchmarks}
    shape: Any = model.config
    for name in ("block_size", "mask_token_id", "tokenizer_length", "rope_parameters"):
        settings[f"config.json {name}"] = getattr(shape, name)
    settings["config.json block_origin"] = getattr(shape, "block_origin", "start")
    settings["tokenizer.chat_template"] = str(tokenizer.chat_template)
    return {**settings, "model.weights": digest_of_weights(model)}


def _evaluate_resumably(
    evaluator: Evaluator, store: SampleStore | None, benchmark: Benchmark, mode: Mode, chunk_size: int
) -> ModeResult:
    """One data set in one mode: what is not on disk yet is decoded, a chunk at a time."""
    wanted = list(product(range(len(benchmark.problems)), range(mode.num_samples)))
    done = store.load(benchmark.name, mode.name) if store else {}
    if evaluator.distributed:
        done = evaluator.distributed.from_main(done)
    missing = [which for which in wanted if which not in done]
    for start in range(0, len(missing), chunk_size):
        judged = evaluator.judge(benchmark.problems, mode, missing[start : start + chunk_size])
        if store:
            store.append(benchmark.name, mode.name, judged)
        done |= {(sample.problem, sample.sample): sample for sample, _ in judged}
        logger.info(
            "%s %s: %d of %d samples", benchmark.name, mode.name, sum(which in done for which in wanted), len(wanted)
        )
    result = summarise(
        benchmark.name,
        mode.name,
        mode.sampling,
        [done[which] for which in wanted],
        rule=benchmark.rule.title,
        categories=benchmark.categories,
    )
    logger.info(
        "%s %s: avg@%d %.1f %%, %.2f tokens per step, length %.0f",
        *(benchmark.name, mode.name, mode.num_samples, 100 * result.avg_at_k),
        *(result.tokens_per_step, result.output_length_mean),
    )
    return result


def _sample(which: Which, problem: Problem, completion: Completion, *, is_right: bool, seconds: float) -> Sample:
    rule = rule_of(problem)
    return Sample(
        problem=which[0],
        sample=which[1],
        correct=is_right,
        answer=rule.answer(problem, completion.text),
        completion_length=completion.completion_length,
        num_denoising_steps=completion.num_denoising_steps,
        finish_reason=completion.finish_reason,
        seconds=seconds,
        marks=rule.marks(problem, completion.text),
    )
