"""`dirl doctor`: what is installed, what works here, and what to do about what does not.

Every line is a finding of one check that really ran: a package's version against the range dirl is tested with, a tiny
forward and backward pass through each attention, a completion by each engine.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, get_args

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.table import Table

from dirl.data.chat import render_prompt
from dirl.diffusion.distribution import TokenDistribution
from dirl.diffusion.likelihood import ScoringRule
from dirl.diffusion.unmasking import UnmaskingRule
from dirl.diffusion.views import placeholder_pack
from dirl.errors import one_line
from dirl.model.checkpoint import default_device
from dirl.model.flex_attention import AttentionName
from dirl.model.logprobs import PackedScorer, suppressed_by
from dirl.model.tiny import tiny
from dirl.rollout.build import build_engine
from dirl.rollout.engine import EngineConfig, SamplingConfig

Level = Literal["ok", "note", "problem"]
_STYLES: dict[Level, str] = {"ok": "green", "note": "yellow", "problem": "bold red"}
# What is good to have; the base packages and their ranges come from dirl's own metadata.
_OPTIONAL = {
    "lmdeploy": "fast rollouts on CUDA: pip install 'dirl[lmdeploy]' in an environment of its own",
    "deepspeed": "sharded optimizers: pip install 'dirl[deepspeed]'",
    "peft": "lora.r > 0: pip install 'dirl[peft]'",
    "starlette": "dirl serve: pip install 'dirl[serve]'",
    "uvicorn": "dirl serve: pip install 'dirl[serve]'",
    "flash-attn": "a faster KV cache on CUDA: pip install 'dirl[flash-attn]'",
    "pandas": "to_pandas() of completions: pip install pandas",
    "tensorboard": "report_to=[tensorboard]: pip install tensorboard",
    "IPython": "notebooks: pip install notebook",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    level: Level
    subject: str
    found: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """All checks, one after another; some take seconds."""
    yield _check_python()
    yield from _check_base()
    yield from _check_optional()
    yield from _check_devices()
    for name in get_args(AttentionName):
        if name != "auto":
            yield _try(f"attention: {name}", partial(_attend, name), _attention_remedy(name))
    yield _try("engine: torch", partial(_decode, "torch"), "reinstall dirl and torch; then report this message")
    yield _try("engine: lmdeploy", partial(_decode, "lmdeploy"), _lmdeploy_remedy())
    yield _check_disk()


def print_findings(findings: Iterator[Finding], console: Console) -> bool:
    """A table, filled as the checks run; returns whether there was no problem."""
    table = Table("", "checked", "found", "what to do", box=None, pad_edge=False)
    is_healthy = True
    with console.status("checking"):
        for finding in findings:
            is_healthy &= finding.level != "problem"
            style = _STYLES[finding.level]
            cells = (finding.subject, finding.found, finding.remedy)
            table.add_row(f"[{style}]{finding.level}[/]", *(cell.replace("[", r"\[") for cell in cells))
    console.print(table)
    return is_healthy


def _check_base() -> Iterator[Finding]:
    """What dirl's own metadata asks for."""
    try:
        requirements = requires("dirl") or []
    except PackageNotFoundError:
        yield Finding("note", "dirl", "runs from a folder, not installed", "pip install -e . in its repository")
        return
    yield from check_packages(requirements)


def check_packages(requirements: list[str]) -> Iterator[Finding]:
    """Each base requirement against what is installed."""
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        yield check_package(requirement)


def check_package(requirement: Requirement) -> Finding:
    """Installed, and in the range dirl is tested with?"""
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding("problem", requirement.name, "not installed", f"pip install '{wanted}'")
    if not requirement.specifier.contains(Version(found), prereleases=True):
        remedy = f"outside the tested range: pip install '{wanted}'"
        return Finding("problem", requirement.name, found, remedy)
    return Finding("ok", requirement.name, found)


def _check_python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")


def _check_optional() -> Iterator[Finding]:
    for name, use in _OPTIONAL.items():
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            yield Finding("note", name, "not installed", use)


def _check_devices() -> Iterator[Finding]:
    """GPUs with their free memory, or the processor."""
    if not torch.cuda.is_available():
        built_for = torch.version.cuda or torch.version.hip
        if built_for and Path("/dev/nvidia0").exists():
            yield Finding("problem", "GPU", f"torch for CUDA {built_for} sees none", "update the driver: nvidia-smi")
        else:
            remedy = "CPU only: the embedded default runs; an 8B model needs GPUs and a CUDA build of torch"
            yield Finding("note", "GPU", f"none; torch {torch.__version__}", remedy)
        yield Finding("ok", "processor", f"{torch.get_num_threads()} threads")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        is_taken = free < total / 2
        yield Finding(
            "note" if is_taken else "ok",
            f"GPU {index}",
            found,
            "another process holds most of it: nvidia-smi" if is_taken else "",
        )


def _try(subject: str, act: Callable[[], str], remedy: str) -> Finding:
    """A check that may fail in any way a library can."""
    try:
        return Finding("ok", subject, act())
    except Exception as error:
        return Finding("note" if remedy.startswith("only") else "problem", subject, one_line(error, 160), remedy)


def _attend(name: AttentionName) -> str:
    """Forward and backward of a tiny pack."""
    device = default_device()
    model, _ = tiny()
    model.to(device)  # type: ignore[arg-type]
    scorer = PackedScorer(model, name)
    packed = placeholder_pack(model.scheme).to(device)
    rule = ScoringRule(TokenDistribution(), UnmaskingRule(), suppressed_by(model))
    scorer(packed, rule).logprob_T.sum().backward()
    return f"forward and backward on {device.type}"


def _attention_remedy(name: str) -> str:
    if name.startswith("flex") and not torch.cuda.is_available():
        return "only CUDA trains with it; model.attention=auto takes sdpa here"
    if name == "flex_flash":
        return "only where torch offers it and flash-attn's kernels are installed; model.attention=auto takes flex"
    return "reinstall torch (flex needs triton and a C compiler)"


def _lmdeploy_remedy() -> str:
    if not torch.cuda.is_available():
        return "only CUDA runs it; rollout.engine=auto takes torch here"
    return "only with pip install 'dirl[lmdeploy]' in its own environment; rollout.engine=auto takes torch until then"


def _decode(name: Literal["torch", "lmdeploy"]) -> str:
    model, tokenizer = tiny()
    device = default_device()
    model.to(device)  # type: ignore[arg-type]
    sampling = SamplingConfig(max_completion_length=8)
    engine = build_engine(model, tokenizer, EngineConfig(engine=name, cache_max_entry_count=0.1))
    (completion,) = engine.generate([render_prompt(tokenizer, "1+1=")], sampling, [0])
    return f"{len(completion.token_ids)} tokens decoded on {device.type}"


def _check_disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    if free < 5:
        remedy = "checkpoints need about 14 bytes a parameter: set output_dir to a larger disk"
        return Finding("note", "disk", f"{free:.1f} GiB free here", remedy)
    return Finding("ok", "disk", f"{free:.0f} GiB free here")
