"""On-policy rollouts: a fixed number of steps with the current policy, used once."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.batches import refuse_unfit_length
from marlkit.component import Actor, Data, Environment, who_is
from marlkit.contract import Contract, When
from marlkit.data._recent_past import PAST, write_recent
from marlkit.errors import MarlkitError
from marlkit.keys import Key
from marlkit.learning import RunStep, run_directly
from marlkit.options import PositiveInt
from marlkit.saved import MAPPING, TENSOR, refuse_misfit
from marlkit.spec import TeamSpec


class RolloutData(Data):
    """``steps`` joint steps of every environment, continuing where the last rollout stopped.

    The recent past (``RECENT_*``) is written if a component reads it, also across the border of two rollouts; so are the
    parameters of the distributions that were played from (``BEHAVIOUR_*``).

    Args:
        spec: the team.
        steps: length T of a rollout; the batch of an iteration has ``num_envs * steps`` joint steps.
    """

    contract = Contract(
        writes=(
            *(keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID),
            When("discrete", (keys.BEHAVIOUR_LOGITS,)),
            When("continuous", (keys.BEHAVIOUR_LOC, keys.BEHAVIOUR_SCALE)),
        ),
        traits=("on_policy",),
    )

    def __init__(self, spec: TeamSpec, *, steps: PositiveInt = 100) -> None:
        self.spec = spec
        self.steps = steps
        self._current: TensorDict | None = None
        self._storage: TensorDict | None = None
        self._slots: list[dict[Key, Tensor]]
        self._forms: list[tuple[torch.Size, torch.dtype]]
        self._past: TensorDict | None = None

    @torch.no_grad()
    def collect(self, env: Environment, actor: Actor, run_step: RunStep = run_directly) -> TensorDict:
        """The next rollout, batch ``[B, T]``; the next call overwrites it."""
        if self._current is None:
            self._current = _with(env.reset(), actor.initial_state(env.num_envs))

        def act(seen: TensorDictBase) -> dict[Key, Tensor]:
            chosen = self.choose(seen.copy(), actor)
            return {key: _written(chosen, key, actor) for key in actor.writes}

        for step in range(self.steps):
            taken = self._current.copy()
            for key, value in run_step(("act", actor), act, self._current).items():
                taken.set(key, value)
            arrived, current = env.step(taken[keys.ACTION])
            carried = {key: taken[keys.following(key)] for key in actor.carried}
            taken["next"] = _with(arrived, carried)
            self._store(taken, step, env, actor)
            self._current = _with(current, carried)
        assert self._storage is not None
        batch = self._storage.transpose(0, 1)
        if self.inspect is not None:
            self.inspect(batch, self._current)
        if self.history:
            self._show_past(batch, self._storage.select(*PAST))
        for key in self.behaviour_read():
            batch.set(key, self.behaviour(batch, key, actor))
        return batch

    def choose(self, seen: TensorDictBase, actor: Actor) -> TensorDictBase:
        """What the actor does in a step ``[B]``; a subclass may play something else.

        Raises:
            MarlkitError: the actor returns nothing.
        """
        chosen: TensorDictBase | None = actor(seen)
        if chosen is None:
            raise MarlkitError(f"{who_is(actor)} returns nothing from `forward`: return the batch")
        return chosen

    def behaviour(self, played: TensorDictBase, key: Key, actor: Actor) -> Tensor:
        """A ``BEHAVIOUR_*`` of steps ``[B, T]``, ``[B, T, N, F]``: what the actor wrote, where it was what played.

        Raises:
            MarlkitError: the actor did not write it.
        """
        source = next(source for source, kept in keys.BEHAVIOUR.items() if kept == key)
        found: Tensor | None = played.get(source, None)
        if found is None:
            raise MarlkitError(f"`{keys.name(key)}` is read, but {who_is(actor)} does not write `{keys.name(source)}`: write it")
        return found

    def behaviour_read(self) -> list[Key]:
        """The ``BEHAVIOUR_*`` that it writes and a component reads."""
        return [key for key in keys.BEHAVIOUR.values() if key in self.writes and (self.shown is None or key in self.shown)]

    def held_bytes(self, envs: int, played: TensorDictBase) -> int:
        """Bytes of a rollout of ``envs`` environments, judged by ``played`` ``[B, T]``."""
        return envs * self.steps * bytes_of_step(played)

    @classmethod
    def brief(cls, steps: int) -> dict[str, Any]:
        """Options of a short rollout."""
        return {"steps": steps}

    def refuse_unfit(self, envs: int, iterations: int, sequence_length: int | None) -> None:
        """Refuse a rollout that is not a whole number of sequences."""
        refuse_unfit_length(self.steps, sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """The state in which the next rollout starts, and the steps before it in its recent past."""
        kept = {"current": self._current, "past": self._past}
        return {name: steps.to_dict() for name, steps in kept.items() if steps is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        refuse_misfit(state, {name: MAPPING for name in ("current", "past") if name in state}, "state", exact=False)
        self._current, self._past = (_restored(state.get(name), name) for name in ("current", "past"))

    def _show_past(self, batch: TensorDict, steps: TensorDict) -> None:
        # The zeros before the very first step are never valid: an episode begins with that step.
        past = steps.new_zeros((self.history, steps.batch_size[1])) if self._past is None else self._past
        steps = torch.cat([past, steps])
        write_recent(batch, steps, 0, self.history)
        self._past = steps[self.steps :].clone()

    def _store(self, taken: TensorDict, step: int, env: Environment, actor: Actor) -> None:
        if self._storage is None or self._storage.batch_size != (self.steps, *taken.batch_size):
            # Time-major, so that every write is one contiguous copy.
            self._storage = taken.new_empty((self.steps, *taken.batch_size))
            self._slots = [dict(slot.items(include_nested=True, leaves_only=True)) for slot in self._storage.unbind(0)]
            self._forms = [(kept.shape, kept.dtype) for kept in self._slots[0].values()]
        slot = self._slots[step]
        found = [taken.get(key, None) for key in slot]
        # A copy would stretch and convert what has another form than in the steps before.
        if [(None, None) if tensor is None else (tensor.shape, tensor.dtype) for tensor in found] != self._forms:
            self._refuse_other_form(found, env, actor)
        torch._foreach_copy_([*slot.values()], found)

    def _refuse_other_form(self, found: list[Tensor | None], env: Environment, actor: Actor) -> None:
        for key, tensor, (shape, dtype) in zip(self._slots[0], found, self._forms, strict=True):
            now = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            if tensor is None or (tensor.shape, tensor.dtype) != (shape, dtype):
                who = who_is(actor if key in actor.writes else env)
                raise MarlkitError(f"{who} gave `{keys.name(key)}` as {dtype} {list(shape)} in the steps before, and now {now}")


def bytes_of_step(played: TensorDictBase) -> int:
    """Bytes of one joint step of ``played`` ``[B, T]``."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in played.values(True, True))
    return int(held // played.batch_size.numel())


def _written(chosen: TensorDictBase, key: Key, actor: Actor) -> Tensor:
    found: Tensor | None = chosen.get(key, None)
    if found is None:
        raise MarlkitError(f"{who_is(actor)} declares that it writes `{keys.name(key)}`, but did not")
    return found


def _with(step: TensorDict, carried: dict[Key, Tensor]) -> TensorDict:
    """The step with what the actor carries into it."""
    if not carried:
        return step
    found = step.copy()
    for key, value in carried.items():
        found.set(key, value)
    return found


def _restored(steps: dict[str, Any] | None, name: str) -> TensorDict | None:
    if steps is None:
        return None
    refuse_misfit(steps, {"agents": {"observation": TENSOR}, keys.IS_FIRST: TENSOR}, name, exact=False)
    first = steps[keys.IS_FIRST]
    return TensorDict(steps, batch_size=first.shape[:-1], device=first.device)
