"""The picture of a trajectory: what it shows, and as a file."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import dirl
from dirl.errors import UserError
from dirl.show.pictures import Pictures
from dirl.show.trajectory_picture import plot_trajectory, state_grid
from tests.show.test_completions import HAND_MADE


def test_the_picture_of_a_trajectory() -> None:
    assert state_grid(HAND_MADE) == [
        [2, 1, 0, 0, 0, 0],
        [3, 2, 0, 0, 0, 0],
        [3, 3, 2, 2, 1, 1],
        [3, 3, 3, 3, 1, 2],
        [3, 3, 3, 3, 2, 3],
    ]
    picture = plot_trajectory(HAND_MADE)._repr_png_()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5_000


def test_a_completion_without_texts_is_refused() -> None:
    bare = SimpleNamespace(**{name: value for name, value in vars(HAND_MADE).items() if name != "token_texts"})
    with pytest.raises(UserError, match=r"holds token ids only; use those of dirl\.with_texts"):
        plot_trajectory(bare)  # type: ignore[arg-type]


def test_pictures_show_in_a_notebook(tmp_path: Path) -> None:
    file = tmp_path / "new folder" / "a.png"
    plot_trajectory(HAND_MADE, file)
    assert base64.b64encode(file.read_bytes()).decode() in Pictures([file])._repr_html_()


def test_the_face_offers_pictures() -> None:
    """Pictures of a run and of a completion need no torch."""
    code = "import dirl, sys; dirl.plot_run, dirl.write_report, dirl.plot_trajectory; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"] and dirl.plot_trajectory is plot_trajectory
