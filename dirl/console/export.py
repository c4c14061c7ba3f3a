"""`dirl export`: a checkpoint of any backend -> a Hugging Face directory, or its LoRA adapters in peft's form."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dirl.errors import UserError
from dirl.files import whole_folder, write_json
from dirl.model.checkpoint import ModelConfig, load_model, save_model
from dirl.model.lora import LoraConfig, save_adapters
from dirl.model.model_path import ModelFiles, find_model, tokenizer_of
from dirl.training.run_state import checkpoint_step

_RECORD = "export.json"  # by which a directory is known as an export


def export(path: str, output: str | Path, *, adapter: bool = False) -> str:
    """Write the directory, complete or not at all; what stood there is replaced if it is an export. In words: of what.

    Args:
        path: a run, RUN@STEP, RUN@best or the directory of a checkpoint.
        adapter: write the adapters alone.
    Raises:
        UserError: there is no such checkpoint, it has no adapters, or something else stands at `output`.
    """
    files, target = find_model(path), Path(output)
    if files.directory == path:
        raise UserError(f"{path} is no run and no checkpoint; a Hugging Face directory or hub id needs no export")
    if target.exists() and not (target / _RECORD).is_file():
        raise UserError(f"{output} is there and is no export; name a new directory")
    of_what = f"step {checkpoint_step(files.checkpoint)}" if files.checkpoint else "final"
    write = (_adapters if adapter else _model)(files, path)
    with whole_folder(target, "make room") as temporary:
        write(temporary)
        write_json(temporary / _RECORD, {"model": path, "of": of_what})
    return of_what


def _model(files: ModelFiles, path: str) -> Callable[[Path], object]:
    """What writes it, in the precision of training, as the run itself writes `final/`."""
    if files.checkpoint is None:
        return partial(shutil.copytree, files.directory)
    tokenizer = tokenizer_of(path)
    model = load_model(ModelConfig(path=path, dtype=files.settings["model"]["dtype"]), tokenizer)
    return partial(save_model, model, tokenizer)


def _adapters(files: ModelFiles, path: str) -> Callable[[Path], object]:
    """What writes them."""
    kept = Path(files.directory, "adapter")
    if files.checkpoint is None and kept.is_dir():
        return partial(shutil.copytree, kept)
    state = files.read_state() if files.checkpoint else {}
    adapters = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    if not adapters:
        raise UserError(f"{path} was trained without LoRA and has no adapters; export it without --adapter")
    return partial(save_adapters, adapters, LoraConfig(**files.settings["lora"]), files.directory)
