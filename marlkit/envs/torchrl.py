"""Any environment of TorchRL whose agents are stacked in one group, or that has a single agent.

Bou et al. 2024, "TorchRL: A data-driven decision-making library for PyTorch", arXiv:2306.00577.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Categorical, NonTensor, OneHot, Unbounded
from torchrl.envs import EnvBase, SerialEnv
from torchrl.envs.utils import step_mdp

from marlkit import keys, rng
from marlkit.component import Runtime
from marlkit.contract import Contract, When
from marlkit.envs._adapter import POOLED, WRITES, AdapterEnvironment, Outcome, Pooling
from marlkit.errors import MarlkitError, OptionError
from marlkit.options import PositiveInt
from marlkit.spec import Continuous, Discrete, TeamSpec


class TorchrlEnvironment(AdapterEnvironment[TensorDictBase]):
    """A TorchRL environment made by a function of yours or by a class of TorchRL.

    Its agents must be stacked in one group, with the action under ``(group, "action")`` as in TorchRL's `VmasEnv` and in its
    `PettingZooEnv` with one group; an environment whose action is simply ``"action"`` has one agent. The group's
    ``"observation"`` is read (or, where there is none, all its observations but ``"info"`` and masks), flattened; so are
    ``"state"``, ``(group, "action_mask")`` and ``(group, "mask")`` (which agents are alive) where they exist. Each agent chooses
    one number of actions or one of numbered choices; several choices at once are refused.

    An episode ends where the environment says so at its root, or where every agent's own has ended; it then terminated if every
    agent's did, and was cut otherwise. An agent whose own episode ends before is no longer alive, and unless rewards are shared
    nothing is bootstrapped after its true end. `max_steps` truncates besides; only finished environments are reset.

    The state of most simulators cannot be exported. An environment that offers ``export_state()`` (plain data and tensors) and
    ``import_state(state)`` resumes exactly; with any other a run can be saved and its policy used, but not resumed.

    Args:
        runtime: device and seed.
        factory: dotted path of a callable that returns a TorchRL environment.
        actions: whether the actions are continuous or discrete; must agree with what the environment takes.
        options: keyword arguments of the callable.
        num_envs: number of environments B; handed to a callable that takes `num_envs`, and otherwise the batch size that the
            environment must have; one without a batch is made B times.
        max_steps, reward: as in :class:`AdapterEnvironment`.

    Raises:
        OptionError: the callable cannot be imported or fails, or what it returns does not fit the description above.
    """

    contract = Contract(
        writes=WRITES,
        traits=(
            When("actions=continuous", ("continuous",)),
            When("actions=discrete", ("discrete",)),
            *POOLED,
        ),
        check="marlkit.envs._factory:check",
        code="marlkit.envs._factory:code",
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        factory: str,
        actions: Literal["continuous", "discrete"],
        options: dict[str, Any] | None = None,
        num_envs: PositiveInt = 1,
        max_steps: PositiveInt | None = None,
        reward: Pooling = "individual",
    ) -> None:
        super().__init__(runtime, num_envs=num_envs, max_steps=max_steps, reward=reward)
        with rng.isolated(runtime.seed):
            self.env = _build(factory, dict(options or {}), num_envs).to(runtime.device)
            self.env.set_seed(runtime.seed)
            self._layout = _Layout(self.env)
            try:
                self._now = self.env.reset()
            except Exception as error:
                raise OptionError("factory", f"`{factory}` fails when it is reset: {type(error).__name__}: {error}") from error
        self.prepare(self._team_spec(actions))
        nobody = torch.zeros(num_envs, self.spec.n_agents, 1, dtype=torch.bool, device=self.device)
        self._ended, self._ended_truly = nobody, nobody

    def seed(self, seed: int) -> None:
        """Seed the generators of the environment, such as those of Gymnasium's."""
        self.env.set_seed(seed)

    def restart(self) -> TensorDictBase:
        """Reset the environment; what it shows, batch ``[B]``."""
        self._now = self.env.reset()
        self._ended = self._ended_truly = torch.zeros_like(self._ended)
        return self._now

    def simulate(self, action: Tensor) -> Outcome[TensorDictBase]:
        """One step of the environment with actions ``[B, N]`` or ``[B, N, D]``."""
        self._stepped = self.env.step(self._now.set(self._layout.action_key, self._layout.encode(action)))
        following = self._stepped["next"]
        terminated, truncated = self._layout.ends(following)
        truly, cut = self._layout.own_ends(following)
        self._ended_truly = self._ended_truly | (truly & ~self._ended)
        self._ended = self._ended | truly | cut
        # Where both are said of the whole, its agents know better.
        all_truly = self._ended_truly.all(1)
        terminated = (terminated & (~truncated | ~self._ended.any(1))) | all_truly
        truncated = truncated | self._ended.all(1)
        # What is paid to the team goes on for whoever left it.
        own = self._layout.agents_end and not self.spec.team_reward
        agents = (self._ended_truly, self._ended) if own else None
        return Outcome(following, self._layout.reward(following), terminated, truncated, agents)

    def proceed(self, seen: TensorDictBase, done: Tensor, finished: Tensor) -> TensorDictBase:
        """Reset the environments that are ``done`` ``[B, 1]``; what the environment shows afterwards, batch ``[B]``."""
        self._now = step_mdp(self._stepped)
        if finished.numel():
            for key in self.env.reset_keys:
                place = key[:-1] if isinstance(key, tuple) else ()
                known = self.env.full_done_spec.keys(True, True)
                shape = next(self.env.full_done_spec[end].shape for end in (_of(place, name) for name in FLAGS) if end in known)
                self._now.set(key, done.reshape(self.num_envs, *[1] * (len(shape) - 1)).expand(shape).clone())
            self._now = self.env.reset(self._now)
            self._ended, self._ended_truly = (flags & ~done.unsqueeze(-1) for flags in (self._ended, self._ended_truly))
        return self._now

    # What is read is copied: the environment may write to its own tensors at the next step.

    def observation(self, seen: TensorDictBase) -> Tensor:
        """``[B, N, O]``."""
        return self._layout.observation(seen).clone()

    def state(self, seen: TensorDictBase) -> Tensor | None:
        """The environment's own state ``[B, S]``, where it has one."""
        return None if self._layout.state_size is None else seen["state"].reshape(self.num_envs, -1).float().clone()

    def alive(self, seen: TensorDictBase) -> Tensor:
        """``[B, N, 1]``: those in the environment's mask, where it has one, whose own episode has not ended."""
        found = self._layout.alive(seen)
        return ~self._ended if found is None else found & ~self._ended

    def available(self, seen: TensorDictBase) -> Tensor:
        """``[B, N, A]`` or ``[B, N, D]``; all actions where the environment has no mask of them."""
        found = self._layout.mask(seen)
        return super().available(seen) if found is None else found.clone()

    def _team_spec(self, actions: str) -> TeamSpec:
        layout = self._layout
        found = "discrete" if isinstance(layout.action, Discrete) else "continuous"
        if found != actions:
            raise OptionError("actions", f"the environment's actions are {found} ({layout.action_spec}); set it to {found}")
        observation = layout.observation(self._now)
        return TeamSpec(
            n_agents=observation.shape[1],
            observation=observation.shape[2],
            action=layout.action,
            state=layout.state_size,
            horizon=self.max_steps,
            team_reward=self.pools_reward or layout.shared_reward,
        )

    # --- saving --------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the environment's ``export_state`` returns; without that method a mark that it cannot be resumed."""
        if not hasattr(self.env, "export_state"):
            return {"resumable": False}
        now = self._now.clone().to_dict()
        ended = {"ended": self._ended.clone(), "ended_truly": self._ended_truly.clone()}
        return {"resumable": True, "simulation": self.env.export_state(), "now": now, "steps": self._steps.clone(), **ended}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            MarlkitError: the environment could not export its state, so that it cannot continue exactly.
        """
        if not state["resumable"] or not hasattr(self.env, "import_state"):
            raise MarlkitError(
                f"{type(self.env).__name__} cannot export its state, so the run cannot be resumed exactly. Its policy can be "
                "loaded and evaluated; to resume, give the environment the methods `export_state()` and `import_state(state)`"
            )
        self.env.import_state(state["simulation"])
        self._now = TensorDict(state["now"], batch_size=[self.num_envs], device=self.device)
        self._steps = state["steps"].reshape(-1).to(self.device, copy=True)
        nobody = torch.zeros_like(self._ended)
        self._ended, self._ended_truly = (state.get(name, nobody).to(self.device) for name in ("ended", "ended_truly"))

    def close(self) -> None:
        """Close the environment."""
        if not self.env.is_closed:
            self.env.close()


FLAGS = ("done", "terminated", "truncated")
"""What TorchRL calls the ends of an episode, at the root and within a group."""


class _Layout:
    """Where an environment keeps what is read from it, always with the agents on the axis behind the batch.

    Raises:
        OptionError: there is something that cannot be read as one team.
    """

    def __init__(self, env: EnvBase) -> None:
        if len(env.action_keys) != 1:
            found = ", ".join(keys.name(key) for key in env.action_keys)
            raise _refused(f"the environment has several groups of agents or several actions ({found}); only one can be trained")
        self.batch = env.batch_size[0]
        self.action_key = env.action_keys[0]
        self.group: tuple[str, ...] = self.action_key[:-1] if isinstance(self.action_key, tuple) else ()
        self.action_spec = env.full_action_spec[self.action_key]
        self.action = self._action()
        seen = env.observation_spec
        self._observation_keys = self._find_observations(seen)
        known = set(seen.keys(True, True))
        self.state_size = seen["state"].shape[1:].numel() if "state" in known and self.group else None
        self.agents = self._count(seen[self._observation_keys[0]])
        self._mask_key = self._find_mask(seen, "action_mask", self._features())
        self._alive_key = self._find_mask(seen, "mask", 1)
        self._reward_key = self._find_reward(env)
        self.shared_reward = bool(self.group) and not isinstance(self._reward_key, tuple)
        ends = set(env.full_done_spec.keys(True, True))
        self._flags = {name: name for name in FLAGS if name in ends}
        self._own_flags = {name: (*self.group, name) for name in FLAGS if self.group and (*self.group, name) in ends}

    @property
    def agents_end(self) -> bool:
        """Whether the environment tells the end of every agent's own episode."""
        return bool(self._own_flags)

    # --- reading -------------------------------------------------------------------------------------------------------------

    def observation(self, now: TensorDictBase) -> Tensor:
        parts = [now[key].reshape(self.batch, self.agents, -1).float() for key in self._observation_keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def mask(self, now: TensorDictBase) -> Tensor | None:
        return None if self._mask_key is None else now[self._mask_key].reshape(self.batch, self.agents, -1).bool()

    def alive(self, now: TensorDictBase) -> Tensor | None:
        return None if self._alive_key is None else now[self._alive_key].reshape(self.batch, self.agents, 1).bool()

    def reward(self, following: TensorDictBase) -> Tensor:
        reward = following[self._reward_key].float()
        return reward.reshape(self.batch, -1, 1).expand(-1, self.agents, -1)

    def ends(self, following: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Whether the episode terminated and whether it was cut, ``[B, 1]``, as far as it is said of the whole."""
        return _ends(following, self._flags, self.batch)

    def own_ends(self, following: TensorDictBase) -> tuple[Tensor, Tensor]:
        """The same of every agent, ``[B, N, 1]``."""
        found = _ends(following, self._own_flags, self.batch)
        terminated, truncated = (flags.unsqueeze(-1).expand(-1, self.agents, -1) for flags in found)
        return terminated, truncated

    def encode(self, action: Tensor) -> Tensor:
        """The action in the form of the environment's own spec."""
        if isinstance(self.action_spec, OneHot):
            action = torch.nn.functional.one_hot(action, self.action_spec.space.n)
        converted = action.to(self.action_spec.dtype).reshape(self.action_spec.shape)
        return converted if isinstance(self.action, Discrete) else self.action_spec.project(converted)

    # --- finding out ---------------------------------------------------------------------------------------------------------

    def _action(self) -> Discrete | Continuous:
        spec = self.action_spec
        agents = 2 if self.group else 1
        if type(spec) is Categorical and spec.space.n > 0 and spec.shape[agents:].numel() == 1:
            return Discrete(int(spec.space.n))
        if type(spec) is OneHot and spec.ndim == agents + 1:
            return Discrete(int(spec.space.n))
        is_numbers = isinstance(spec, (Bounded, Unbounded)) and spec.dtype.is_floating_point
        if not is_numbers or -1 in spec.shape or spec.ndim not in (agents, agents + 1):
            raise _refused(
                f"actions of this kind cannot be used: {_in_words(spec)}. Every agent chooses either one of a fixed number of "
                "actions or a vector of real numbers; let a transform of TorchRL's turn others into one of these"
            )
        size = spec.shape[agents:].numel()
        bounds = [bound.expand(spec.shape)[0].reshape(-1, size) for bound in (spec.space.low, spec.space.high)]
        if not isinstance(spec, Bounded) or not all(bound.isfinite().all() for bound in bounds):
            return Continuous(size)
        low, high = (tuple(map(tuple, bound.tolist())) for bound in bounds)
        return Continuous(size, low, high)

    def _features(self) -> int:
        return self.action.n if isinstance(self.action, Discrete) else self.action.size

    def _count(self, spec: Any) -> int:
        """Number of agents, on which actions and observations agree."""
        if not self.group:
            return 1
        acting, seeing = self.action_spec.shape[1], spec.shape[1] if spec.ndim > 1 else 0
        if acting != seeing:
            raise _refused(f"actions are of {acting} agents and observations of {seeing}; both begin with [num_envs, agents]")
        return int(acting)

    def _find_observations(self, spec: Any) -> list[Any]:
        found = [key if isinstance(key, tuple) else (key,) for key in spec.keys(True, True)]
        depth = len(self.group)
        inside = [key for key in found if key[:depth] == self.group and (depth or len(key) == 1)]
        chosen = [key for key in inside if key[depth] == "observation"]
        if not chosen:
            chosen = [key for key in inside if key[depth] not in {"info", "mask", "action_mask", "state"}]
        if not chosen:
            raise _refused(f"nothing to observe was found; the environment has {sorted(map(keys.name, found))}")
        for key in chosen:
            if isinstance(spec[key], NonTensor) or -1 in spec[key].shape:
                problem = "must be numbers of a fixed shape, the same for every agent"
                raise _refused(f"the observation `{keys.name(key)}` {problem}, not {_in_words(spec[key])}")
        return sorted(chosen)

    def _find_mask(self, spec: Any, name: str, size: int) -> Any:
        key = (*self.group, name) if self.group else name
        if key not in set(spec.keys(True, True)):
            return None
        if spec[key].shape.numel() != self.batch * self.agents * size:
            wanted = f"[{self.batch}, {self.agents}, {size}]"
            raise _refused(f"`{keys.name(key)}` has the shape {list(spec[key].shape)}, not {wanted}")
        return key

    def _find_reward(self, env: EnvBase) -> Any:
        wanted = [(*self.group, "reward"), "reward"] if self.group else ["reward"]
        found = [key for key in wanted if key in env.reward_keys] or list(env.reward_keys)
        size = env.full_reward_spec[found[0]].shape[1:].numel()
        if (len(found) > 1 and found[0] not in wanted) or size not in (1, self.agents):
            names = ", ".join(f"{keys.name(key)} {list(env.full_reward_spec[key].shape)}" for key in env.reward_keys)
            raise _refused(f"the rewards must be one number for each of {self.agents} agents or one for all, not {names}")
        return found[0]


def _refused(message: str) -> OptionError:
    return OptionError("factory", message)


def _in_words(spec: Any) -> str:
    return f"{type(spec).__name__}, {spec.dtype}, of the shape {list(spec.shape)}"


def _of(place: tuple[str, ...], name: str) -> Any:
    return (*place, name) if place else name


def _ends(following: TensorDictBase, flags: dict[str, Any], batch: int) -> tuple[Tensor, Tensor]:
    """Terminated and truncated ``[B, K]`` from what there is of TorchRL's three flags; what is only done has terminated."""
    found = {name: following[key].reshape(batch, -1).bool() for name, key in flags.items()}
    none = torch.zeros(batch, 1, dtype=torch.bool, device=following.device)
    done, truncated = found.get("done", none), found.get("truncated", none)
    terminated = found.get("terminated", done & ~truncated)
    return terminated, truncated | (done & ~terminated)


def _build(factory: str, options: dict[str, Any], num_envs: int) -> EnvBase:
    make = _load(factory)
    # A class of TorchRL hides its arguments behind a metaclass; its constructor does not.
    constructor = vars(make).get("__init__", make) if isinstance(make, type) else make
    if "num_envs" in inspect.signature(constructor).parameters:
        options = {"num_envs": num_envs, **options}

    def one() -> EnvBase:
        try:
            made = make(**options)
        except Exception as error:
            raise OptionError("options", f"`{factory}` fails with {options}: {type(error).__name__}: {error}") from error
        if not isinstance(made, EnvBase):
            raise OptionError("factory", f"`{factory}` returned {type(made).__name__}, not a torchrl.envs.EnvBase")
        return made

    env = one()
    if env.batch_size == (num_envs,):
        return env
    if len(env.batch_size) > 1:
        raise _refused(f"the environment has the batch size {list(env.batch_size)}; it must have one dimension, or none")
    if env.batch_size:
        raise OptionError(
            "num_envs", f"the environment has the batch size {list(env.batch_size)}; set num_envs to {env.batch_size[0]}"
        )
    first = [env]
    return SerialEnv(num_envs, lambda: first.pop() if first else one())


def _load(factory: str) -> Callable[..., Any]:
    module, _, name = factory.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError("factory", f"`{factory}` cannot be imported: {error}") from error
    if not callable(found):
        raise OptionError("factory", f"`{factory}` is no function or class")
    return found
