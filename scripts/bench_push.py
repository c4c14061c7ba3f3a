"""Weights from a trainer to a `dirl serve` of its own in another process: broadcast (gloo on CPUs) against HTTP.

    python scripts/bench_push.py [--model tiny|0.2b] [--servers 1]

Both push the same model to the same servers and take turns. One JSON line each; `ratio` is to HTTP's fastest.
"""

from __future__ import annotations

import argparse

from bench_setup import MODEL_NAMES, build_model, model_fields, print_line, time_in_turn

from dirl.model.tiny import tiny
from dirl.rollout.engine import EngineConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODEL_NAMES, default="tiny")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    from dirl.rollout.server.engine import start_server  # needs an extra
    from dirl.rollout.server.push import Pusher

    model, (_, tokenizer) = build_model(options.model).eval(), tiny()
    config = EngineConfig(mode="server", engine="torch")
    servers = [start_server(model, tokenizer, config, bf16=False) for _ in range(options.servers)]
    try:
        pushers = {
            how: Pusher(servers, trainer="b" * 16, config=EngineConfig(mode="server", weight_transfer=how))
            for how in ("http", "collective")
        }
        timings = time_in_turn(
            {how: lambda pusher=pusher: pusher.push(model) for how, pusher in pushers.items()}, repeats=options.repeats
        )
    finally:
        for server in servers:
            server.close()
    gigabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    for how, timing in timings.items():
        print_line(
            "push",
            **model_fields(options.model, model),
            gigabytes=round(gigabytes, 4),
            servers=options.servers,
            weight_transfer=how,
            ratio=round(timing.best / timings["http"].best, 3),
            **timing.as_fields(),
        )


if __name__ == "__main__":
    main()
