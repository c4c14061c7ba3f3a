"""A `dirl serve` of one's own: started, waited for, watched, and gone when this process is."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from dirl.config import save_config
from dirl.rollout.engine import RolloutError
from dirl.rollout.server.wire import KEY_VARIABLE, PARENT_VARIABLE, ServeConfig

_LOG_LINES = 20


class ServerProcess:
    """One server on this machine.

    It dies with this process, however that ends: its standard input is a pipe that only this process holds.
    """

    def __init__(
        self,
        config: ServeConfig,
        key: str,
        directory: tempfile.TemporaryDirectory[str],  # for its files; removed when it is closed
        *,
        device: str = "",  # CUDA_VISIBLE_DEVICES of the server; empty: as here
        start_seconds: float = 600.0,
    ) -> None:
        self._directory, folder = directory, Path(directory.name)
        self._log, self._ready = folder / "log.txt", folder / "address"
        config = replace(config, port=0, ready_file=str(self._ready))
        save_config(config, folder / "serve.yaml")
        self._command = [sys.executable, "-m", "dirl.cli", "serve", str(folder / "serve.yaml")]
        self._environment = os.environ | {KEY_VARIABLE: key, PARENT_VARIABLE: "1"}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # the server is no rank of the trainer
            self._environment.pop(name, None)
        if device:
            self._environment["CUDA_VISIBLE_DEVICES"] = device
        self._start_seconds = start_seconds
        atexit.register(self.close)
        self.start()

    def start(self) -> None:
        """Start, or start again, and wait until the server listens.

        Raises:
            RolloutError: it ended, or was not ready in time; with the end of its log.
        """
        self._ready.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + self._start_seconds
        while not (self._ready.is_file() and self._ready.read_text(encoding="utf-8")):
            if not self.is_alive:
                raise RolloutError(f"dirl serve ended with code {self._process.returncode}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self._stop()
                raise RolloutError(f"dirl serve did not listen in {self._start_seconds:.0f} s:\n{self.log_tail()}")
            time.sleep(0.05)
        self.url = self._ready.read_text(encoding="utf-8")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def log_tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_LINES:])

    def close(self) -> None:
        self._stop()
        self._directory.cleanup()
        atexit.unregister(self.close)

    def _stop(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()  # the server ends by itself
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
