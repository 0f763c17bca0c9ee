"""What was just played, looked at before anything keeps it or learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor, Environment, who_is
from marlkit.errors import NonFiniteError, RuleError
from marlkit.keys import Key
from marlkit.testing.environments import allowed, refuse_unfit_step, unfit_form

CAUSES = {
    "env": "Usual causes: a division by zero or a square root of a negative number in the simulation, or a simulation that "
    "diverges under large actions.",
    "actor": "Usual causes: a learning rate that is too high, unclipped gradients, observations that are very large.",
}
"""What to look at, by section."""


class Witness:
    """Stands in the place of an environment and remembers what it gave last; everything else is the environment's own."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._gave: dict[str, Any] = {}

    __class__ = property(lambda self: type(self._env))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self) -> TensorDict:
        """As :meth:`Environment.reset`, batch ``[B]``."""
        current = self._env.reset()
        self._gave = {"reset": current}
        return current

    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """As :meth:`Environment.step`, two of batch ``[B]``."""
        arrived, current = self._env.step(action)
        self._gave = {"arrived": arrived, "current": current}
        return arrived, current

    def refuse_unfit(self) -> None:
        """Check the form of what the environment gave last; for when another component has failed on it.

        Raises:
            RuleError: it has another form than the key table says.
        """
        for what, step in self._gave.items():
            refuse_unfit_step(self._env, step, what)


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Whether each is finite, ``[K]`` bool: the largest magnitude is as finite as what it is taken of, in one operation."""
    return torch.stack(torch._foreach_norm(list(tensors), float("inf"))).isfinite()


def inspect_played(
    played: TensorDictBase, env: Environment, actor: Actor, iteration: int, following: TensorDictBase | None = None
) -> None:
    """Look at the steps that were just played, at all of them with one question to the device.

    Args:
        played: ``[B, T]``, step after step.
        env: what wrote what was seen.
        actor: what wrote what was chosen.
        iteration: begins messages.
        following: where the next step starts, ``[B]``.

    Raises:
        NonFiniteError: a tensor is NaN or infinite; names the earliest and the component that wrote it.
        RuleError: a tensor has another form than the key table says, or ends of episodes or masks are wrong.
    """
    _refuse_unfit_forms(played, env, actor)
    tensors = [(key, tensor) for key, tensor in played.items(True, True) if _is_floating(tensor)]
    waiting = [] if following is None else [(key, tensor) for key, tensor in following.items(True, True) if _is_floating(tensor)]
    rules = _rules(played)
    kept = torch.stack([rule.kept for rule in rules])
    if torch.cat([all_finite([tensor for _, tensor in (*tensors, *waiting)]), kept]).all():
        return
    when = f"iteration {iteration}"
    _refuse_unfinite(tensors, waiting, env, actor, when)
    broken = next(rule for rule in rules if not rule.kept)
    raise RuleError(f"{when}: {who_is(actor if broken.name == 'choice' else env)}", *broken[1:])


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0


def _refuse_unfit_forms(played: TensorDictBase, env: Environment, actor: Actor) -> None:
    for component in (env, actor):
        for key in component.writes:
            tensor = played.get(key, None)
            if tensor is None or key in actor.carried or keys.current(key) in actor.carried:
                continue
            problem = unfit_form(env.spec, key, tensor, played.batch_dims)
            if problem:
                rule, words, remedy = problem
                raise RuleError(who_is(component), rule, words, remedy)


class _Rule(NamedTuple):
    """Whether a rule is kept, ``[]`` bool, and what to say if not."""

    kept: Tensor
    name: str
    problem: str
    remedy: str


def _rules(played: TensorDictBase) -> list[_Rule]:
    """The rules of the ends, of the masks and of the actions."""
    done, first = played[keys.DONE], played.get(keys.IS_FIRST, None)
    kept = (done == played[keys.TERMINATED] | played[keys.TRUNCATED]).all()
    found = [_Rule(kept, "done", "gave a `done` that is not terminated | truncated", "set it to exactly that.")]
    if first is not None:
        kept = (first[:, 1:] == done[:, :-1]).all()
        problem = "gave an `is_first` that is not the `done` of the step before"
        remedy = "reset the environments that are done, and no others, and let is_first say so."
        found.append(_Rule(kept, "first", problem, remedy))
    mask, alive = played.get(keys.ACTION_MASK, None), played.get(keys.ALIVE, None)
    if mask is not None:
        some = mask.any(-1)
        problem = "gave an `agents.action_mask` that allows nothing to an agent that takes part"
        remedy = "leave it one action, such as one that does nothing, or let `alive` be false."
        found.append(_Rule((some if alive is None else some | ~alive.squeeze(-1)).all(), "masks", problem, remedy))
        problem, remedy = (
            "chose an action that `agents.action_mask` does not allow",
            "give actions that are not allowed no probability.",
        )
        found.append(_Rule((allowed(played[keys.ACTION], mask) | ~some).all(), "choice", problem, remedy))
    return found


def _refuse_unfinite(
    tensors: Sequence[tuple[Key, Tensor]], waiting: Sequence[tuple[Key, Tensor]], env: Environment, actor: Actor, when: str
) -> None:
    """Refuse the earliest that is not finite: what is seen comes before the action, and that before what follows."""
    found = []
    for key, tensor in tensors:
        wrong = ~tensor.isfinite().reshape(*tensor.shape[:2], -1).all(-1)
        if wrong.any():
            step = int(wrong.any(0).nonzero()[0])
            order = 2 if key[0] == "next" else 1 if key in actor.writes else 0
            found.append((step, order, keys.name(key), key, int(wrong[:, step].nonzero()[0])))
    for key, tensor in waiting:
        wrong = ~tensor.isfinite().reshape(len(tensor), -1).all(-1)
        if wrong.any():
            found.append((tensors[0][1].shape[1], 0, keys.name(key), key, int(wrong.nonzero()[0])))
    if not found:
        return
    step, _, name, key, index = min(found, key=lambda entry: entry[:3])
    section, component = ("actor", actor) if key in actor.writes or key in actor.carried else ("env", env)
    raise NonFiniteError(
        f"{when}: `{name}`, written by {who_is(component)}, is not finite in step {step} of environment {index}. Training "
        f"stopped before anything was learnt from it; the checkpoints of the run are from before it. {CAUSES[section]}"
    )
