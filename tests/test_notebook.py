"""The notebook: paired with its script, and run from top to bottom, twice, in a real kernel."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_is_what_its_script_says() -> None:
    run = subprocess.run([sys.executable, "scripts/pair_notebook.py", "--check"], cwd=ROOT, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after its cells ran, with a last cell that looks for what they left behind."""
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient: pip install 'dirl[dev]'")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'dirl[dev]'")
    pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'dirl[dev]'")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    tail = nbformat.v4.new_code_cell(
        "import asyncio, multiprocessing\n"
        "asyncio.get_running_loop()  # a kernel runs one: nothing above minded\n"
        "print(len(multiprocessing.active_children()))"
    )
    notebook.cells.append(tail)
    notebook.metadata.kernelspec.name = "python3"
    folder = tmp_path_factory.mktemp("notebook")
    # Quiet kernels of other environments: this interpreter, this checkout.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def outputs(notebook: Any, needle: str) -> list[Any]:
    """What the first cell whose source holds `needle` left."""
    return next(cell.outputs for cell in notebook.cells if needle in cell.source and cell.cell_type == "code")


def html(notebook: Any, needle: str) -> str:
    return "".join(output.data.get("text/html", "") for output in outputs(notebook, needle) if "data" in output)


def test_every_cell_runs_and_shows_itself(executed: Any) -> None:
    assert "border-radius" in html(executed, "completions = dirl.generate") and "finish:" in html(
        executed, "dirl.generate"
    )
    assert 'sandbox="allow-scripts"' in html(executed, ".show()")
    assert any("image/png" in output.get("data", {}) for output in outputs(executed, "plot_trajectory"))
    assert "<table" in html(executed, "to_pandas")
    difference = float(outputs(executed, "dirl.logprobs(")[-1].data["text/plain"])
    assert difference < 1e-4
    sft = "".join(output.text for output in outputs(executed, "sft.step()") if "text" in output)
    assert sft.count("loss ") == 5
    assert html(executed, "dirl.plot_run").count("<img") >= 5


def test_nothing_is_left_running(executed: Any) -> None:
    assert executed.cells[-1].outputs[-1].text.strip() == "0"


def test_running_cells_again_leaks_nothing() -> None:
    """The memory and the processes of a cell that is run many times."""
    code = """
import ctypes, gc, psutil, resource, torch, dirl
def cell():
    model, tokenizer = dirl.tiny()
    config = dirl.RLConfig(output_dir="unused", max_steps=1, rollout=dirl.RolloutConfig(
        prompts_per_step=2, num_generations=2, max_completion_length=8, dynamic_sampling=False))
    trainer = dirl.RLTrainer(config, model=model, tokenizer=tokenizer)
    trainer.step()
def alive():
    gc.collect()
    # What free() left with the allocator is no leak, and is tens of MB on a busy machine.
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(open("/proc/self/statm").read().split()[1])
    tensors = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    return pages * resource.getpagesize() / 2**20, tensors
for _ in range(4):
    cell()
mb, tensors = alive()
for _ in range(10):
    cell()
mb_after, tensors_after = alive()
print(mb_after - mb, tensors_after - tensors, len(psutil.Process().children(recursive=True)))
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs /proc and glibc's malloc_trim to read what a process really holds")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    grown_mb, tensors, children = run.stdout.splitlines()[-1].split()
    assert float(grown_mb) < 60  # a model with its optimizer has 10 MB: ten leaked ones would show
    assert (tensors, children) == ("0", "0")


def test_the_notebook_holds_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(cell.get("outputs", []) == [] for cell in cells)
