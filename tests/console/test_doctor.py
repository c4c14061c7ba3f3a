"""`dirl doctor`: every finding can be good and bad."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from dirl.console import doctor
from dirl.console.doctor import Finding, check_package, check_packages, examine, print_findings


def test_versions_against_ranges() -> None:
    assert check_package(Requirement("torch>=2.0")).level == "ok"
    old = check_package(Requirement("torch>=2.0,<2.1"))
    assert (old.level, old.found) == ("problem", torch.__version__)
    assert "pip install 'torch<2.1,>=2.0'" in old.remedy
    absent = check_package(Requirement("no-such-package-of-dirl>=1"))
    assert (absent.level, absent.found) == ("problem", "not installed")
    only_extras = check_packages(["torch>=2; extra == 'dev'", "no-such; python_version < '3'"])
    assert list(only_extras) == []


def test_this_machine_can_run_dirl(capsys: pytest.CaptureFixture[str]) -> None:
    findings = {finding.subject: finding for finding in examine()}
    assert findings["engine: torch"].level == "ok" and "tokens decoded" in findings["engine: torch"].found
    assert findings["attention: sdpa"].level == "ok"
    assert findings["attention: flex"].level == ("ok" if torch.cuda.is_available() else "note")
    if not torch.cuda.is_available():
        assert findings["attention: flex_flash"].level == findings["engine: lmdeploy"].level == "note"
        assert "rollout.engine=lmdeploy" in findings["engine: lmdeploy"].found
    assert {"torch", "transformers", "lmdeploy", "disk"} <= findings.keys()


def test_a_broken_engine_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(doctor, "tiny", broken)
    findings = {finding.subject: finding for finding in examine()}
    engine = findings["engine: torch"]
    assert (engine.level, engine.found) == ("problem", "RuntimeError: no kernel") and engine.remedy


def test_the_table_and_the_verdict() -> None:
    console = Console(file=io.StringIO(), width=120)
    assert print_findings(iter([Finding("ok", "a", "1"), Finding("note", "b[x]", "2", "do")]), console)
    assert not print_findings(iter([Finding("problem", "c", "3", "mend it")]), console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "b[x]" in text and "mend it" in text


def test_as_a_command() -> None:
    run = subprocess.run([sys.executable, "-m", "dirl.cli", "doctor"], capture_output=True, text=True)
    assert "engine: torch" in run.stdout and run.returncode in (0, 1)
