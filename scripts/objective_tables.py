"""Lines of the study of objectives -> Markdown tables and a picture, and how they get into a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from objective_study import SETTINGS, START, Line, chosen_rate, current

from dirl.errors import UserError
from dirl.files import write_whole
from dirl.show.pictures import STYLE, smooth

COLUMNS = (
    *("preset", "learning rate", "seeds", "accuracy (lowest to highest)", "greedy accuracy", "tokens per step"),
    *("processor seconds per step", "packed tokens per step, of dipo's"),
)
FAMILIES = {"replay": "#0072B2", "masks": "#D55E00", "other": "#009E73"}  # Okabe and Ito: told apart by everyone
BASELINE = "dipo"


def preset_table(folder: Path) -> str:
    """A row a file: what it is, what it assumes, and its values."""
    import yaml

    rows = [("preset", "what it is", "values"), ("---",) * 3]
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        said = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        sections: list[list[str]] = [[]]  # a line that begins with one word and a colon, or with Assumes, begins one
        for line in said:
            if sections[0] and re.match(r"(\w+:|Assumes) ", line):
                sections.append([])
            sections[-1].append(line)
        kept = [section for section in sections if section is sections[0] or section[0].startswith("Assumes")]
        words = " ".join(line for section in kept for line in section).replace("|", "\\|")
        values = yaml.safe_load(text)
        flat = [f"{key}: {_plain(value)}" for key, value in values.pop("objective").items()]
        flat += [f"{section}.{key}: {_plain(value)}" for section in values for key, value in values[section].items()]
        rows.append((f"`{path.stem}`", words, ", ".join(f"`{item}`" for item in flat)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace("'", "")


def arms_of(lines: Sequence[Line], setting: str) -> list[str]:
    """The arms of a setting, in the order in which they came."""
    return list(
        dict.fromkeys(line["preset"] for line in lines if line["setting"] == setting and line["preset"] != START)
    )


def final_lines(lines: Sequence[Line], setting: str, arm: str) -> list[Line]:
    """The reported runs of an arm at its chosen learning rate, by seed; those that failed are left out."""
    kind, rate = ("start", 0.0) if arm == START else ("final", chosen_rate(lines, setting, arm))
    mine = [line for line in current(lines, setting, arm) if line["kind"] == kind and line["learning_rate"] == rate]
    return sorted((line for line in mine if "error" not in line), key=lambda line: line["seed"])


def study_tables(lines: Sequence[Line]) -> str:
    """A table a setting, best accuracy first, and under it what failed."""
    return "\n\n".join(_setting_table(lines, setting) for setting in SETTINGS if arms_of(lines, setting))


def _setting_table(lines: Sequence[Line], setting: str) -> str:
    finals = {arm: final_lines(lines, setting, arm) for arm in arms_of(lines, setting)}
    ranked = sorted((arm for arm in finals if finals[arm]), key=lambda arm: -_mean(finals[arm], "accuracy"))
    baseline = _mean(finals.get(BASELINE, []), "packed_tokens_per_step")
    start = final_lines(lines, setting, START)
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    if start:
        rows.append(("before RL", "", str(len(start)), *_quality(start), "", ""))
    for arm in ranked:
        mine = finals[arm]
        relative = f"{_mean(mine, 'packed_tokens_per_step') / baseline:.2f}" if baseline else ""
        seconds = f"{_mean(mine, 'cpu_seconds_per_step'):.2f}"
        rows.append((f"`{arm}`", f"{mine[0]['learning_rate']:g}", str(len(mine)), *_quality(mine), seconds, relative))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "\n\n".join([f"### {setting}: {SETTINGS[setting].title}", table, *_failures(lines, setting)])


def _quality(lines: Sequence[Line]) -> tuple[str, str, str]:
    accuracies = [line["accuracy"] for line in lines]
    return (
        f"{fmean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f})",
        f"{_mean(lines, 'greedy_accuracy'):.3f}",
        f"{_mean(lines, 'tokens_per_step'):.2f}",
    )


def _mean(lines: Sequence[Line], name: str) -> float:
    return fmean(line[name] for line in lines) if lines else 0.0


def _failures(lines: Sequence[Line], setting: str) -> list[str]:
    failed = [line for arm in arms_of(lines, setting) for line in current(lines, setting, arm) if "error" in line]
    return [f"Failed: {_failure(line)}." for line in failed]


def _failure(line: Line) -> str:
    return f"`{line['preset']}`, seed {line['seed']}, learning rate {line['learning_rate']:g}: {line['error']}"


def places(lines: Sequence[Line]) -> str:
    """Where, when and from which commits the lines were measured."""
    names = ("hardware", "torch", "commit")
    found = sorted({", ".join(f"{name} {line[name]}" for name in names) for line in lines})
    dates = sorted({line["date"] for line in lines})
    return f"Measured on: {'; '.join(found)}; from {dates[0]} to {dates[-1]}." if lines else ""


def family(line: Line) -> str:
    """Which states an objective scores."""
    views = line["objective"].get("views", "replay")
    return views if views in FAMILIES else "other"


def draw(lines: Sequence[Line], setting: str, output: Path) -> None:
    """Reward against steps, a panel an arm: mean and range of its seeds, with the baseline's mean in grey."""
    finals = {arm: found for arm in arms_of(lines, setting) if (found := final_lines(lines, setting, arm))}
    if not finals:
        raise UserError(f"--picture: no finished run of setting {setting}")
    by_family = {name: [arm for arm in finals if family(finals[arm][0]) == name] for name in FAMILIES}
    by_family = {name: arms for name, arms in by_family.items() if arms}
    columns = min(6, max(map(len, by_family.values())))
    rows = [arms[start : start + columns] for arms in by_family.values() for start in range(0, len(arms), columns)]
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(2.3 * columns + 0.6, 1.9 * len(rows) + 0.5), layout="constrained")
        grid = figure.subplots(len(rows), columns, sharex=True, sharey=True, squeeze=False)
        for panels, arms in zip(grid, rows, strict=True):
            for panel, arm in zip(panels, arms, strict=False):
                _draw_arm(panel, arm, finals)
            for panel in panels[len(arms) :]:
                panel.set_axis_off()
            for panel in panels[: len(arms)]:
                panel.tick_params(labelbottom=True)
            panels[0].set_ylabel(family(finals[arms[0]][0]))
        figure.supxlabel("optimizer step", fontsize=9)
        words = f"{setting}: reward of the rollouts; mean and range of seeds, learning rate; in grey {BASELINE}"
        figure.suptitle(words, fontsize=10, x=0.01, ha="left")
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=110)


