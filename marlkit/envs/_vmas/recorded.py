"""Steps of a simulation replayed as recorded operations (:mod:`marlkit.recorder.recording`).

A step of VMAS leaves new tensors in the attributes of its objects. What is recorded is a step followed by copying them back to
where the old ones were, their *homes*, so that the next replay finds the state where this one left it. Between two
steps, a reset, a checkpoint or a drawing finds the homes in their places.

Before each replay all containers are looked at. Where something else stands than what was left there - a reset or a restored
checkpoint puts new tensors into places, a user changes a difficulty - the state is moved into the homes, if it is of the kind
recorded: the same places, shapes, sharing of memory, and values in Python. A state of a kind that steps lead away from (the first
one after a reset, in some scenarios) is stepped without recording; one of a new kind that lasts is recorded as well.

A recorded step computes the forces of every pair of bodies (:mod:`marlkit.envs._vmas.branch_free`). That changes no result but
for rounding: torch may round the last bit differently where more pairs stand in one tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from marlkit import rng
from marlkit.envs._vmas.branch_free import BranchFree
from marlkit.envs._vmas.simulation import Simulation
from marlkit.envs._vmas.world_graph import Slot, Survey, survey
from marlkit.envs._vmas.world_state import copied
from marlkit.options import ReplayMode
from marlkit.recorder.masked_rows import MaskedSelection
from marlkit.recorder.recording import Graph, preserved, record
from marlkit.recorder.tape import NotRecordable

Step = tuple[Tensor, Tensor, Tensor]
_Outcome = list[tuple[str, Tensor]]

RECORDINGS = 4
"""How many kinds of states are recorded."""

PASSING = 3
"""After how many kinds of states in a row that steps lead away from it is given up to wait for one that lasts."""


class PassingKind(NotRecordable):
    """A step leads to a state of another kind."""


class OtherConstant(Exception):
    """What was taken for a constant is none.

    Args:
        name: its place.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class RecordedSimulation:
    """Takes the steps of a simulation, recorded where that can be done.

    Args:
        simulation: whose steps are recorded; everything else is read from it directly.
        name: what to call the scenario in a warning.
        mode: ``record`` replays operations, ``graph`` replays them as one CUDA graph.

    Attributes:
        reason: why steps are not recorded; empty as long as they are. One warning says it.
        replays: how many steps were replayed.
    """

    def __init__(self, simulation: Simulation, name: str, mode: ReplayMode) -> None:
        self.simulation = simulation
        self.name = name
        self.mode = mode
        self.reason = ""
        self.replays = 0
        self._recordings: dict[Any, RecordedStep] = {}
        self._passing: set[Any] = set()
        self._in_a_row = 0
        self._varying: set[str] = set()
        self._current: RecordedStep | None = None

    def advance(self, action: Tensor) -> Step:
        """One step with actions ``[B, N]`` or ``[B, N, D]``, as :meth:`Simulation.advance`."""
        if self.reason or (torch.is_grad_enabled() and action.requires_grad):
            return self.simulation.advance(action)
        with torch.no_grad():
            if self._current is None or not self._current.at_home():
                self._current = self._settled(action)
            if self._current is None:
                return self.simulation.advance(action)
            self.replays += 1
            return self._current.replay(action)

    def _settled(self, action: Tensor) -> RecordedStep | None:
        """The recorded step for the state that the world is in, moved to its homes; none if this step is not to be recorded."""
        found = survey(self.simulation.scenario, values=True)
        kind = kind_of(found)
        if kind in self._passing:
            return None
        try:
            if kind not in self._recordings:
                self._recordings[kind] = self._recorded(kind, action)
            self._in_a_row = 0
            self._recordings[kind].move_in(found)
            return self._recordings[kind]
        except OtherConstant as other:
            self._varying.add(other.name)
            self._recordings.clear()
            return self._settled(action)
        except PassingKind as reason:
            self._passing.add(kind)
            self._in_a_row += 1
            if self._in_a_row >= PASSING:
                self._give_up(reason)
        except NotRecordable as reason:
            self._give_up(reason)
        return None

    def _recorded(self, kind: Any, action: Tensor) -> RecordedStep:
        if len(self._recordings) == RECORDINGS:
            here, known = kind, next(iter(self._recordings))
            raise NotRecordable(f"it comes to be in more than {RECORDINGS} kinds of states; {difference(known, here)}")
        return RecordedStep(self.simulation, action, self.mode, self._varying)

    def _give_up(self, reason: NotRecordable) -> None:
        self.reason = str(reason)
        self._recordings.clear()
        warnings.warn(
            f"the steps of scenario `{self.name}` run operation by operation, because they cannot be recorded: {reason}. "
            "Say trainer.compile=none if you do not mind",
            stacklevel=2,
        )


