"""Tests of all environments at once that decide branches in VMAS, replaced by tensors.

Whether two bodies are in reach of each other decides in Python: their forces are computed if they are in at least one
environment of the batch. While :class:`BranchFree` is active, every pair is computed, and the answer is applied to the
result: the forces of a pair that was in reach nowhere are zero, exactly as if they had been left out. (Between two spheres they
are zero anyway, because reach and contact are the same distance.)

A scenario that tests by itself (``if self.world.collides(a, b):``) is followed if only ``tensor[mask] += …`` depends on it:
what is written is then written where the answer is yes. Assertions on tensors are taken to hold, as Python's option `-O` does;
they are checked wherever steps are not replayed.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vmas.simulator.core import Entity, Sphere, World

from marlkit.recorder.tape import NotRecordable, calling_frame, source_line


class _Branch(NamedTuple):
    """Lines of a scenario that run where the answer is yes."""

    code: CodeType
    lines: range
    answer: Tensor


class BranchFree(TorchDispatchMode):
    """Answers questions about pairs, and whether an assertion holds, with yes, and sees to it that it makes no difference.

    Args:
        world: whose tests of pairs are replaced.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._pairs: dict[tuple[int, int], Tensor] = {}
        self._in_joint = False
        self._tested: list[Tensor] = []
        self._asking = False
        self._branch: _Branch | None = None

    def __enter__(self) -> BranchFree:
        super().__enter__()
        own = {"collides": self._collides, "update_env_forces": self._add_forces, "_vectorized_joint_constraints": self._join}
        vars(self._world).update(own)
        return self

    def __exit__(self, *error: Any) -> None:
        for name in ("collides", "update_env_forces", "_vectorized_joint_constraints"):
            del vars(self._world)[name]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            if self._asking:
                self._tested.append(args[0])
                return True
            frame = calling_frame()
            if frame.f_lineno in _lines(frame.f_code.co_filename).asserting:
                return True
        elif self._branch is not None and func._schema.is_mutable:
            return self._written_in_branch(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    # --- pairs ---------------------------------------------------------------------------------------------------------------

    def _collides(self, a: Entity, b: Entity) -> bool:
        caller = sys._getframe(1)
        self._asking = True
        possible = World.collides(self._world, a, b)
        self._asking = False
        self._branch = None
        if not self._tested:
            return bool(possible)
        answer = self._tested.pop()
        if caller.f_globals.get("__name__") == World.__module__:
            self._pairs[id(a), id(b)] = self._pairs[id(b), id(a)] = answer
        else:
            self._branch = _branch(caller, answer)
        return True

    def _add_forces(self, a: Entity, f_a: Any, t_a: Any, b: Entity, f_b: Any, t_b: Any) -> None:
        spheres = isinstance(a.shape, Sphere) and isinstance(b.shape, Sphere)
        answer = self._pairs.get((id(a), id(b)))
        if answer is not None and not spheres and not self._in_joint:
            f_a, t_a, f_b, t_b = (torch.where(answer, x, 0.0) if isinstance(x, Tensor) else x for x in (f_a, t_a, f_b, t_b))
        World.update_env_forces(self._world, a, f_a, t_a, b, f_b, t_b)

    def _join(self, joints: Any) -> None:
        self._in_joint = True
        World._vectorized_joint_constraints(self._world, joints)
        self._in_joint = False

    # --- branches ------------------------------------------------------------------------------------------------------------

    def _written_in_branch(self, func: Any, args: Any, kwargs: Any) -> Any:
        frame, branch = calling_frame(), self._branch
        if branch is None or frame.f_code is not branch.code or frame.f_lineno not in branch.lines:
            return func(*args, **kwargs)
        target = args[0]
        before = target.clone()
        func(*args, **kwargs)
        return target.copy_(torch.where(branch.answer, target, before))


# --- what the source says ----------------------------------------------------------------------------------------------------


class _Lines(NamedTuple):
    asserting: frozenset[int]
    branches: dict[int, range]


@cache
def _lines(path: str) -> _Lines:
    """The lines of a file that belong to an `assert`; and of each `if` that only changes selected rows, the lines below it."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return _Lines(frozenset(), {})
    nodes = list(ast.walk(tree))
    asserting = {line for node in nodes if isinstance(node, ast.Assert) for line in _span(node)}
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    conditions = [(node, function) for function in functions for node in ast.walk(function) if isinstance(node, ast.If)]
    branches = {
        node.test.lineno: range(node.body[0].lineno, _span(node.body[-1]).stop)
        for node, function in conditions
        if _changes_rows_only(node, function)
    }
    return _Lines(frozenset(asserting), branches)


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _changes_rows_only(condition: ast.If, function: ast.FunctionDef) -> bool:
    """Whether an `if` consists of ``x[…] += …`` and of names that are used in it alone."""
    inside = {id(node) for statement in condition.body for node in ast.walk(statement)}
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and id(node) not in inside}
    return not condition.orelse and all(_changes_rows(statement, used) for statement in condition.body)


def _changes_rows(statement: ast.stmt, used: set[str]) -> bool:
    if isinstance(statement, ast.If):
        return all(_changes_rows(part, used) for part in [*statement.body, *statement.orelse])
    if isinstance(statement, ast.Assign):
        return all(isinstance(target, ast.Name) and target.id not in used for target in statement.targets)
    return isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Subscript)


def _branch(frame: FrameType, answer: Tensor) -> _Branch:
    lines = _lines(frame.f_code.co_filename).branches.get(frame.f_lineno)
    if lines is None:
        raise NotRecordable(f"what it does depends on whether a pair is in reach somewhere, at {source_line()}")
    return _Branch(frame.f_code, lines, answer)
