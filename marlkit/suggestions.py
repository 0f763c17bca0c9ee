"""What somebody may have meant by a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence with the nearest of the known names, with a leading space; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean `{near[0]}`?" if near else ""
