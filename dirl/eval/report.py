"""Results -> results.json and report.md in the layout of the paper's Table 1; two evaluations -> their comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from dirl.errors import MissingFileError, UserError
from dirl.eval.accuracy_picture import plot_accuracy, sweep_points, throughput_points
from dirl.eval.benchmarks import NAMES, PAPER_TABLE
from dirl.eval.estimates import Difference, paired_bootstrap
from dirl.eval.results import ModeResult
from dirl.eval.sample_store import SAMPLES, read_header, read_samples
from dirl.eval.scores import problem_means
from dirl.files import write_json, write_whole

_DEFINITIONS = """\
- **accuracy**: avg@k, the mean over problems of the share of right samples, in percent, by the rule of each data set; a
  program is right when it passes all tests of its problem (pass@1), a text when it follows all instructions strictly
- **±**: standard error of avg@k over problems (what other problems of the kind would change), then over sampling (what
  other random numbers would change on these problems; 0 where k is 1)
- **tokens per step**: all tokens up to and including EOS over all denoising forward passes; **mean of ratios**: tokens
  over passes of each sample, averaged
- **length**: tokens up to and including EOS
- **pass@k**: unbiased probability that one of k samples is right; **maj@k**: share of problems whose most frequent
  answer is right (compared as text; samples without one do not vote; of equally frequent ones the first counts)
- **truncated**: samples that reached max_completion_length; **no answer**: samples without what the rule takes for one:
  a box, a letter, a code block, any text
