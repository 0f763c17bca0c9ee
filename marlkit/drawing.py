"""Pictures of simulated worlds."""

from __future__ import annotations

from typing import Any


class Camera:
    """Placeholder."""


def draw_world(scenario: Any, index: int, camera: Camera) -> Any:
    """Placeholder."""
