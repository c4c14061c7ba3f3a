"""The command line: `dirl sft|rl|eval CONFIG key=value ...` and `dirl report compare A B`.

Errors of the user end in one line and exit code 2; nothing is imported before it is needed.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dirl import __version__
from dirl.config import ConfigError, load_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if _is_main_rank() else logging.ERROR, format="%(message)s")
    # The Hugging Face client logs every request at INFO level; that is not what people want to read.
    for name in ("httpx", "httpx2", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        options.run(options)
    except ConfigError as error:
        return _fail(str(error))
    except (ValueError, FileNotFoundError) as error:
        if not _is_users(error):
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        _say("dirl: interrupted")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dirl", description="Post-training of block-diffusion language models.", epilog="See README.md."
    )
    parser.add_argument("--version", action="version", version=f"dirl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    runs: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
        "sft": (_run_sft, "fine-tune with random masking"),
        "rl": (_run_rl, "improve with DiPO on the model's own rollouts"),
        "eval": (_run_eval, "evaluate a checkpoint"),
    }
    for name, (run, help_text) in runs.items():
        command = commands.add_parser(name, help=help_text)
        command.add_argument("config", metavar="CONFIG", help=f"YAML file, such as configs/tiny/{name}.yaml")
        command.add_argument("overrides", metavar="key=value", nargs="*", help="dotted keys, such as model.path=DIR")
        command.set_defaults(run=run)
    report = commands.add_parser("report", help="compare two evaluations: report compare DIR DIR")
    report.add_argument("words", metavar="compare DIR DIR", nargs="+", help="output directories of `dirl eval`")
    report.set_defaults(run=_run_report)
    tiny = commands.add_parser("tiny-model", help="write the embedded default model, untrained")
    tiny.add_argument("directory", metavar="DIR")
    tiny.set_defaults(run=_run_tiny_model)
    return parser


def _run_sft(options: argparse.Namespace) -> None:
    from dirl.sft.train import SFTConfig, SFTTrainer

    _say(f"model: {SFTTrainer(load_config(SFTConfig, options.config, options.overrides)).train()}")


def _run_rl(options: argparse.Namespace) -> None:
    from dirl.rl.train import RLConfig, RLTrainer

    _say(f"model: {RLTrainer(load_config(RLConfig, options.config, options.overrides)).train()}")


def _run_eval(options: argparse.Namespace) -> None:
    from dirl.eval.evaluate import EvalConfig, run_evaluation

    _say(f"report: {run_evaluation(load_config(EvalConfig, options.config, options.overrides))}")


def _run_report(options: argparse.Namespace) -> None:
    action, *directories = options.words
    if action != "compare" or len(directories) != 2:
        raise ConfigError(f"dirl report {' '.join(options.words)}: expected compare and two directories")
    from dirl.eval.report import comparison_text

    _say(comparison_text(*map(Path, directories)))


def _run_tiny_model(options: argparse.Namespace) -> None:
    from dirl.model.tiny import save_tiny_model

    save_tiny_model(Path(options.directory))


def _is_users(error: Exception) -> bool:
    """Whether an error was raised by dirl's own code, which words them for people, and not by a library or a bug."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("dirl.")


def _is_main_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _say(text: str) -> None:
    if _is_main_rank():
        print(text, flush=True)


def _fail(text: str) -> int:
    if _is_main_rank():
        print(f"dirl: error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
