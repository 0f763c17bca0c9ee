"""Options that make scenarios of VMAS small."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "sampling": {"grid_spacing": 0.25},
    "road_traffic": {"n_agents": 3},
    "debug/pollock": {"n_agents": 2, "n_boxes": 1, "n_lines": 1},
    "debug/waterfall": {"n_agents": 2},
    "passage": {"n_passages": 3},
}
"""Smaller maps and grids, and fewer bodies, for speed: the code that runs is the same."""
