"""A policy and held-out problems -> how often it is right, and how fast: in the loop, or of a snapshot beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dirl.data.problem_sources import ProblemSplit, load_problems, load_sources, split_problems
from dirl.data.problems import Problem
from dirl.eval.eval_config import Mode
from dirl.eval.evaluate import Evaluator
from dirl.eval.scores import write_scores
from dirl.model.checkpoint import default_device, load_model
from dirl.model.model_path import tokenizer_of
from dirl.reward.rubric import Rubric
from dirl.rl.rl_config import RLConfig
from dirl.rollout.build import build_engine
from dirl.rollout.engine import RolloutEngine
from dirl.training.distributed import Distributed

Thresholds = Callable[[Sequence[Sequence[int]]], list[float]]  # of prompts


def named_problems(config: RLConfig) -> list[Problem]:
    """The problems of `eval.path`; none where it is empty."""
    named, skip, seed = config.eval, config.data.skip_bad_rows, config.seed
    if not named.path:
        return []
    split = "heldout" if named.path.startswith("task:") else named.split
    limit, columns = named.limit, named.columns
    return load_problems(named.path, split=split, limit=limit, skip_bad_rows=skip, seed=seed, columns=columns)


def split_of(config: RLConfig, problems: Sequence[Problem] | None = None) -> ProblemSplit:
    """What is practised on, and what is evaluated on: what `eval.path` names, else what `data.heldout` keeps apart."""
    named = named_problems(config)
    split = split_problems(load_sources(config.data, config.seed) if problems is None else problems, config.data, named)
    return replace(split, heldout=named or split.heldout[: config.eval.limit or None])


def heldout_evaluator(
    config: RLConfig,
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    rubric: Rubric,
    distributed: Distributed | None = None,
) -> Evaluator:
    """Asks as the rollouts do."""
    data = config.data
    return Evaluator(
        engine,
        tokenizer,
        rubric,
        seed=config.seed,
        system_prompt=data.system_prompt,
        suffix=data.suffix,
        distributed=distributed,
    )


def heldout_metrics(
    config: RLConfig,
    evaluator: Evaluator,
    problems: Sequence[Problem],
    *,
    step: int | None,
    thresholds_of: Thresholds | None = None,
    paused: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, float]:
    """Accuracy and tokens per step, sampled as in the rollouts, and greedy.

    Args:
        step: it comes after, which heldout.json tells; None: this process writes none.
        thresholds_of: the confidence threshold of each prompt; None: that of the sampling.
        paused: a context in which nobody else decodes.
    """
    modes = {"eval": Mode("sampled", config.rollout, config.eval.num_samples, thresholds_of)}
    if config.eval.greedy:
        modes["eval/greedy"] = Mode("greedy", replace(config.rollout, temperature=0.0), 1, thresholds_of)
    metrics: dict[str, float] = {}
    found = {}
    for name, mode in modes.items():
        with paused():
            result, found[f"{name}/accuracy"] = evaluator.evaluate(problems, mode)
        metrics[f"{name}/accuracy"] = result.avg_at_k
        metrics[f"{name}/tokens_per_step"] = result.tokens_per_step
        metrics[f"{name}/standard_error"] = result.standard_error
    if step is not None:
        write_scores(config.output_dir, step, problems, found)
    return metrics


def snapshot_metrics(config: RLConfig, snapshot: Path) -> dict[str, float]:
    """The same of the model in a directory, with a model, an engine and a rubric of its own."""
    tokenizer = tokenizer_of(str(snapshot))
    model = load_model(replace(config.model, path=str(snapshot)), tokenizer)
    model.to(default_device())  # type: ignore[arg-type]
    engine = build_engine(model, tokenizer, config.rollout, bf16=config.bf16)
    with closing(engine), Rubric(config.reward) as rubric:
        evaluator = heldout_evaluator(config, engine, tokenizer, rubric)
        problems = named_problems(config) or split_of(config).heldout
        return heldout_metrics(config, evaluator, problems, step=int(snapshot.name.rpartition("_")[2]))
