"""Pictures that are drawn once, for tests that look at none: drawing is most of a tiny run's seconds."""

from __future__ import annotations

from collections.abc import Callable

from dirl.show.pictures import ShownFigure

_draw = ShownFigure._repr_png_
_drawn: dict[str, bytes] = {}


def draw_once() -> Callable[[], None]:
    """From now on one picture of a title is drawn, and written as often as ever, by this process and its forks.

    Returns:
        What ends that.
    """

    def kept(figure: ShownFigure) -> bytes:
        title = figure.axes[0].get_title(loc="left")
        if title not in _drawn:
            _drawn[title] = _draw(figure)
        return _drawn[title]

    ShownFigure._repr_png_ = kept  # type: ignore[method-assign]

    def end() -> None:
        ShownFigure._repr_png_ = _draw  # type: ignore[method-assign]

    return end
