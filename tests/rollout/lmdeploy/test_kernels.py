"""LMDeploy's own model and kernels, decoding on a CPU under Triton's interpreter: minutes, and not in CI (no triton).

A virtual environment for it: the requirements of tests/requirements-lmdeploy.txt, then, also with --no-deps,
triton==3.6.0 and a numpy below 2.4.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest

pytestmark = [pytest.mark.lmdeploy, pytest.mark.slow]


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton 3.6, which a CPU machine does not install")
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton's interpreter needs numpy < 2.4")
@pytest.mark.timeout(1800)
def test_the_stock_kernels_give_the_logprobs_of_our_model_before_and_after_each_push() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollout.lmdeploy.interpreted"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == 6
    assert all(row["max"] < 0.01 for row in rows), rows  # nats; float16
