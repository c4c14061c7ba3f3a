"""A server in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from transformers import PreTrainedTokenizerBase

from dirl.model.families.block_diffusion import BlockDiffusionModel
from dirl.rollout.engine import EngineConfig, SamplingConfig
from dirl.rollout.local.engine import TorchEngine
from dirl.rollout.server.api import Api
from dirl.rollout.server.hosted import RolloutServer
from dirl.rollout.server.line import Line
from dirl.rollout.server.serve import listen
from dirl.rollout.server.wire import ServeConfig

KEY = "k" * 32


@contextmanager
def serving(
    model: BlockDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    line: Line | None = None,
    has_weights: bool = True,
    max_batch_size: int = 256,
    sampling: SamplingConfig | None = None,
    port: int = 0,
) -> Iterator[tuple[RolloutServer, str]]:
    """A server over a copy of the model, named "tiny"; and its address."""
    ours, line = deepcopy(model), line or Line()
    engine = TorchEngine(ours, tokenizer, EngineConfig(max_batch_size=max_batch_size), observer=line)
    rollouts = RolloutServer(ours, engine, has_weights=has_weights, line=line)
    api = Api(rollouts, tokenizer, "tiny", sampling or SamplingConfig())
    http, listening = listen(api, ServeConfig(port=port), KEY)
    thread = threading.Thread(target=http.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield rollouts, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        http.should_exit = True
        thread.join()
        rollouts.close()