def draw_bias(lines: Sequence[Line], output: Path) -> None:
    """A panel a way to decode: a dot a preset at its mean cosine, and a line down to the lowest."""
    last = {(line["preset"], line["scenario"]): line for line in lines}
    scenarios = list(dict.fromkeys(scenario for _, scenario in last))
    means = {p: fmean(last[p, s]["cosine"] for s in scenarios if (p, s) in last) for p in {p for p, _ in last}}
    presets = sorted(means, key=lambda preset: (means[preset], preset))
    with matplotlib.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(1.25 * len(scenarios) + 1.4, 0.19 * len(presets) + 0.9), layout="constrained")
        for panel, scenario in zip(figure.subplots(1, len(scenarios), sharey=True), scenarios, strict=True):
            for row, preset in enumerate(presets):
                line = last.get((preset, scenario))
                if line is not None:
                    colour = FAMILIES["masks" if line["views"] == "masks" else "replay"]
                    panel.plot([line["lowest_cosine"], line["cosine"]], [row, row], color=colour, linewidth=1)
                    panel.plot([line["cosine"]], [row], "o", color=colour, markersize=4)
            panel.set_title(scenario, fontsize=8)
            panel.set_xlim(-0.1, 1.05)
            panel.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            panel.set_yticks(range(len(presets)), presets)
            panel.grid(axis="x", linewidth=0.5)
        figure.suptitle(
            "cosine to the policy gradient: mean of random models, and down to the lowest; "
            "blue: states the decoder visited, orange: random masks",
            fontsize=9,
            x=0.01,
            ha="left",
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)


def _draw_arm(panel: Axes, arm: str, finals: dict[str, list[Line]]) -> None:
    colour = FAMILIES[family(finals[arm][0])]
    if arm != BASELINE and BASELINE in finals:
        panel.plot(*_curve(finals[BASELINE], fmean), color="0.55", linewidth=1.2)
    steps, lowest = _curve(finals[arm], min)
    panel.fill_between(steps, lowest, _curve(finals[arm], max)[1], color=colour, alpha=0.25, linewidth=0)
    panel.plot(*_curve(finals[arm], fmean), color=colour, linewidth=1.8)
    panel.set_title(f"{arm}, {finals[arm][0]['learning_rate']:g}", fontsize=9)


def _curve(lines: Sequence[Line], of: Callable[[list[float]], float]) -> tuple[list[int], list[float]]:
    """Steps, and one value a step of the smoothed rewards of all seeds."""
    rewards = [smooth(line["reward"]) for line in lines]
    passes = lines[0]["steps"] // len(rewards[0])
    values = [of(list(at_step)) for at_step in zip(*rewards, strict=False)]
    return [passes * (index + 1) for index in range(len(values))], values


def between(page: str, name: str) -> str:
    """What stands between the markers of that name.

    Raises:
        UserError: the page lacks them.
    """
    return _marked(page, name)[2].strip("\n")


def write_between(path: Path, name: str, text: str) -> None:
    """Put a text between the markers of a page, in place of what stands there."""
    page = path.read_text(encoding="utf-8")
    match = _marked(page, name)
    write_whole(path, page[: match.start(2)] + (f"\n{text}\n\n" if text else "") + page[match.end(2) :])


def _marked(page: str, name: str) -> re.Match[str]:
    match = re.search(rf"(<!-- begin {name} -->\n)(.*?)(<!-- end {name} -->)", page, re.DOTALL)
    if match is None:
        raise UserError(f"the page has no <!-- begin {name} --> and <!-- end {name} -->")
    return match
