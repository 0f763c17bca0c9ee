"""Questions that a simulator asks of all environments at once, and whose answer changes no result.

VMAS computes the forces of a pair of bodies only if the pair is in reach of one another in at least one environment of the
batch. That saves work; in an environment where the pair is out of reach the forces are zero either way. And it asserts on
tensors, as the Python option `-O` would not. Where operations are recorded, both are answered with yes: each pair is computed
at each replay, and assertions are checked while recording is tried out and not afterwards.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vmas.simulator.core import World

from marlkit.tape import calling_frame


class SettledQuestions(TorchDispatchMode):
    """Answers with yes whether a pair is in reach, and whether an assertion holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool and _is_settled(calling_frame()):
            return True
        return func(*args, **(kwargs or {}))


def _is_settled(frame: FrameType) -> bool:
    return frame.f_code is World.collides.__code__ or frame.f_lineno in _asserting_lines(frame.f_code.co_filename)


@cache
def _asserting_lines(path: str) -> frozenset[int]:
    """The lines of a file that belong to an `assert` statement."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return frozenset()
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    return frozenset(line for node in statements for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))
