"""The command line: `dirl sft|rl|eval CONFIG key=value ...`, `dirl sweep` of many, and commands for people.

Errors of the user end in one line and exit code 2; nothing is imported before it is needed.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dirl import __version__
from dirl.config import load_config, with_changes
from dirl.errors import RunInterrupted, UserError, visible
from dirl.files import expand, is_hub_id

_BLANK = " \0"  # no argument of a program can hold the zero
# What people must put right, and no code can.
_OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.EMFILE, errno.EIO),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    if _world_size() > 1:
        from dirl.training.interruption import end_with_launcher

        end_with_launcher()  # first of all: before this rank waits for the others
    options = _read(sys.argv[1:] if arguments is None else arguments)
    _quieten(is_quiet=getattr(options, "quiet", False))
    try:
        return options.run(options) or 0
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _say("dirl: interrupted")
        return 130
    except RunInterrupted as stop:
        _say(f"dirl: {stop}")
        return 130 if stop.signal_number == signal.SIGINT else 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
            return _fail(f"{error.strerror}: {error.filename or 'while writing'}", code=1)
        if _world_size() == 1:  # a bug, whose traceback is wanted: once
            raise
        return _fail("".join(traceback.format_exception(error)).rstrip(), code=1)


def _read(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; a word that begins with one minus is a value, as in `dirl generate MODEL "-5+3="`."""
    parser = _parser()
    # argparse takes what begins with a minus for an option, unless it has a blank.
    is_value = re.compile(r"-(?!-|h$|[0-9.]+$).")
    marked = [f"{argument}{_BLANK}" if is_value.match(argument) else argument for argument in arguments]
    # argparse reads no positional argument after an option that follows the first ones.
    options, rest = parser.parse_known_args(marked)
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    for name, value in list(vars(options).items()):
        if isinstance(value, str):
            setattr(options, name, value.removesuffix(_BLANK))
        elif isinstance(value, list):
            setattr(options, name, [item.removesuffix(_BLANK) for item in value])
    return options


