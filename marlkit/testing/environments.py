"""Testing one environment alone: the rules that every environment keeps.

An environment of a user is held to the same rules as marlkit's own::

    from marlkit.testing import check_environment

    def test_rules():
        check_environment(lambda runtime: MyEnvironment(runtime, num_envs=3))

The rules that a few steps show are watched in the dry run of every recipe too (:class:`WatchedEnvironment`).
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys, rng
from marlkit.component import Environment, Runtime, who_is
from marlkit.errors import MarlkitError, RuleError
from marlkit.keys import Key
from marlkit.spec import Continuous, TeamSpec

Build = Callable[[Runtime], Environment]
"""Constructs an environment."""

LONGEST = 1000
"""Steps up to which an episode is played to see its time limit."""

LATER = "Give every step tensors of its own: clone what is written to in place."


def check_environment(build: Build | Environment, *, steps: int = 30, resumable: bool = True) -> None:
    """Hold an environment to the rules of its kind; plays random actions in several copies of it.

    Args:
        build: constructs it, of two or more environments (``num_envs``), so that rows that are mixed up are seen; or one that is
            built, of which copies are made.
        steps: joint steps that are played, and more where its time limit comes later.
        resumable: whether a run in it can be resumed; without, ``state_dict`` is not looked at.

    Raises:
        RuleError: it breaks a rule; names class and rule, and says what to do.
        MarlkitError: it refused something that it has to take.
    """
    if isinstance(build, Environment):
        build = partial(_copy, build)
    env = _constructed(build)
    refuse_unfit_spec(env)
    horizon = env.spec.horizon or 0
    watched = cast(Environment, WatchedEnvironment(env))
    _episode(watched, 1, max(steps, min(horizon + 2, LONGEST)))
    _episode(watched, 2, 1)
    _check_seeds(build, steps)
    _check_clipping(build, steps)
    if resumable:
        _check_state(build, steps)
    _check_refusals(env)
    env.close()


# --- what is said of the team ------------------------------------------------------------------------------------------------


def refuse_unfit_spec(env: Environment) -> None:
    """Check that the team spec of an environment is whole.

    Raises:
        RuleError: a size is none, or sizes, bounds or names do not fit each other.
    """
    spec, who = getattr(env, "spec", None), who_is(env)
    if not isinstance(spec, TeamSpec):
        raise RuleError(who, "spec", f"has no team spec but {spec!r}", "set `self.spec` to a TeamSpec in the constructor.")
    for name, kind in {"num_envs": int, "device": torch.device}.items():
        found = getattr(env, name, None)
        if not isinstance(found, kind):
            raise RuleError(who, "spec", f"has no `{name}` but {found!r}", f"set `self.{name}` in the constructor.")
    for problem in _problems_of(spec):
        raise RuleError(who, "spec", f"has a team spec with {problem}", "correct the TeamSpec that its constructor makes.")
    kinds = {"discrete", "continuous"}
    claimed = env.traits & kinds
    if claimed and claimed != spec.traits & kinds:
        problem = (
            f"has actions that are {'discrete' if spec.discrete else 'continuous'} and the trait `{min(claimed - spec.traits)}`"
        )
        raise RuleError(who, "spec", problem, "let the traits of its contract say what its TeamSpec says.")


def _problems_of(spec: TeamSpec) -> Iterator[str]:
    action = "actions" if spec.discrete else "action dimensions"
    counts = {"agents": spec.n_agents, "observation features": spec.observation, action: spec.action_features}
    counts |= {"state features": spec.state_size, "steps of an episode (horizon)": 1 if spec.horizon is None else spec.horizon}
    for what, count in counts.items():
        if not isinstance(count, int) or count < 1:
            yield f"{count} {what}; there must be at least one"
    own = {
        "observation_sizes": (spec.own_observation_sizes, spec.observation),
        "action_sizes": (spec.own_action_sizes, spec.action_features),
    }
    for name, (sizes, longest) in own.items():
        if len(sizes) != spec.n_agents or max(sizes, default=0) > longest or min(sizes, default=0) < (name == "action_sizes"):
            yield f"{name} {list(sizes)} for {spec.n_agents} agents of at most {longest}"
    if len(set(spec.agent_names)) != spec.n_agents:
        yield f"the names {list(spec.agent_names)} for {spec.n_agents} agents"
    bounds = [] if not isinstance(spec.action, Continuous) else [b for b in (spec.action.low, spec.action.high) if b is not None]
    if any(len(bound) != spec.n_agents or any(len(row) != spec.action_features for row in bound) for bound in bounds):
        yield f"bounds that are not {spec.n_agents} rows of {spec.action_features} numbers"
    elif len(bounds) == 2 and any(a > b for low, high in zip(*bounds, strict=True) for a, b in zip(low, high, strict=True)):
        yield "a lower bound above the upper one"
    elif any(not math.isfinite(number) for bound in bounds for row in bound for number in row):
        yield "bounds that are not finite; leave them out where there are none"
    if TeamSpec.from_dict(spec.as_dict()) != spec:
        yield "lists where there must be tuples"


# --- what a step gives -------------------------------------------------------------------------------------------------------


def refuse_unfit_step(env: Environment, step: Any, what: str) -> None:
    """Check keys, shapes, types and device of what an environment gave; reads no values.

    Args:
        env: the environment.
        step: what it gave, batch ``[B]``.
        what: ``reset``, ``arrived`` or ``current``.

    Raises:
        RuleError: a declared key is missing, another is there, or a tensor has another form than the key table says.
    """
    who = who_is(env)

    def refuse(rule: str, problem: str, remedy: str) -> None:
        raise RuleError(who, rule, f"{problem} in what it gives as `{what}`", remedy)

    if not isinstance(step, TensorDictBase):
        refuse("keys", f"gives a {type(step).__name__} and no TensorDict", "`step` returns two, `reset` one.")
    if step.batch_size != (env.num_envs,):
        refuse("shapes", f"has the batch size {list(step.batch_size)}", f"its TensorDicts have the batch size [{env.num_envs}].")
    found = dict(step.items(True, True))
    declared = {_of_step(key): key for key in (*env.writes, *(key for key in keys.AGENT_ENDS if key[1:] in found))}
    after = {own for own, key in declared.items() if key[0] == "next"}
    wanted = {own: key for own, key in declared.items() if what == "arrived" or own not in after}
    for own, key in wanted.items():
        if own not in found:
            refuse("keys", f"has no `{keys.name(own)}`", f"its contract says that it writes `{keys.name(key)}`.")
        problem = unfit_form(env.spec, key, found[own], 1)
        if problem:
            refuse(*problem)
        if found[own].device.type != torch.device(env.device).type:
            refuse("device", f"has `{keys.name(own)}` on {found[own].device}", f"everything lies on its device, {env.device}.")
    extra = found.keys() - wanted.keys() - after
    if extra:
        name = keys.name(min(extra, key=keys.name))
        refuse("keys", f"has `{name}`, which its contract does not declare", "declare it under `writes`, or leave it out.")


def unfit_form(spec: TeamSpec, key: Key, tensor: Any, batch_dims: int) -> tuple[str, str, str] | None:
    """Why ``tensor`` has not the form that the key table says of ``key``, as rule, problem and remedy; ``None`` if it has."""
    name, info = keys.name(key), keys.describe(key)
    if not isinstance(tensor, Tensor):
        return "shapes", f"has a {type(tensor).__name__} under `{name}`", "every entry is a tensor."
    dimensions = info.dimensions(discrete=spec.discrete)
    sizes: dict[str, Any] = spec.sizes() | {"1": 1}
    wanted, shape = [sizes.get(d) for d in dimensions], list(tensor.shape[batch_dims:])
    if len(shape) != len(wanted) or any(w not in (None, s) for w, s in zip(wanted, shape, strict=True)):
        says = f"the key table says [{' '.join(dimensions)}] = {wanted}."
        return "shapes", f"has `{name}` as {shape} behind the batch", says
    dtype = "float32" if key in (keys.ACTION, keys.JOINT_ACTION) and not spec.discrete else info.dtype
    if tensor.dtype != getattr(torch, dtype):
        found = str(tensor.dtype).removeprefix("torch.")
        return "types", f"has `{name}` as {found}", f"the key table says {dtype}: convert it."
    return None


def _of_step(key: Key) -> Key:
    """A key as the TensorDict of a step has it: without the ``next`` under which a rollout stores it."""
    return key if isinstance(key, str) or key[0] != "next" else key[1] if len(key) == 2 else key[1:]


class WatchedEnvironment:
    """Stands in the place of an environment and holds every step of it to the rules; for checks, because it copies every step.

    Everything else is the environment's own.

    Args:
        env: the environment.
        player: who chooses the actions, in messages.
    """

    def __init__(self, env: Environment, player: str = "the player") -> None:
        self._env = env
        self._player = player
        self._given: list[tuple[str, Any, Any]] = []
        self._ages = torch.zeros(env.num_envs, dtype=torch.int64)
        self._current: TensorDict | None = None
        self._start: Tensor | None = None

    __class__ = property(lambda self: type(self._env))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self) -> TensorDict:
        """As :meth:`Environment.reset`, batch ``[B]``."""
        current = self._env.reset()
        refuse_unfit_step(self._env, current, "reset")
        self._refuse_changed("reset")
        self._refuse_unfinite(current, "reset")
        self._refuse_unavailable(current, "reset", torch.zeros(self._env.num_envs, dtype=torch.bool))
        if not current[keys.IS_FIRST].all():
            self._refuse("first", "gives `is_first` as false after `reset`", "it is true in the first step of an episode.")
        self._ages.zero_()
        self._start = current[keys.OBSERVATION].clone()
        self._give(reset=current)
        self._current = current.clone()
        return current

    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """As :meth:`Environment.step`, two of batch ``[B]``."""
        self._refuse_unfit_choice(action)
        self._given = [entry for entry in self._given if entry[0] != "action"]
        self._given.append(("action", action, action.clone()))
        gave: Any = self._env.step(action)
        if not isinstance(gave, tuple) or len(gave) != 2:
            self._refuse("keys", f"returns {_described(gave)} from `step`", "it returns `(arrived, current)`.")
        arrived, current = gave
        refuse_unfit_step(self._env, arrived, "arrived")
        refuse_unfit_step(self._env, current, "current")
        self._refuse_changed("step")
        for what, step in {"arrived": arrived, "current": current}.items():
            self._refuse_unfinite(step, what)
        self._refuse_unlike_ends(arrived, current)
        terminated = arrived[keys.TERMINATED[1]].squeeze(-1).cpu()
        self._refuse_unavailable(arrived, "arrived", terminated)
        self._refuse_unavailable(current, "current", torch.zeros_like(terminated))
        self._refuse_unlike_current(arrived, current)
        self._refuse_unlike_team(arrived)
        self._refuse_unlike_horizon(arrived)
        self._give(arrived=arrived, current=current)
        self._current = current.clone()
        return arrived, current

    def _refuse(self, rule: str, problem: str, remedy: str) -> None:
        raise RuleError(who_is(self._env), rule, problem, remedy)

    def _refuse_unfit_choice(self, action: Tensor) -> None:
        """Check the values of an action; its form is for the environment to refuse."""
        mask = None if self._current is None else self._current.get(keys.ACTION_MASK, None)
        if action.is_floating_point() and not action.isfinite().all():
            raise RuleError(self._player, "choice", "chose an action that is not finite", "look at what it is computed from.")
        if mask is not None and action.shape == mask.shape[:-1] and not (allowed(action, mask) | ~mask.any(-1)).all():
            problem = "chose an action that `agents.action_mask` does not allow"
            raise RuleError(self._player, "choice", problem, "give actions that are not allowed no probability.")

    def _give(self, **steps: TensorDict) -> None:
        """Remember what is given out now, and what it holds; of earlier ones the last two."""
        self._given = self._given[-4:] + [(what, step, step.clone()) for what, step in steps.items()]

    def _refuse_changed(self, during: str) -> None:
        for what, given, held in self._given:
            pairs = (
                [("", given, held)]
                if isinstance(given, Tensor)
                else [(f" (`{keys.name(key)}`)", given[key], value) for key, value in held.items(True, True)]
            )
            for name, now, before in pairs:
                if not torch.equal(now, before) and not (_is_nan(now) and _is_nan(before)):
                    taken = "the `action` that it was given" if what == "action" else f"the `{what}` that it gave before{name}"
                    self._refuse("kept", f"writes to {taken} during `{during}`", LATER)

    def _refuse_unfinite(self, step: TensorDictBase, what: str) -> None:
        for key, tensor in step.items(True, True):
            if tensor.is_floating_point() and not tensor.isfinite().all():
                problem = f"gives `{keys.name(key)}` that is not finite in `{what}`"
                self._refuse("finite", problem, "observations, states and rewards are never NaN or infinite.")

    def _refuse_unlike_ends(self, arrived: TensorDictBase, current: TensorDictBase) -> None:
        terminated, truncated, done = (arrived[key[1]] for key in (keys.TERMINATED, keys.TRUNCATED, keys.DONE))
        if not torch.equal(done, terminated | truncated):
            self._refuse("done", "gives a `done` that is not terminated | truncated", "set it to exactly that.")
        if (terminated & truncated).any():
            self._refuse(
                "done", "gives an episode as terminated and truncated at once", "a true end is no cut: truncated & ~terminated."
            )
        if all(key[1:] in arrived.keys(True) for key in keys.AGENT_ENDS):
            truly, ended = (arrived[key[1:]] for key in keys.AGENT_ENDS)
            if (truly & ~ended).any() or (done.unsqueeze(-1) & ~ended).any():
                self._refuse("done", "gives agents' own ends that do not fit `done`", "all have ended where the episode has.")
        if arrived[keys.IS_FIRST].any():
            self._refuse("first", "gives `is_first` as true in `arrived`", "that is the state before any reset.")
        if not torch.equal(current[keys.IS_FIRST], done):
            problem = "gives an `is_first` in `current` that is not the `done` of `arrived`"
            self._refuse("first", problem, "reset the environments that are done, and no others, and let is_first say so.")

    def _refuse_unavailable(self, step: TensorDictBase, what: str, ended: Tensor) -> None:
        spec, key = self._env.spec, keys.ACTION_MASK if self._env.spec.discrete else keys.ACTION_DIMS
        if key not in self._env.writes:
            return
        mask = step[key].cpu()
        own = torch.arange(spec.action_features) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)
        if (mask & ~own).any():
            problem = f"gives a `{keys.name(key)}` in `{what}` that allows what an agent does not have"
            self._refuse("masks", problem, "actions from the agent's own size on (action_sizes) are padding: false.")
        none = ~mask.any(-1) & ~ended.unsqueeze(-1)
        if keys.ALIVE in self._env.writes:
            none &= step[keys.ALIVE].squeeze(-1).cpu()
        if none.any():
            problem = f"gives a `{keys.name(key)}` in `{what}` that allows nothing to an agent that takes part"
            self._refuse("masks", problem, "leave it one action, such as one that does nothing, or let `alive` be false.")

    def _refuse_unlike_current(self, arrived: TensorDictBase, current: TensorDictBase) -> None:
        done = arrived[keys.DONE[1]].squeeze(-1)
        shown = [key for key in self._env.writes if key[0] != "next" and key != keys.IS_FIRST]
        for key in shown:
            if not torch.equal(arrived[key][~done], current[key][~done]):
                problem = f"gives another `{keys.name(key)}` in `current` than in `arrived` of an episode that goes on"
                self._refuse("continues", problem, "they differ only in the environments that are done.")
        seen, start = arrived[keys.OBSERVATION], self._start
        assert start is not None
        went_on = [torch.equal(seen[b], current[keys.OBSERVATION][b]) for b in done.nonzero().flatten().tolist()]
        if went_on and all(went_on) and not any(torch.equal(row, other) for row in seen[done] for other in start):
            problem = "shows after the end of an episode the state in which it ended"
            self._refuse("resets", problem, "`current` is the first state of the next episode in the environments that are done.")

    def _refuse_unlike_team(self, arrived: TensorDictBase) -> None:
        reward = arrived[keys.REWARD[1:]]
        if (self._env.spec.team_reward or "team_reward" in self._env.traits) and not torch.equal(
            reward, reward[:, :1].expand_as(reward)
        ):
            problem = "says `team_reward` and pays its agents differently"
            self._refuse("team_reward", problem, "pay all agents the same, or leave out the trait and the field of the spec.")

    def _refuse_unlike_horizon(self, arrived: TensorDictBase) -> None:
        self._ages += 1
        done = arrived[keys.DONE[1]].squeeze(-1).cpu()
        horizon = self._env.spec.horizon
        if horizon is not None and (self._ages[~done] >= horizon).any():
            problem = f"has an episode that goes on after {horizon} steps, the horizon of its spec"
            self._refuse("horizon", problem, "truncate it there, or leave the horizon out.")
        self._ages[done] = 0


def allowed(action: Tensor, mask: Tensor) -> Tensor:
    """Whether a mask ``[*, N, A]`` allows discrete actions ``[*, N]``; ``[*, N]`` bool."""
    known = (action >= 0) & (action < mask.shape[-1])
    return known & mask.gather(-1, action.clamp(0, mask.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)


def _is_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _described(gave: Any) -> str:
    return f"a tuple of {len(gave)}" if isinstance(gave, tuple) else f"a {type(gave).__name__}"


# --- playing -----------------------------------------------------------------------------------------------------------------

Choose = Callable[[TensorDictBase, torch.Generator], Tensor]
"""Chooses an action ``[B, N]`` or ``[B, N, D]`` from what is seen."""


def random_action(spec: TeamSpec, seen: TensorDictBase, generator: torch.Generator, stretch: float = 1.0) -> Tensor:
    """Any of the actions that the masks allow, ``[B, N]``; or uniform within the bounds, else in [-1, 1], times ``stretch``."""
    observation = seen[keys.OBSERVATION]
    uniform = torch.rand(*observation.shape[:2], spec.action_features, generator=generator)
    if not isinstance(spec.action, Continuous):
        own = torch.arange(spec.action_features) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)
        mask = seen.get(keys.ACTION_MASK, None)
        return ((uniform + 1) * (own if mask is None else mask.cpu())).argmax(-1).to(observation.device)
    low, high = _bounds(spec.action)
    return (stretch * (low + (high - low) * uniform)).to(observation.device)


def _bounds(action: Continuous) -> tuple[Tensor, Tensor]:
    low = torch.tensor(-1.0 if action.low is None else action.low)
    return low, torch.tensor(1.0 if action.high is None else action.high)


def _copy(env: Environment, runtime: Runtime) -> Environment:
    return copy.deepcopy(env)


def _constructed(build: Build, seed: int = 0) -> Environment:
    before = rng.state()
    env = build(Runtime(torch.device("cpu"), seed))
    drawn = rng.drawn_since(before)
    rng.restore(before)
    if drawn:
        problem = f"draws from the global random generators of {' and '.join(sorted(drawn))} while it is constructed"
        remedy = "build within `with marlkit.rng.isolated(runtime.seed):`, so that other components start as without it."
        raise RuleError(who_is(env), "construction", problem, remedy)
    return env


Seen = list[tuple[str, Tensor]]
"""All that an environment gave, tensor by tensor, with their names."""


def _play(env: Environment, current: TensorDict, steps: int, choose: Choose | None = None) -> tuple[TensorDict, Seen]:
    """Play on from ``current``; the same actions for the same environment in the same state."""
    generator, seen = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        action = random_action(env.spec, current, generator) if choose is None else choose(current, generator)
        arrived, current = env.step(action)
        for what, step in {"arrived": arrived, "current": current}.items():
            seen += [
                (f"`{keys.name(key)}` of `{what}`", step[key].clone()) for key in sorted(step.keys(True, True), key=keys.name)
            ]
    return current, seen


def _episode(env: Environment, seed: int, steps: int, choose: Choose | None = None) -> Seen:
    """Play from a reset on, with all generators seeded."""
    with rng.isolated(seed):
        env.seed(seed)
        current = env.reset()
        start = current[keys.OBSERVATION].clone()
        return [("`agents.observation` of `reset`", start), *_play(env, current, steps, choose)[1]]


def _difference(one: Seen, other: Seen) -> str:
    """The name of the first tensor that differs; empty if none does."""
    differing = (name for (name, a), (_, b) in zip(one, other, strict=True) if not torch.equal(a, b))
    return next(differing, "")


# --- rules that need several copies ------------------------------------------------------------------------------------------


def _check_seeds(build: Build, steps: int) -> None:
    """Equal seeds, equal episodes, also in an environment that has played before; other seeds, others, if anything is random."""
    env, other = _constructed(build), _constructed(build)
    first = _episode(env, 7, steps)
    unlike = _difference(first, _episode(other, 7, steps))
    # Where an episode ends, fresh states may have been drawn in advance.
    ends = (index for index, (name, tensor) in enumerate(first) if name == "`done` of `arrived`" and tensor.any())
    until = next(ends, len(first))
    unlike = unlike or _difference(first[:until], _episode(env, 7, steps)[:until])
    remedy = "draw from the global generators, or let `seed` seed those of its own, so that evaluations can be compared."
    if unlike:
        raise RuleError(who_is(env), "seed", f"plays other episodes with equal seeds ({unlike} differs)", remedy)
    with rng.isolated(8):
        env.seed(8)
        starts = [env.reset()[keys.OBSERVATION].clone() for _ in range(3)]
    is_random = any(not torch.equal(starts[0], start) for start in starts)
    if is_random and not _difference(_episode(env, 8, steps), _episode(env, 9, steps)):
        problem = "plays the same episodes with other seeds, although its episodes differ from one another"
        raise RuleError(who_is(env), "seed", problem, remedy)


def _check_clipping(build: Build, steps: int) -> None:
    """Actions beyond the bounds act as the bounds, and padded dimensions not at all."""
    env, other = _constructed(build), _constructed(build)
    spec, action = env.spec, env.spec.action
    if not isinstance(action, Continuous) or action.low is None or action.high is None:
        return
    low, high = _bounds(action)
    own = torch.arange(action.size) < torch.tensor(spec.own_action_sizes).unsqueeze(-1)

    def beyond(seen: TensorDictBase, generator: torch.Generator) -> Tensor:
        return random_action(spec, seen, generator, stretch=3.0)

    def within(seen: TensorDictBase, generator: torch.Generator) -> Tensor:
        return torch.where(own, beyond(seen, generator).clamp(low, high), (low + high) / 2)

    unlike = _difference(_episode(env, 7, steps, beyond), _episode(other, 7, steps, within))
    if unlike:
        problem = f"does not clip actions to its bounds ({unlike} differs for an action beyond them)"
        remedy = "clamp a copy of the action to the bounds of its spec, and ignore dimensions that are padding."
        raise RuleError(who_is(env), "clips", problem, remedy)


def _check_state(build: Build, steps: int) -> None:
    """What a copy plays from a saved state on, is what the environment itself goes on to play."""
    env, other = _constructed(build), _constructed(build, seed=1)
    with rng.isolated(3):
        env.seed(3)
        current, _ = _play(env, env.reset(), steps // 2 + 1)
        current, saved, generators = current.clone(), env.state_dict(), rng.state()
        _, expected = _play(env, current, steps)
        other.load_state_dict(_as_plain_data(env, saved))
        rng.restore(generators)
        unlike = _difference(expected, _play(other, current, steps)[1])
    if unlike:
        problem = f"does not continue from its `state_dict` ({unlike} differs)"
        remedy = "save copies of all that decides its future, counters and generators of its own among it, and take it back."
        raise RuleError(who_is(env), "state", problem, remedy)


def _as_plain_data(env: Environment, state: dict[str, Any]) -> dict[str, Any]:
    memory = io.BytesIO()
    try:
        torch.save(state, memory)
        memory.seek(0)
        return cast("dict[str, Any]", torch.load(memory, weights_only=True))
    except Exception as error:
        problem = f"gives a `state_dict` that holds more than plain data and tensors ({_first_line(error)})"
        raise RuleError(who_is(env), "state", problem, "use dicts, lists, numbers, words and tensors.") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _check_refusals(env: Environment) -> None:
    """Actions of a wrong shape or type are refused."""
    with rng.isolated(2):
        action = random_action(env.spec, env.reset(), torch.Generator())
        another = action.double() if env.spec.discrete else action.long()
        for what, wrong in {"an agent too many": torch.cat([action, action[:, :1]], 1), "another type": another}.items():
            try:
                env.step(wrong)
            except MarlkitError:
                continue
            except Exception as error:
                how = f"fails with {type(error).__name__}: {_first_line(error)}"
            else:
                how = "takes it"
            problem = f"does not refuse an action with {what} but {how}"
            raise RuleError(who_is(env), "refuses", problem, 'call `self.refuse_unfit_action(action, "this environment")` first.')