class RecordedStep:
    """A step from one kind of state, recorded and tried out; the world is afterwards as it was.

    Args:
        simulation: whose step.
        action: any action.
        mode: as for :class:`RecordedSimulation`.
        varying: names of places whose content is to count as varying although it looks constant.

    Raises:
        PassingKind: a step from this kind of state leads to another kind.
        NotRecordable: a step does what a list of operations cannot repeat, or a replay would differ from a step.
    """

    def __init__(self, simulation: Simulation, action: Tensor, mode: ReplayMode, varying: Collection[str]) -> None:
        self._simulation = simulation
        with unchanged(simulation):
            self._homes = self._new_homes(survey(simulation.scenario))
            self._memory = {home.untyped_storage()._cdata for home in self._homes.values()}
            self._kind = kind_of(survey(simulation.scenario, values=True))
            constant = self._constant_after(action, varying)
            eager, settled = (self._tried([step] * 2, action) for step in (simulation.advance, self._step_home))
            _refuse_difference("a step that computes every pair", settled, eager, (1e-5, 1e-6))
            changing = [home for name, home in self._homes.items() if name not in constant]
            recording = record(self._step_home, [action], changing, undo=True)
            self._replay: Callable[[Tensor], Step] = recording.replay
            if mode == "graph":
                self._replay = _copying(Graph(recording, [action]).replay)
            # Other kernels may be chosen in a graph; on a CPU the same operations on the same numbers give the same bits.
            tolerances = (0.0, 0.0) if action.device.type == "cpu" else (1e-5, 1e-6)
            _refuse_difference("a replay", self._tried([self._replay] * 2, action), settled, tolerances)
        self._constants = {name: self._homes[name].clone() for name in constant}
        self._versions: list[tuple[Tensor, int]] = []
        self._left: list[tuple[Any, list[int]]] = []
        self._contents: list[Any] = []

    def replay(self, action: Tensor) -> Step:
        """One step with actions ``[B, N]`` or ``[B, N, D]`` from the homes to the homes."""
        return self._replay(action)

    # --- between steps -------------------------------------------------------------------------------------------------------

    def at_home(self) -> bool:
        """Whether every container holds what it held when the state moved in, and no constant was written to."""
        for values, expected in self._left:
            if list(map(id, values)) != expected:
                return False
        return all(tensor._version == version for tensor, version in self._versions)

    def move_in(self, found: Survey) -> None:
        """Move a state of the right kind to its homes.

        Raises:
            OtherConstant: something differs that was taken for a constant.
        """
        for name, content in self._constants.items():
            if not torch.equal(content, found.tensors[name].content):
                raise OtherConstant(name)
        self._go_home(found)
        self._versions = [(self._homes[name], self._homes[name]._version) for name in self._constants]
        holders = [holder for holder in map(_holder, found.objects.values()) if holder is not None]
        views = [holder.values() if isinstance(holder, dict) else holder for holder in holders]
        self._contents = [list(view) for view in views]  # kept, so that no other object can have the same id
        self._left = [(view, list(map(id, view))) for view in views]

    def _go_home(self, found: Survey) -> None:
        """Copy what stands in the places to the homes, and put these there."""
        moving = [(name, place) for name, place in found.tensors.items() if place.content is not self._homes[name]]
        contents = []
        for _, place in moving:
            inside = place.content.untyped_storage()._cdata in self._memory
            contents.append(place.content.clone() if inside else place.content)
        for (name, place), content in zip(moving, contents, strict=True):
            _dense(self._homes[name], place.content).copy_(_dense(content, place.content))
            _put(place, self._homes[name], name)

    # --- recording -----------------------------------------------------------------------------------------------------------

    def _new_homes(self, found: Survey) -> dict[str, Tensor]:
        """New memory for all places, shared as it is shared now; a place that cannot be given another tensor keeps its own."""
        fixed = {place.content.untyped_storage()._cdata for place in found.tensors.values() if not _is_open(place)}
        moving = {name: place for name, place in found.tensors.items() if place.content.untyped_storage()._cdata not in fixed}
        homes = {name: place.content for name, place in found.tensors.items()}
        homes |= dict(zip(moving, copied([place.content for place in moving.values()]), strict=True))
        for name, place in moving.items():
            _put(place, homes[name], name)
        return homes

    def _constant_after(self, action: Tensor, varying: Collection[str]) -> set[str]:
        """The places that a step leaves alone and that have no row per environment."""
        before = rng.state()
        with unchanged(self._simulation):
            versions = {name: home._version for name, home in self._homes.items()}
            self._simulation.advance(action)
            found = survey(self._simulation.scenario, values=True)
            kind = kind_of(found)
            if kind != self._kind:
                raise PassingKind(f"a step leads to a state of another kind: {difference(self._kind, kind)}")
            drawn = rng.drawn_since(before)
            places = found.tensors.items()
            kept = {name for name, place in places if place.content is self._homes[name]}
            same = {name for name in kept if self._homes[name]._version == versions[name]}
        if drawn & {"numpy", "python"}:
            raise NotRecordable("a step draws random numbers from numpy or Python")
        rows = self._simulation.num_envs
        return {name for name in same if rows not in self._homes[name].shape and name not in varying}

    def _step_home(self, action: Tensor) -> Step:
        """A step after which the state is in its homes."""
        with MaskedSelection(), BranchFree(self._simulation.scenario.world):
            outcome = self._simulation.advance(action)
        found = survey(self._simulation.scenario)
        if found.tensors.keys() != self._homes.keys():
            raise NotRecordable("the places of its tensors depend on their values")
        self._go_home(found)
        return outcome

    def _tried(self, steps: Sequence[Callable[[Tensor], Step]], action: Tensor) -> _Outcome:
        """Outcomes and state after some steps from the homes, by name."""
        found: _Outcome = []
        with unchanged(self._simulation):
            for step in steps:
                found += zip(("observation", "reward", "end"), step(action), strict=True)
            places = survey(self._simulation.scenario).tensors
            found += [(name, place.content.clone()) for name, place in sorted(places.items())]
            found.append(("random generator", torch.get_rng_state()))
        return found