def _quieten(*, is_quiet: bool) -> None:
    """What is logged, by which ranks; and a terminal that cannot show a character shows another."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Visible())
    logging.basicConfig(level=logging.INFO if _is_main_rank() else logging.ERROR, handlers=[handler])
    # The Hugging Face client logs every request at INFO level; that is not what people want to read.
    for name in ("httpx", "httpx2", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # tied weights are saved once, on purpose
    if not sys.stderr.isatty():
        # A bar of transformers' in a log file is a line of control characters; read when transformers is imported.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("dirl").setLevel(logging.WARNING if is_quiet else logging.NOTSET)


def _parser() -> argparse.ArgumentParser:
    words = "Post-training of block-diffusion language models."
    parser = argparse.ArgumentParser(prog="dirl", description=words, epilog="See README.md.")
    parser.add_argument("--version", action="version", version=f"dirl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
        "sft": (_run_sft, "fine-tune with random masking"),
        "rl": (_run_rl, "improve with DiPO on the model's own rollouts"),
        "eval": (_run_eval, "evaluate a checkpoint"),
        "serve": (_run_serve, "OpenAI's endpoints over a model, and rollouts for trainers (rollout.mode=server)"),
    }
    for name, (run, help_text) in runs.items():
        command = commands.add_parser(name, help=help_text)
        words = f"YAML file, such as configs/tiny/{name}.yaml"
        words += "; or a model's directory, hub id or run, to serve it as it is" if name == "serve" else ""
        command.add_argument("config", metavar="CONFIG", type=_path, help=words)
        command.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, such as model.path=DIR")
        command.add_argument("--quiet", action="store_true", help="print only warnings and the result")
        command.set_defaults(run=run)
        if name in ("sft", "rl"):
            estimate = "print the memory a rank will need, by ACCELERATE_CONFIG, and load no model"
            command.add_argument("--estimate-memory", action="store_true", help=estimate)
    _add_report(commands)
    _add_difficulty(commands)
    _add_talk(commands)
    _add_runs(commands)
    _add_sweep(commands)
    doctor = commands.add_parser("doctor", help="what is installed, what works here, and what to do about the rest")
    doctor.set_defaults(run=_run_doctor)
    convert = commands.add_parser("convert", help="make a block-diffusion model of an autoregressive one")
    convert.add_argument("source", metavar="SRC", type=_path, help="Hugging Face directory, hub id, or .gguf file")
    convert.add_argument("output", metavar="OUT", type=_path, help="directory to write")
    words = "block_length=4 shift=1 full_attention=false"
    convert.add_argument("overrides", metavar="key=value", nargs="*", help=words)
    convert.set_defaults(run=_run_convert)
    tiny = commands.add_parser("tiny-model", help="write the embedded default model, untrained")
    tiny.add_argument("directory", metavar="DIR", type=_path)
    tiny.set_defaults(run=_run_tiny_model)
    return parser


def _path(text: str) -> str:
    """An argument that names a file or directory: what a shell has left of `~` is written out."""
    return str(expand(text)) if text.startswith("~") else text


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="write the page of a run, or of several side by side")
    words = "output_dir of an sft or rl run; or: compare DIR DIR, the output directories of two evaluations"
    report.add_argument("runs", metavar="RUN_DIR", type=_path, nargs="+", help=f"{words}; or a pattern in quotes")
    words = "one line and band for all runs of one value of this key, such as objective or model.path"
    report.add_argument("--group-by", metavar="KEY", default="", help=words)
    words = "where to; default: report.html in the run's directory"
    report.add_argument("--output", metavar="FILE", type=_path, help=words)
    report.set_defaults(run=_run_report)


def _add_difficulty(commands: Any) -> None:
    words = "write the share of a model's answers that are right into a column of a data set"
    difficulty = commands.add_parser("difficulty", help=words)
    difficulty.add_argument("model", metavar="MODEL", type=_path, help="Hugging Face directory, hub id or run")
    difficulty.add_argument("data", metavar="DATA", type=_path, help=".json, .jsonl, .parquet, .csv file, or hub id")
    difficulty.add_argument("output", metavar="OUT", type=_path, help=".jsonl file to write: DATA's rows and pass_rate")
    words = "such as k=8 data.suffix=TEXT sampling.temperature=1; the same command continues what was ended"
    difficulty.add_argument("overrides", metavar="key=value", nargs="*", help=words)
    difficulty.add_argument("--quiet", action="store_true", help="print only warnings and the result")
    difficulty.set_defaults(run=_run_difficulty)


def _add_talk(commands: Any) -> None:
    talks = {"generate": (_run_generate, "answer one question"), "chat": (_run_chat, "talk to a model")}
    for name, (run, help_text) in talks.items():
        command = commands.add_parser(name, help=help_text)
        words = "Hugging Face directory, hub id, RUN, RUN@STEP or RUN@best"
        command.add_argument("model", metavar="MODEL", type=_path, help=words)
        if name == "generate":
            command.add_argument("prompt", metavar="PROMPT")
            command.add_argument("--quiet", action="store_true", help="print the answer only")
        else:
            command.add_argument("--system-prompt", default="", metavar="TEXT")
        command.add_argument("--seed", type=int, default=0)
        words = "sampling keys, such as temperature=0 max_completion_length=512"
        command.add_argument("overrides", metavar="key=value", nargs="*", help=words)
        command.set_defaults(run=run)


def _add_runs(commands: Any) -> None:
    runs = commands.add_parser("runs", help="the runs under a folder: stage, step, best, accuracy, time, cost")
    runs.add_argument("folder", metavar="FOLDER", nargs="?", default="outputs", help="default: outputs")
    runs.set_defaults(run=_run_runs)
    export = commands.add_parser("export", help="write a checkpoint of any backend as a Hugging Face directory")
    words = "RUN (its final/, or its newest checkpoint), RUN@STEP, RUN@best, or the directory of a checkpoint"
    export.add_argument("model", metavar="RUN[@STEP|@best]", help=words)
    export.add_argument("output", metavar="OUT", help="directory to write; an earlier export there is replaced")
    export.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, in peft's form")
    export.set_defaults(run=_run_export)


def _add_sweep(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="run every combination of several values, and compare them")
    sweep.add_argument("config", metavar="CONFIG", type=_path, help="YAML file of sft, rl or eval")
    words = "a key with values to run, such as objective=[dipo,espo] seed=[0,1,2], or one value for all runs"
    sweep.add_argument("overrides", metavar="key=[a,b]", nargs="*", help=words)
    words = "runs at a time; default: one a GPU (NUM_PROCESSES GPUs a run), without GPUs one a core"
    sweep.add_argument("--jobs", type=int, metavar="N", help=words)
    words = "only the combination of this number, from 0; default: SLURM_ARRAY_TASK_ID where it is set"
    sweep.add_argument("--index", type=int, metavar="I", help=words)
    sweep.add_argument("--print", action="store_true", help="say what would be run, and run nothing")
    sweep.set_defaults(run=_run_sweep)


def _run_sweep(options: argparse.Namespace) -> int:
    from dirl.console.list_runs import wide_console
    from dirl.console.sweep import sweep
    from dirl.eval.eval_config import EvalConfig
    from dirl.rl.rl_config import RLConfig
    from dirl.sft.train import SFTConfig

    if _world_size() > 1:
        raise UserError("dirl sweep is one process, which starts its runs: leave the launcher out, set NUM_PROCESSES")
    return sweep(
        options.config,
        options.overrides,
        {"sft": SFTConfig, "rl": RLConfig, "eval": EvalConfig},
        jobs=options.jobs,
        index=options.index,
        prints=options.print,
        console=wide_console(),
    )


def _run_runs(options: argparse.Namespace) -> None:
    from dirl.console.list_runs import list_runs, wide_console

    list_runs(options.folder, wide_console())


def _run_export(options: argparse.Namespace) -> None:
    from dirl.console.export import export

    of_what = export(options.model, options.output, adapter=options.adapter)
    _say(f"{'adapters' if options.adapter else 'model'}: {options.output} ({of_what} of {options.model})")


def _run_report(options: argparse.Namespace) -> None:
    from dirl.console.report_runs import report_runs
    from dirl.eval.report import comparison_text

    if options.runs[0] == "compare":
        return _say(comparison_text(options.runs[1:]))
    return _say(f"report: {report_runs(options.runs, options.output, options.group_by)}")


def _run_generate(options: argparse.Namespace) -> None:
    from dirl.console.talk import TalkConfig, generate

    sampling = load_config(TalkConfig, None, options.overrides)
    generate(options.model, options.prompt, sampling, seed=options.seed, quiet=options.quiet)


def _run_chat(options: argparse.Namespace) -> None:
    from dirl.console.talk import TalkConfig, chat

    sampling = load_config(TalkConfig, None, options.overrides)
    chat(options.model, sampling, seed=options.seed, system_prompt=options.system_prompt)


def _run_doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from dirl.console.doctor import examine, print_findings

    return 0 if print_findings(examine(), Console()) else 1


def _run_sft(options: argparse.Namespace) -> None:
    from dirl.sft.train import SFTConfig, SFTTrainer, sft_workload

    config = load_config(SFTConfig, options.config, options.overrides)
    if options.estimate_memory:
        return _say_memory(config.model, sft_workload(config))
    return _train(SFTTrainer(config))


def _run_rl(options: argparse.Namespace) -> None:
    from dirl.rl.rl_config import RLConfig, rl_workload
    from dirl.rl.train import RLTrainer

    config = load_config(RLConfig, options.config, options.overrides)
    if options.estimate_memory:
        return _say_memory(config.model, rl_workload(config))
    return _train(RLTrainer(config))


def _train(trainer: Any) -> None:
    """Train to the end, or to a signal that all ranks heed together; then no rank waits for another."""
    try:
        _say(f"model: {trainer.train()}")
    except RunInterrupted:
        trainer.distributed.close()
        raise
    trainer.distributed.close()


def _say_memory(model: Any, workload: Any) -> None:
    from dirl.model.memory import describe_memory

    _say(describe_memory(model, workload, int(os.environ.get("NUM_PROCESSES") or 8)))


def _run_eval(options: argparse.Namespace) -> None:
    from dirl.eval.eval_config import EvalConfig
    from dirl.eval.evaluate import run_evaluation

    _say(f"report: {run_evaluation(load_config(EvalConfig, options.config, options.overrides))}")


def _run_difficulty(options: argparse.Namespace) -> None:
    from dirl.console.difficulty import Difficulty, DifficultyConfig

    config = load_config(DifficultyConfig, None, [*options.overrides, f"model.path={options.model}"])
    difficulty = Difficulty(options.data, options.output, config)
    difficulty.evaluate()
    if _is_main_rank():
        _say(difficulty.write())


def _run_serve(options: argparse.Namespace) -> None:
    from dirl.rollout.server.wire import ServeConfig

    named = options.config
    of_run, at, _ = named.rpartition("@")
    if expand(named).is_dir() or is_hub_id(named) or (at and of_run and expand(of_run).is_dir()):
        config = with_changes(load_config(ServeConfig, None, options.overrides), {"model.path": named}, "command line")
    else:
        config = load_config(ServeConfig, named, options.overrides)
    try:
        from dirl.rollout.server.serve import serve
    except ModuleNotFoundError as error:
        raise UserError(f"dirl serve needs the package {error.name}: pip install 'dirl[serve]'") from error
    serve(config)


def _run_convert(options: argparse.Namespace) -> None:
    from dirl.model.convert import ConvertConfig, convert

    model = convert(options.source, options.output, load_config(ConvertConfig, None, options.overrides))
    scheme, num_parameters = model.scheme, sum(parameter.numel() for parameter in model.parameters())
    blocks = f"blocks of {scheme.block_length}" if scheme.block_length else "full attention"
    _say(f"model: {options.output} ({num_parameters / 1e6:.0f} M parameters, {blocks}, shift {scheme.shift})")


def _run_tiny_model(options: argparse.Namespace) -> None:
    from dirl.model.tiny import save_tiny_model

    directory = Path(options.directory)
    if directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} holds something already; name a new directory for the model")
    save_tiny_model(directory)


def _is_main_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


class _Visible(logging.Formatter):
    """Messages hold what rows, files and models say."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _say(text: str) -> None:
    if _is_main_rank():
        print(visible(text), flush=True)


def _fail(text: str, code: int = 2) -> int:
    """Print an error, of several ranks that of the first to fail; returns the exit code."""
    speaker: str | None = ""
    if _world_size() > 1:
        from dirl.training.distributed import first_to_fail

        speaker = first_to_fail()
    if speaker is not None:
        print(f"dirl: error: {speaker}{visible(text)}", file=sys.stderr, flush=True)
    return code


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


if __name__ == "__main__":
    sys.exit(main())
