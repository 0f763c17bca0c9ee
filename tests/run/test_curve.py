"""Learning curves: the lines and panels drawn from given numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from marlkit.errors import RunError
from marlkit.run.curve import align, draw_comparison, draw_curve


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


def test_a_comparison_shows_the_interquartile_mean_within_its_band(tmp_path: Path, drawn: list[Figure]) -> None:
    returns = [(0.0, 4.0), (1.0, 5.0), (2.0, 6.0), (3.0, 7.0), (100.0, -50.0)]
    files = [
        csv(tmp_path / f"{k}.csv", f"iteration,frames,evaluation/return\n0,100,{a}\n1,150,\n2,200,{b}\n")
        for k, (a, b) in enumerate(returns)
    ]
    draw_comparison({"mappo": files, "ippo": files[:1]}, tmp_path / "comparison.png")
    (axes,) = drawn[0].axes
    assert [line.get_label() for line in axes.lines] == ["mappo", "ippo"]
    # Without the lowest and the highest of five: (1 + 2 + 3) / 3 and (4 + 5 + 6) / 3.
    assert np.asarray(axes.lines[0].get_xydata()).tolist() == [[100, 2], [200, 5]]
    band = axes.collections[0]
    assert isinstance(band, PolyCollection)
    corners = np.asarray(band.get_paths()[0].vertices)
    at_start = corners[corners[:, 0] == 100, 1]
    assert at_start.min() < 2 < at_start.max()


def test_curves_of_unequal_length_are_compared_where_all_of_them_reach() -> None:
    first = (np.array([0.0, 10.0, 20.0, 30.0]), np.array([0.0, 1.0, 2.0, 3.0]))
    second = (np.array([5.0, 25.0]), np.array([10.0, 30.0]))
    frames, values = align([first, second])
    assert frames.tolist() == [10, 20]
    assert values.tolist() == [[1, 2], [15, 25]]


def test_a_comparison_names_the_file_that_lacks_the_quantity(tmp_path: Path) -> None:
    file = csv(tmp_path / "metrics.csv", "iteration,frames,evaluation/return\n0,100,\n")
    with pytest.raises(RunError, match=r"metrics\.csv: has no values of evaluation/return"):
        draw_comparison({"mappo": [file]}, tmp_path / "comparison.png")
