"""Results -> results.json, report.md in the layout of the paper's Table 1, and the picture of a threshold sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from dirl.eval.benchmarks import NAMES, PAPER_TABLE
from dirl.eval.results import ModeResult

_DEFINITIONS = """\
- **accuracy**: avg@k, the share of right samples in percent, +- its standard error over problems
- **tokens/step**: all tokens up to and including EOS over all denoising forward passes
- **length**: mean tokens up to and including EOS
- **pass@k**: unbiased probability that one of k samples is right; **maj@k**: share of problems whose most frequent
  boxed answer is right (samples without an answer do not vote)
- **truncated**: samples that reached max_completion_length; **no answer**: samples without a boxed answer
"""


def write_report(directory: Path, model: str, results: Sequence[ModeResult]) -> Path:
    """Write all artefacts of an evaluation; returns the path of report.md."""
    payload = {"model": model, "results": [asdict(result) for result in results]}
    (directory / "results.json").write_text(json.dumps(payload, indent=2) + "\n", encoding="utf-8")
    sweep = [result for result in results if result.mode.startswith("dynamic@")]
    if sweep:
        plot_thresholds(results, directory / "plots" / "thresholds.png")
    report = directory / "report.md"
    report.write_text(report_text(model, results, has_sweep=bool(sweep)), encoding="utf-8")
    return report


def report_text(model: str, results: Sequence[ModeResult], *, has_sweep: bool) -> str:
    """The report as Markdown."""
    datasets = list(dict.fromkeys(result.dataset for result in results))
    modes = list(dict.fromkeys(result.mode for result in results))
    found = {(result.mode, result.dataset): result for result in results}
    rows = [[f"{model} {mode}", *[_cell(found.get((mode, dataset))) for dataset in datasets]] for mode in modes]
    if set(datasets) & set(NAMES):
        rows += [[f"{name} (paper)", *_paper_cells(cells, datasets)] for name, cells in PAPER_TABLE.items()]
    details = [_detail_row(result) for result in results]
    head = ["data set", "mode", "problems", "k", "avg@k", "maj@k", "pass@k", "length p50/p95", "truncated", "no answer"]
    parts = [
        "# Evaluation",
        "Accuracy (%) / tokens per step / output length:",
        _table(["model", *datasets], rows),
        _table([*head, "tokens/s"], details),
        _DEFINITIONS,
    ]
    if has_sweep:
        parts.append("![accuracy against tokens per step](plots/thresholds.png)")
    return "\n\n".join(parts) + "\n"


def plot_thresholds(results: Sequence[ModeResult], path: Path) -> None:
    """Accuracy against tokens per step over the confidence threshold, one line a data set."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for dataset in dict.fromkeys(result.dataset for result in results):
        mine = [r for r in results if r.dataset == dataset and (r.mode == "static" or r.mode.startswith("dynamic@"))]
        mine.sort(key=lambda result: result.tokens_per_step)
        x, y = [r.tokens_per_step for r in mine], [100 * r.avg_at_k for r in mine]
        axes.errorbar(x, y, yerr=[100 * r.standard_error for r in mine], marker="o", capsize=3, label=dataset)
        for result, where in zip(mine, zip(x, y, strict=True), strict=True):
            label = "static" if result.mode == "static" else f"{result.confidence_threshold:g}"
            axes.annotate(label, where, textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.set_xlabel("tokens per denoising step")
    axes.set_ylabel("accuracy (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _paper_cells(cells: str, datasets: Sequence[str]) -> list[str]:
    by_name = dict(zip(NAMES, cells.split(), strict=True))
    return [by_name.get(dataset, "") for dataset in datasets]


def _detail_row(result: ModeResult) -> list[str]:
    return [
        result.dataset,
        result.mode,
        str(result.num_problems),
        str(result.num_samples),
        _percent(result.avg_at_k),
        _percent(result.maj_at_k),
        " ".join(f"{k}:{_percent(value)}" for k, value in result.pass_at_k.items()),
        f"{result.output_length_p50:g}/{result.output_length_p95:g}",
        _percent(result.truncated),
        _percent(result.no_answer),
        f"{result.tokens_per_s:.0f}" if result.tokens_per_s else "-",
    ]


def _cell(result: ModeResult | None) -> str:
    if result is None:
        return ""
    accuracy = f"{100 * result.avg_at_k:.1f}+-{100 * result.standard_error:.1f}"
    return f"{accuracy}/{result.tokens_per_step:.1f}/{result.output_length_mean:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
