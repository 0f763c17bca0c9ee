"""Videos: size, speed, colours, and how small the file is."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from marlkit.run.video import Frame, write_gif


def scene(step: int, size: int = 400, agents: int = 6) -> Frame:
    """Discs that circle on white, with lines between them, like a simulator draws its agents."""
    picture = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(picture)
    previous = None
    for agent in range(agents):
        angle = 0.1 * step + agent * math.tau / agents
        x, y = size / 2 + size / 3 * math.cos(angle), size / 2 + size / 3 * math.sin(angle * 1.3)
        draw.ellipse((x - 15, y - 15, x + 15, y + 15), fill=(40 * agent, 255 - 40 * agent, 120))
        if previous:
            draw.line((*previous, x, y), fill="black", width=2)
        previous = (x, y)
    return np.asarray(picture)


def test_size_number_of_frames_speed_and_colours_survive(tmp_path: Path) -> None:
    frames = [scene(step, size=120) for step in range(10)]
    write_gif(frames, tmp_path / "videos" / "team.gif", fps=20)
    with Image.open(tmp_path / "videos" / "team.gif") as gif:
        assert gif.format == "GIF"
        assert (gif.n_frames, gif.size) == (10, (120, 120))  # type: ignore[attr-defined]
        assert (gif.info["duration"], gif.info["loop"]) == (50, 0)
        for index, frame in enumerate(frames):
            gif.seek(index)
            error = np.abs(np.asarray(gif.convert("RGB"), dtype=int) - frame)
            assert error.mean() < 2
            assert np.quantile(error, 0.99) < 40


def test_a_long_video_of_usual_size_stays_small(tmp_path: Path) -> None:
    write_gif([scene(step) for step in range(150)], tmp_path / "team.gif", fps=25)
    assert (tmp_path / "team.gif").stat().st_size < 3_000_000


def test_large_frames_are_shrunk_in_proportion(tmp_path: Path) -> None:
    write_gif([np.zeros((300, 600, 3), np.uint8)], tmp_path / "team.gif", fps=10, longest_side=200)
    with Image.open(tmp_path / "team.gif") as gif:
        assert gif.size == (200, 100)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "at least one frame"),
        ([np.zeros((4, 4), np.uint8)], r"frame 0 must be .*got \[4, 4\] uint8"),
        ([np.zeros((4, 4, 3), np.float32)], "got .* float32"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], "differ in size"),
    ],
)
def test_invalid_frames_are_an_error(tmp_path: Path, frames: list[Frame], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_gif(frames, tmp_path / "team.gif", fps=10)
    assert not (tmp_path / "team.gif").exists()
