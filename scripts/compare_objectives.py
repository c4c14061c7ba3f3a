"""Which objective pays: every preset from one SFT checkpoint, in several settings, with several seeds.

    python scripts/compare_objectives.py --sft outputs/tiny/sft/final --jobs 2
    python scripts/compare_objectives.py --sft DIR --settings accuracy,speed --presets dipo,espo
    python scripts/compare_objectives.py --lines docs/benchmarks/objectives.jsonl --table
    python scripts/compare_objectives.py --lines docs/benchmarks/objectives.jsonl --docs docs/objectives.md
    python scripts/compare_objectives.py --lines docs/benchmarks/objectives.jsonl --picture docs/pictures/FILE.png

Each finished run is one JSON line at the end of --lines, and is not run again; a study that was killed goes on where it
was by the same command, a run in its middle from its own checkpoint. A setting after another, and in each first the
short runs that choose every preset's learning rate, then seed 0 of all, then seed 1, then seed 2: stopped early, the
table has fewer seeds. A run that fails is a line with its error; --retry runs those again.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from objective_study import COMMON, OWN_OVERRIDES, SETTINGS, Job, Line, chosen_rate, key_of, stages

from dirl.errors import RunInterrupted, UserError, one_line
from dirl.files import append_json_lines, cut_torn_line, read_json_lines

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/tiny/rl.yaml"
PRESETS = ROOT / "configs/objectives"
CPU_SECONDS = "timing_s/cpu"  # of a step; unlike wall time it hardly depends on what else the machine does


@dataclass(frozen=True)
class Task:
    """A job, what its line begins with, and where it works."""

    job: Job
    identity: Line
    output_dir: Path


def task_of(job: Job, outputs: Path) -> Task:
    """Raises UserError where the configuration is none, such as for a preset that is not there."""
    from dirl.config import config_to_dict, load_config
    from dirl.rl.rl_config import RLConfig

    values = config_to_dict(load_config(RLConfig, RECIPE, job.all_overrides))
    # What was said, not what defaults fill in: a key that is new in the package changes no study.
    said = dict(_differences(values, config_to_dict(RLConfig())))
    settings = {key: value for key, value in said.items() if key not in ("output_dir", "model.path")}
    identity = {
        "benchmark": "objectives",
        "kind": job.kind,
        "setting": job.setting,
        "preset": job.arm,
        "seed": job.seed,
        "learning_rate": job.learning_rate,
        "rollouts": job.rollouts,
        "steps": job.steps,
        "objective": {k.removeprefix("objective."): v for k, v in said.items() if k.startswith("objective.")},
        "config": _digest(repr(sorted(settings.items())).encode()),
        "sft": _digest((Path(job.sft) / "model.safetensors").read_bytes()),
    }
    return Task(job, identity, outputs / f"{job.name}_{identity['config']}")


def _differences(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys whose value is not the default."""
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping) and default:
            yield from _differences(value, default, f"{prefix}{name}.")
        elif value != default:
            yield prefix + name, value


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=4).hexdigest()


