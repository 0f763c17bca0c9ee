"""Comparing runs by the statistics and the reporting protocol of the field."""

from __future__ import annotations

from marlkit.comparison.comparing import Comparison, compare

__all__ = ["Comparison", "compare"]
