"""Weights from a trainer to a `dirl serve` of its own in another process: broadcast (gloo on CPUs) against HTTP.

    python scripts/bench_push.py [--model tiny|0.2b] [--repeats 5]

Each has a server, and they take turns. One JSON line each; `ratio` is to HTTP's fastest push.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack, closing
from functools import partial

from bench_setup import MODEL_NAMES, build_model, model_fields, print_line, time_in_turn

from dirl.model.tiny import tiny
from dirl.rollout.build import build_engine
from dirl.rollout.engine import EngineConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODEL_NAMES, default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, (_, tokenizer) = build_model(options.model).eval(), tiny()
    model.config.mask_token_id = tokenizer.mask_token_id  # as a server has it
    with ExitStack() as stack:
        pushes = {}
        for how in ("http", "collective"):
            config = EngineConfig(mode="server", engine="torch", weight_transfer=how)  # type: ignore[arg-type]
            engine = stack.enter_context(closing(build_engine(model, tokenizer, config)))
            pushes[how] = partial(engine.update_weights, model)
        timings = time_in_turn(pushes, repeats=options.repeats)
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    for how, timing in timings.items():
        print_line(
            "push",
            **model_fields(options.model, model),
            gigabytes=round(gigabytes, 4),
            weight_transfer=how,
            ratio=round(timing.best / timings["http"].best, 3),
            **timing.as_fields(),
        )


if __name__ == "__main__":
    main()
