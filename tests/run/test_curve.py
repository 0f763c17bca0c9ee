"""Learning curves: the lines and panels drawn from given numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from marlkit.errors import RunError
from marlkit.run.curve import draw_curve


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, in order."""
    figures: list[Figure] = []
    genuine = Figure.savefig

    def save(figure: Figure, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        genuine(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


RUN = """iteration,frames,episode/return,evaluation/return,critic/loss,actor/entropy,critic/explained_variance
0,100,-1.0,,0.5,1.2,0.0
1,200,0.5,2.0,0.4,1.1,0.3
2,300,1.5,,0.3,1.0,0.6
3,400,2.5,3.0,0.2,0.9,0.9
"""


def test_a_run_shows_its_returns_and_one_small_panel_per_quantity(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curve(csv(tmp_path / "metrics.csv", RUN), tmp_path / "figures" / "curve.png", "mappo on balance")
    main, *small = drawn[0].axes
    assert main.get_title(loc="left") == "mappo on balance"
    assert [np.asarray(line.get_xydata()).tolist() for line in main.lines] == [
        [[100, -1], [200, 0.5], [300, 1.5], [400, 2.5]],
        [[200, 2], [400, 3]],
    ]
    assert [axes.get_title(loc="left") for axes in small] == ["critic/loss", "actor/entropy", "critic/explained_variance"]
    with Image.open(tmp_path / "figures" / "curve.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 1200


def test_a_run_without_losses_or_finished_episodes_is_still_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curve(csv(tmp_path / "metrics.csv", "iteration,frames\n0,100\n"), tmp_path / "curve.png", "short")
    assert len(drawn[0].axes) == 1


def test_without_frames_there_is_nothing_to_draw_against(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no column `frames`"):
        draw_curve(csv(tmp_path / "metrics.csv", "iteration,loss\n0,1\n"), tmp_path / "curve.png", "")