- **tokens/s**: tokens up to and including EOS, of all processes together, over seconds of decoding, grading not
  included; other work on the machine and the number of problems decoded at once change it"""
_DETAILS = (
    *("data set", "mode", "problems", "k", "avg@k", "maj@k", "pass@k", "tokens per step, mean of ratios"),
    *("length p50/p95", "truncated %", "no answer %", "tokens/s"),
)


def write_report(directory: Path, model: str, results: Sequence[ModeResult], run_json: Path) -> Path:
    """Write all artefacts of an evaluation; returns the path of report.md.

    Args:
        run_json: where the run was recorded; its configuration, versions, commit and hardware go into results.json.
    """
    run = json.loads(run_json.read_text(encoding="utf-8"))
    record = {key: run[key] for key in ("config", "versions", "git_commit", "git_dirty", "hardware")}
    payload = {"model": model, **record, "results": [asdict(result) for result in results]}
    write_json(directory / "results.json", payload)
    pictures = {}
    if any(result.tokens_per_s > 0 for result in results):
        pictures["plots/throughput.png"] = "accuracy against throughput"
        plot_accuracy(results, directory / "plots/throughput.png", throughput_points, "tokens per second of decoding")
    if any(result.mode.startswith("dynamic@") for result in results):
        pictures["plots/thresholds.png"] = "accuracy against tokens per step"
        plot_accuracy(results, directory / "plots/thresholds.png", sweep_points, "tokens per denoising step")
    return write_whole(directory / "report.md", report_text(model, results, run=run, pictures=pictures))


def report_text(
    model: str, results: Sequence[ModeResult], *, run: Mapping[str, Any], pictures: Mapping[str, str]
) -> str:
    """The report as Markdown.

    Args:
        run: content of run.json.
        pictures: path, relative to the report, and caption of each.
    """
    datasets = list(dict.fromkeys(result.dataset for result in results))
    modes = list(dict.fromkeys(result.mode for result in results))
    found = {(result.mode, result.dataset): result for result in results}
    rows = [_row(f"{model} {mode}", [_cell(found.get((mode, dataset))) for dataset in datasets]) for mode in modes]
    if set(datasets) & set(NAMES):
        rows += [_row(f"{name} (paper)", _paper_cells(cells, datasets)) for name, cells in PAPER_TABLE.items()]
    sections = [
        "# Evaluation",
        "Accuracy (%) / tokens per step / output length, and the mean accuracy over the data sets:",
        _table(["model", *datasets, "average"], rows),
        *_rules(results),
        _table(_DETAILS, [_detail_row(result) for result in results]),
        *_parts(results),
        _DEFINITIONS,
        _provenance(run),
        *(f"![{caption}]({path})" for path, caption in pictures.items()),
    ]
    return "\n\n".join(sections) + "\n"


def _rules(results: Sequence[ModeResult]) -> list[str]:
    """How each data set was judged."""
    rules = {result.dataset: result.rule for result in results if result.rule}
    return ["Judged by: " + "; ".join(f"{dataset}: {rule}" for dataset, rule in rules.items()) + "."] if rules else []


def _parts(results: Sequence[ModeResult]) -> list[str]:
    """Categories of problems and kinds of judgement, where there are any."""
    rows = []
    for result in results:
        found = [(name, str(count), share) for name, (count, share) in result.by_category.items()]
        found += [(name, "", share) for name, share in result.marks.items()]
        rows += [[result.dataset, result.mode, name, count, _percent(share)] for name, count, share in found]
    return [_table(["data set", "mode", "of", "problems", "accuracy"], rows)] if rows else []


def _provenance(run: Mapping[str, Any]) -> str:
    """One line: which code, on what, and whether it decoded exactly."""
    commit = run["git_commit"] or f"dirl {run['versions']['dirl']}, no git checkout"
    changed = " with uncommitted changes" if run["git_dirty"] else ""
    hardware = run["hardware"]
    machine = ", ".join(hardware["gpus"]) or f"{hardware['cpu_cores']} CPU cores ({hardware['machine']})"
    cache = run["config"]["engine"]["approximate_cache"]
    decoded = "" if cache == "none" else f" Decoded over an approximate cache (engine.approximate_cache={cache})."
    return f"Commit {commit}{changed}; PyTorch {run['versions']['torch']} on {machine}.{decoded}"


@dataclass(frozen=True)
class Comparison:
    """Run b against run a on one data set in one mode; accuracies in [0, 1]."""

    dataset: str
    mode: str
    num_problems: int
    accuracy_a: float
    accuracy_b: float
    difference: Difference


def compare_runs(a: Path, b: Path) -> list[Comparison]:
    """Every data set and mode that two output directories share, problem by problem.

    Raises:
        MissingFileError: one of them is no output directory of an evaluation.
        ValueError: they share none, or one data set with other problems.
    """
    for directory in (a, b):
        if not (directory / SAMPLES).is_file():
            raise MissingFileError(f"{directory} holds no {SAMPLES}; give the output_dir of an evaluation")
    samples_a, samples_b = read_samples(a / SAMPLES), read_samples(b / SAMPLES)
    header_a, header_b = read_header(a), read_header(b)
    shared = [key for key in samples_a if key in samples_b]
    if not shared:
        raise UserError(f"{a} and {b} share no data set and mode: nothing to compare")
    comparisons = []
    for dataset, mode in shared:
        means_a, means_b = (problem_means(of[dataset, mode].values()) for of in (samples_a, samples_b))
        digest = f"problems.{dataset}"
        if means_a.keys() != means_b.keys() or header_a.get(digest) != header_b.get(digest):
            raise UserError(f"{a} and {b} hold other problems of {dataset}; evaluate both on the same, to the end")
        values_a, values_b = ([means[problem] for problem in sorted(means)] for means in (means_a, means_b))
        difference = paired_bootstrap(values_a, values_b)
        centres = fmean(values_a), fmean(values_b)
        comparisons.append(Comparison(dataset, mode, len(values_a), *centres, difference))
    return comparisons


def comparison_text(directories: Sequence[str]) -> str:
    """`compare_runs` of two directories as a Markdown table for people. Raises: UserError where they are not two."""
    if len(directories) != 2:
        raise UserError(f"dirl report compare {' '.join(directories)}: expected the directories of two evaluations")
    a, b = map(Path, directories)
    rows = [
        [
            comparison.dataset,
            comparison.mode,
            str(comparison.num_problems),
            _percent(comparison.accuracy_a),
            _percent(comparison.accuracy_b),
            f"{100 * comparison.difference.mean:+.1f}",
            f"{100 * comparison.difference.low:+.1f} to {100 * comparison.difference.high:+.1f}",
            f"{comparison.difference.p_value:.4f}",
            "yes" if comparison.difference.is_significant else "no",
        ]
        for comparison in compare_runs(a, b)
    ]
    head = ["data set", "mode", "problems", "A", "B", "B - A", "95 % interval", "p", "differ"]
    return (
        f"A: {a}\nB: {b}\n\n{_table(head, rows)}\n\n"
        "Accuracies (avg@k) in percent; interval and p from a paired bootstrap over problems (10,000 resamples)."
    )


def _paper_cells(cells: str, datasets: Sequence[str]) -> list[str]:
    by_name = dict(zip(NAMES, cells.split(), strict=True))
    return [by_name.get(dataset, "") for dataset in datasets]


def _row(name: str, cells: Sequence[str]) -> list[str]:
    """The cells and, where none is missing, their mean accuracy."""
    average = "" if "" in cells else f"{fmean(float(cell.split('/')[0]) for cell in cells):.1f}"
    return [name, *cells, average]


def _detail_row(result: ModeResult) -> list[str]:
    errors = f"{_percent(result.standard_error)} ± {_percent(result.standard_error_sampling)}"
    return [
        result.dataset,
        result.mode,
        str(result.num_problems),
        str(result.num_samples),
        f"{_percent(result.avg_at_k)} ± {errors}",
        _percent(result.maj_at_k),
        ", ".join(f"{k}: {_percent(value)}" for k, value in result.pass_at_k.items()),
        f"{result.tokens_per_step:.2f}, {result.tokens_per_step_mean:.2f}",
        f"{result.output_length_p50:g}/{result.output_length_p95:g}",
        _percent(result.truncated),
        _percent(result.no_answer),
        f"{result.tokens_per_s:.0f}",
    ]


def _cell(result: ModeResult | None) -> str:
    if result is None:
        return ""
    return f"{_percent(result.avg_at_k)}/{result.tokens_per_step:.1f}/{result.output_length_mean:.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
