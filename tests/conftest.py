"""What holds for every test: offline, seeded, and skipped with a reason where the machine lacks what a marker names."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec

# Before any library reads them: nothing here may reach for a network.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
}.items():
    os.environ.setdefault(_name, _value)

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """What is equal to the last bit here is so on CPUs, and defaults differ on a GPU: hidden unless `-m` names it."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr or ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device",
        "lmdeploy": None if find_spec("lmdeploy") else "needs the lmdeploy extra",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _drawn_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only where pictures are what is tested is each drawn."""
    if "dirl.training.loop" not in sys.modules or {"show", "eval"} & {*request.path.parts}:
        yield
        return
    from tests.drawing import draw_once

    end = draw_once()
    yield
    end()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
