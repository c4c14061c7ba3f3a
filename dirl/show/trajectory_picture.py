"""A completion -> a picture of when each position was revealed."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.colors import ListedColormap

from dirl.errors import UserError
from dirl.show.completions import ReadableRow, blocks
from dirl.show.pictures import STYLE, ShownFigure

_STATES = ("not begun", "masked", "revealed in this step", "revealed before")
_COLORS = ("#f4f5f6", "#c3c9d0", "#2c9a55", "#b9d6c3")


def state_grid(completion: ReadableRow) -> list[list[int]]:
    """One row a denoising step (of all blocks in a row), one column a token; an entry is an index of _STATES."""
    grid: list[list[int]] = []
    for members in blocks(completion):
        steps = {index: completion.step_map[index] for index in members}
        for step in range(1, max(steps.values()) + 1):
            row = [3] * members.start + [0] * (len(completion.token_ids) - members.start)
            for index, revealed in steps.items():
                row[index] = 1 if revealed > step else 2 if revealed == step else 3
            grid.append(row)
    return grid


def plot_trajectory(completion: ReadableRow, path: str | Path | None = None) -> ShownFigure:
    """Position by step: which tokens were masked, revealed and committed in each denoising step.

    Args:
        path: also written there, as PNG.
    Raises:
        UserError: a completion of an engine, which does not know its texts and blocks.
    """
    if not isinstance(completion, ReadableRow):
        raise UserError(
            "plot_trajectory: this completion holds token ids only; "
            "use those of dirl.with_texts(completions, tokenizer, model.scheme)"
        )
    grid = state_grid(completion)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        width = min(14.0, 3 + 0.14 * len(grid[0]))
        figure = ShownFigure(figsize=(width, min(9.0, 2 + 0.14 * len(grid))), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.imshow(grid, cmap=ListedColormap(_COLORS), vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
        for members in blocks(completion):
            axes.axvline(members.stop - 0.5, color="white", linewidth=1)
        axes.set(title="Trajectory", xlabel="token of the completion", ylabel="denoising step")
        if len(completion.token_ids) <= 64:
            # A dollar sign would start mathematics, and a line break a second line.
            labels = [text.replace("$", r"\$").replace("\n", "\\n") for text in completion.token_texts]
            axes.set_xticks(range(len(labels)), labels, fontsize=7, rotation=90, family="monospace")
        handles = [matplotlib.patches.Patch(color=color) for color in _COLORS]
        figure.legend(handles, _STATES, loc="outside lower center", ncols=4, fontsize=8)
        if path is not None:
            figure.write(path)
    return figure