# --- kinds of states ---------------------------------------------------------------------------------------------------------


def kind_of(found: Survey) -> tuple[tuple[str, Any], ...]:
    """What a recording takes for granted of a world, by name: where its tensors are and how they lie, and its values."""
    entries: list[tuple[str, Any]] = []
    groups: dict[int, int] = {}
    for name, place in sorted(found.tensors.items()):
        tensor: Tensor = place.content
        group = groups.setdefault(tensor.untyped_storage()._cdata, len(groups))
        entries.append((name, (group, tensor.dtype, tuple(tensor.shape), tensor.stride())))
    for name, place in sorted(found.values.items()):
        content = place.content
        entries.append((name, found.names[id(content)] if id(content) in found.names else repr(content)))
    return tuple(entries)


def difference(one: Iterable[tuple[str, Any]], other: Iterable[tuple[str, Any]]) -> str:
    """The first difference between two kinds, in words."""
    here, there = dict(one), dict(other)
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            return f"`{name}` is {here.get(name, 'missing')} in one and {there.get(name, 'missing')} in the other"
    return "they differ in nothing"


@contextmanager
def unchanged(simulation: Simulation) -> Iterator[None]:
    """Put back, after the block, everything that the world holds, and the random generators."""
    found = survey(simulation.scenario, values=True)
    holders = [holder for holder in map(_holder, found.objects.values()) if holder is not None]
    before = [holder.copy() for holder in holders]
    with preserved([place.content for place in found.tensors.values()]):
        try:
            yield
        finally:
            for holder, content in zip(holders, before, strict=True):
                if isinstance(holder, list):
                    holder[:] = content
                else:
                    holder.clear()
                    holder.update(content)


def _holder(thing: Any) -> dict[Any, Any] | list[Any] | None:
    """The dict or list in which an object keeps what it holds."""
    if isinstance(thing, (dict, list)):
        return thing
    found: dict[Any, Any] | None = getattr(thing, "__dict__", None)
    return found if isinstance(found, dict) else None


def _is_open(place: Slot) -> bool:
    return isinstance(place.owner, (dict, list))


def _put(place: Slot, tensor: Tensor, name: str) -> None:
    if not _is_open(place):
        raise NotRecordable(f"it replaces the tensor `{name}`, which stands in a tuple or a closure")
    place.owner[place.key] = tensor


def _dense(tensor: Tensor, like: Tensor) -> Tensor:
    """One element of each group that lies at the same address in ``like``, which is expanded."""
    for axis, stride in enumerate(like.stride()):
        if stride == 0 and like.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def _copying(replay: Callable[[Tensor], Step]) -> Callable[[Tensor], Step]:
    """A graph's replay whose results are not overwritten by the next."""

    def copying(action: Tensor) -> Step:
        observation, reward, end = replay(action)
        return observation.clone(), reward.clone(), end.clone()

    return copying


def _refuse_difference(what: str, found: _Outcome, expected: _Outcome, tolerances: tuple[float, float]) -> None:
    """Refuse to record if ``what`` leads to something else than a step."""
    if [name for name, _ in expected] != [name for name, _ in found]:
        raise NotRecordable(f"{what} leaves other tensors than a step")
    for (name, one), (_, other) in zip(expected, found, strict=True):
        same = one.shape == other.shape and one.dtype == other.dtype
        if not same or not torch.allclose(one.double(), other.double(), *tolerances, equal_nan=True):
            raise NotRecordable(f"{what} differs from a step in its `{name}`")
