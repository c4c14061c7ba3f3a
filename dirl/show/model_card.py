"""A finished run -> the README.md of its model, and the model on the Hub.

Neither ends a run: by then the model lies on disk. A README that does not bear our mark is somebody's own and stays.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from dirl.errors import one_line, visible
from dirl.files import is_hub_id, write_whole
from dirl.show.metric import MetricTable
from dirl.show.metric_table import TABLE, read_metrics

logger = logging.getLogger(__name__)

Stage = Literal["sft", "rl"]
MARK = "<!-- written by dirl; without this line dirl leaves the file alone -->"
_TITLES: dict[Stage, str] = {
    "sft": "supervised fine-tuning with random masking",
    "rl": "reinforcement learning with DiPO",
}
_KEYS = (
    *("max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "seed", "global_batch_size"),
    *("num_iterations", "steps_per_generation"),
)
_SECTIONS = ("objective", "noise", "rollout", "reward")


def finish_model(final: Path, output_dir: Path, stage: Stage, tags: Sequence[str], push_to_hub: str) -> None:
    """Write the card of a saved model and push it where that is asked for; what goes wrong is a warning.

    Args:
        tags: how the model diffuses, and its family.
    """
    try:
        write_model_card(final, output_dir, stage, tags)
    except Exception as error:
        logger.warning("no model card was written; the model is complete: %s", one_line(error))
    if push_to_hub:
        push_model(final, push_to_hub)


def write_model_card(
    final: Path, output_dir: Path, stage: Stage, tags: Sequence[str], table: MetricTable = TABLE
) -> Path | None:
    """README.md of the model in `final`; None where one is that dirl did not write."""
    path = final / "README.md"
    if path.is_file() and MARK not in path.read_text(encoding="utf-8"):
        logger.warning("%s is not dirl's and stays as it is; delete it to get a model card", path)
        return None
    record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
    source = output_dir / "metrics.jsonl"
    rows = read_metrics(source) if source.is_file() else []
    return write_whole(path, card_text(record, rows, stage, tags, table))


def card_text(
    record: Mapping[str, Any], rows: list[dict[str, Any]], stage: Stage, tags: Sequence[str], table: MetricTable = TABLE
) -> str:
    """The card as Markdown with the Hub's front matter."""
    config = record["config"]
    steps = rows[-1]["step"] if rows else 0
    name = config.get("run_name") or Path(config["output_dir"]).name
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(config, [*tags, stage]), sort_keys=False)}---\n{MARK}",
        f"# {_inline(name)}",
        f"A {tags[0]} language model after {_TITLES[stage]}, {steps} optimizer steps, trained with dirl.",
        _list("Trained from and on", _origins(config)),
        _table("Last numbers of the training run", _last_numbers(rows, table)),
        _table("Settings", _settings(config)),
        _list("Environment", _environment(record)),
        "## Use\n\n```python\nimport dirl\n\nmodel, tokenizer = dirl.load(PATH)\n"
        'dirl.generate(model, tokenizer, ["..."], max_completion_length=1024)\n```',
        "These numbers are those of training; they were measured with the settings of the run, on its own data.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def push_model(final: Path, repository: str) -> bool:
    """Upload a model to the Hub, privately where the repository is new; whether that succeeded."""
    try:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(final))
    # Network, login, quota, names: whatever the Hub has against it, the trained model is on disk.
    except Exception as error:
        logger.warning("the model was not pushed to %s and lies in %s: %s", repository, final, one_line(error))
        return False
    logger.info("pushed to https://huggingface.co/%s", repository)
    return True


def _front_matter(config: Mapping[str, Any], tags: Sequence[str]) -> dict[str, Any]:
    """What the Hub reads; it knows hub ids only, so local paths are not named here."""
    matter: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    matter["tags"] = ["dirl", *tags]
    if is_hub_id(base := str(config.get("model", {}).get("path", ""))):
        matter["base_model"] = base
    names = [re.split("[:@]", path)[0] for path in _data_paths(config)]  # what follows is a subset or a revision
    if data := [name for name in dict.fromkeys(names) if is_hub_id(name)]:
        matter["datasets"] = data
    return matter


def _data_paths(config: Mapping[str, Any]) -> list[str]:
    data = config.get("data", {})
    return [str(source["path"]) for source in data.get("sources") or [data] if source.get("path")]


def _origins(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "model", config.get("model", {}).get("path")
    yield "data", ", ".join(_data_paths(config)) or None
    if "reward" in config:
        yield "rewards", " ".join(config["reward"]["functions"])


def _last_numbers(rows: list[dict[str, Any]], table: MetricTable) -> Iterator[tuple[str, object]]:
    for name in (metric.name for metric in table.headlines()):
        known = next((row for row in reversed(rows) if row.get(name) is not None), None)
        if known is not None:
            yield name, f"{known[name]:.4g} (step {known['step']})"


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield from ((key, config[key]) for key in _KEYS if key in config)
    for section in _SECTIONS:
        yield from ((f"{section}.{key}", value) for key, value in config.get(section, {}).items())


def _environment(record: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "date", record["date"]
    dirty = " with changes" if record.get("git_dirty") else ""
    yield "commit", f"{record.get('git_commit') or 'unknown'}{dirty}"
    yield from record["versions"].items()
    yield "GPUs", ", ".join(record["hardware"]["gpus"]) or "none"


def _list(title: str, rows: Iterator[tuple[str, object]]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {name}: `{_inline(value)}`" for name, value in rows)


def _table(title: str, rows: Iterator[tuple[str, object]]) -> str:
    lines = [f"| `{name}` | {_inline(value)} |" for name, value in rows]
    return f"## {title}\n\n| | |\n|---|---|\n" + "\n".join(lines) if lines else ""


def _inline(value: object) -> str:
    """Text that cannot leave its cell, nor command a terminal."""
    return visible(" ".join(str(value).split())).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
