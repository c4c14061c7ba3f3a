"""A `dirl serve` of one's own: started, waited for, watched, and gone when this process is."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dirl.config import save_config
from dirl.rollout.engine import RolloutError
from dirl.rollout.server.wire import KEY_VARIABLE, PARENT_VARIABLE, ServeConfig

_LOG_LINES, _LOG_BYTES = 20, 1 << 16
_MOST_STARTS, _WITHIN_SECONDS = 4, 1800.0


class ServerProcess:
    """One server on this machine.

    It dies with this process, however that ends: its standard input is a pipe that only this process holds. Files it
    has only while it starts, and its log is a file without a name: nothing of them is left.
    """

    def __init__(
        self,
        settings: Callable[[Path], ServeConfig],  # with the model's files, which it writes into a folder
        key: str,
        *,
        device: str = "",  # CUDA_VISIBLE_DEVICES of the server; empty: as here
        start_seconds: float = 600.0,
    ) -> None:
        self._settings, self._start_seconds = settings, start_seconds
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._environment = os.environ | {KEY_VARIABLE: key}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # the server is no rank of the trainer
            self._environment.pop(name, None)
        if device:
            self._environment["CUDA_VISIBLE_DEVICES"] = device
        self._started_at = deque[float](maxlen=_MOST_STARTS)
        atexit.register(self.close)
        self._start()

    def restart(self) -> None:
        """
        Raises:
            RolloutError: it has ended too often of late, or does not start; with the end of its log.
        """
        if len(self._started_at) == _MOST_STARTS and time.monotonic() < self._started_at[0] + _WITHIN_SECONDS:
            minutes = _WITHIN_SECONDS / 60
            raise RolloutError(f"dirl serve ended {_MOST_STARTS} times in {minutes:.0f} minutes:\n{self._log_tail()}")
        self._start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._stop()
        atexit.unregister(self.close)

    def _start(self) -> None:
        """Start, and wait until the server listens.

        Raises:
            RolloutError: it ended, or was not ready in time; with the end of its log.
        """
        self._started_at.append(time.monotonic())
        with tempfile.TemporaryDirectory(prefix="dirl-serve-") as folder:
            config, ready = Path(folder, "serve.yaml"), Path(folder, "address")
            save_config(replace(self._settings(Path(folder)), port=0, ready_file=str(ready)), config)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dirl.cli", "serve", str(config)],
                env=self._environment | {PARENT_VARIABLE: folder},
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
            )
            self.url = self._address(ready)

    def _address(self, ready: Path) -> str:
        deadline = self._started_at[-1] + self._start_seconds
        while not (ready.is_file() and ready.read_text(encoding="utf-8")):
            if not self.is_alive:
                raise RolloutError(f"dirl serve ended with code {self._process.returncode}:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                self._stop()
                raise RolloutError(f"dirl serve did not listen in {self._start_seconds:.0f} s:\n{self._log_tail()}")
            time.sleep(0.05)
        return ready.read_text(encoding="utf-8")

    def _log_tail(self) -> str:
        written = os.fstat(self._log.fileno()).st_size
        # Not by the file's own position, which is also where the server writes next.
        tail = os.pread(self._log.fileno(), _LOG_BYTES, max(0, written - _LOG_BYTES))
        return "\n".join(tail.decode(errors="replace").splitlines()[-_LOG_LINES:])

    def _stop(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()  # the server ends by itself
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