def start_worker(log: Path) -> None:
    """A process that trains one run after another: quiet, on one thread, and gone when the study is."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import logging

    import torch

    torch.set_num_threads(1)
    logging.getLogger("dirl").setLevel(logging.ERROR)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_task(task: Task) -> Line | None:
    """The finished line of a run; None: it was told to stop, and goes on next time."""
    from bench_setup import provenance

    try:
        measured = _measure(task)
    except RunInterrupted:
        return None
    except Exception as error:  # recorded: one objective that cannot be trained does not end the study
        measured = {"error": one_line(error, 200)}
    shutil.rmtree(task.output_dir, ignore_errors=True)
    return {**task.identity, **measured, **provenance()}


def _measure(task: Task) -> Line:
    from dirl.config import load_config
    from dirl.rl.rl_config import RLConfig
    from dirl.rl.train import RLTrainer
    from dirl.show.metric_table import read_metrics

    class StudyTrainer(RLTrainer):
        def step(self) -> dict[str, float]:
            start = time.process_time()
            metrics = super().step()
            return {**metrics, CPU_SECONDS: time.process_time() - start}

        def evaluate(self) -> dict[str, float]:
            """Decoding as the setting does: some presets roll out in an order of their own."""
            own, self.config = self.config, replace(self.config, rollout=decoding)
            try:
                return super().evaluate()
            finally:
                self.config = own

        def _finish(self) -> Path:
            return Path(self.config.output_dir)  # no model, card or pictures

    config = load_config(RLConfig, RECIPE, [*task.job.all_overrides, f"output_dir={task.output_dir}"])
    decoding = load_config(RLConfig, RECIPE, [*COMMON, *SETTINGS[task.job.setting].overrides]).rollout
    trainer = StudyTrainer(config)
    with trainer.rubric:
        if task.job.kind == "start":
            trainer.begin()
            return _evaluation(trainer.evaluate())
        trainer.train()
    rows = read_metrics(task.output_dir / "metrics.jsonl")
    later = rows[1:] or rows  # the first step of a process also loads code
    return {
        **_evaluation(rows[-1]),
        "seconds_per_step": _mean(later, "timing_s/step"),
        "train_seconds_per_step": _mean(later, "timing_s/train"),
        "cpu_seconds_per_step": _mean(later, CPU_SECONDS),
        "packed_tokens_per_step": round(fmean(row["num_tokens"] for row in rows)),
        "reward": [round(row["reward"], 3) for row in rows],
    }


def _evaluation(metrics: Mapping[str, float]) -> Line:
    return {
        "accuracy": round(metrics["eval/accuracy"], 4),
        "standard_error": round(metrics["eval/standard_error"], 4),
        "greedy_accuracy": round(metrics["eval/greedy/accuracy"], 4),
        "tokens_per_step": round(metrics["eval/tokens_per_step"], 3),
        "greedy_tokens_per_step": round(metrics["eval/greedy/tokens_per_step"], 3),
    }


def _mean(rows: Iterable[Mapping[str, float]], name: str) -> float:
    return round(fmean(row[name] for row in rows), 3)


class Study:
    """The lines there are, and the workers that add to them."""

    def __init__(self, path: Path, outputs: Path, pool: ProcessPoolExecutor, *, retry: bool) -> None:
        self.path, self.outputs, self.pool = path, outputs, pool
        if path.exists():
            cut_torn_line(path)
        self.lines = read_lines(path)
        self._done = {key_of(line) for line in self.lines if not (retry and "error" in line)}

    def run(self, setting: str, arms: Mapping[str, list[str]], sft: Path, options: argparse.Namespace) -> None:
        """All of a setting that is not done yet."""
        fit = {}
        for arm, overrides in arms.items():
            try:
                task_of(Job("final", setting, arm, tuple(overrides), 0, 0.0, options.rollouts, str(sft)), self.outputs)
            except UserError as error:  # a preset that is not there, or that the setting refuses: nothing was run
                say(f"{setting} {arm}: left out: {one_line(error)}")
            else:
                fit[arm] = overrides
        for jobs in stages(setting, fit, options.rollouts, str(sft), options.also):
            chosen = [self._with_rate(job) if wants_rate else job for job, wants_rate in jobs]
            self._run_all([job for job in chosen if job is not None])

    def _with_rate(self, job: Job) -> Job | None:
        """The job with the learning rate that its short runs chose; None: all of them failed."""
        rate = chosen_rate(self.lines, job.setting, job.arm)
        return None if rate is None else replace(job, learning_rate=rate)

    def _run_all(self, jobs: Iterable[Job]) -> None:
        tasks = [task_of(job, self.outputs) for job in jobs]
        tasks = [task for task in tasks if key_of(task.identity) not in self._done]
        futures = [self.pool.submit(run_task, task) for task in tasks]
        for future in as_completed(futures):
            line = future.result()
            if line is None:
                raise KeyboardInterrupt
            self._record(line)

    def _record(self, line: Line) -> None:
        append_json_lines(self.path, [line])
        self.lines.append(line)
        self._done.add(key_of(line))
        name = f"{line['setting']} {line['preset']} {line['kind']} seed {line['seed']}, {line['learning_rate']:g}"
        found = line.get("error") or (
            f"accuracy {line['accuracy']:.3f}, greedy {line['greedy_accuracy']:.3f}, "
            f"{line['tokens_per_step']:.2f} tokens per step"
        )
        say(f"{name}: {found}")


def read_lines(path: Path) -> list[Line]:
    """The runs that are finished."""
    return list(read_json_lines(path, "a run of the study", key_of)) if path.exists() else []


def say(text: str) -> None:
    print(text, flush=True)


def run_study(options: argparse.Namespace, arms: Mapping[str, list[str]]) -> None:
    """Run what is missing of the settings asked for."""
    from bench_setup import provenance

    # One commit for the whole study: its own lines do not make the checkout another.
    os.environ.setdefault("DIRL_COMMIT", provenance()["commit"])
    options.outputs.mkdir(parents=True, exist_ok=True)
    checkpoints = {4: options.sft, 8: options.sft_block_8}
    with ProcessPoolExecutor(
        options.jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(options.outputs / "workers.log",),
    ) as pool:
        study = Study(options.lines, options.outputs, pool, retry=options.retry)
        try:
            for name in options.settings:
                sft = checkpoints[SETTINGS[name].block_length]
                if sft is None:
                    say(f"{name}: left out: it starts from a checkpoint of its own; name it with --sft-block-8")
                    continue
                study.run(name, arms, sft.resolve(), options)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def named_presets() -> list[str]:
    """All that configs/objectives holds; dipo, whose values are the recipe's, comes first."""
    return sorted((path.stem for path in PRESETS.glob("*.yaml")), key=lambda name: (name != "dipo", name))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft", type=Path, metavar="DIR", help="the checkpoint every run starts from")
    parser.add_argument("--sft-block-8", type=Path, metavar="DIR", help="the one of setting block_8")
    parser.add_argument("--settings", type=_names, default=list(SETTINGS), help=f"of {','.join(SETTINGS)}; default all")
    parser.add_argument("--presets", type=_names, help="default: all of configs/objectives")
    words = "a further arm: a name and overrides of configs/tiny/rl.yaml; may be repeated"
    parser.add_argument("--arm", nargs="+", action="append", default=[], metavar="NAME key=value", help=words)
    parser.add_argument("--also", nargs="+", default=[], metavar="key=value", help="overrides of every run")
    parser.add_argument("--rollouts", type=int, default=40, help="batches of rollouts of a reported run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--lines", type=Path, default=ROOT / "outputs/objectives/lines.jsonl", help="JSON, one a run")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs/objectives/runs", help="runs that go on")
    parser.add_argument("--retry", action="store_true", help="run those that failed again")
    parser.add_argument("--table", action="store_true", help="print the tables of the lines; run nothing")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="put them into this page; run nothing")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw the first of --settings; run nothing")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.settings if name not in SETTINGS]:
        parser.error(f"--settings: {', '.join(unknown)} is none of {', '.join(SETTINGS)}")
    if options.sft is None and not (options.table or options.docs or options.picture):
        parser.error("name the checkpoint to start from with --sft, or ask for --table, --docs or --picture")
    return options


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    options = parse()
    try:
        if options.table or options.docs or options.picture:
            show(options)
        else:
            presets = options.presets if options.presets is not None else named_presets()
            arms = {name: [f"objective={name}", *OWN_OVERRIDES.get(name, ())] for name in presets}
            run_study(options, arms | {name: overrides for name, *overrides in options.arm})
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    except BrokenProcessPool:
        sys.exit("a worker was ended from outside; the same command goes on")
    except (UserError, OSError) as error:
        sys.exit(str(error))


def show(options: argparse.Namespace) -> None:
    """Tables and picture of the lines there are."""
    from objective_tables import draw, places, preset_table, study_tables, write_between

    lines = read_lines(options.lines)
    tables = "\n\n".join(filter(None, (study_tables(lines), places(lines))))
    if options.table:
        say(tables)
    if options.docs:
        write_between(options.docs, "study", tables)
        write_between(options.docs, "presets", preset_table(PRESETS))
    if options.picture:
        draw(lines, options.settings[0], options.picture)


if __name__ == "__main__":
    main()
