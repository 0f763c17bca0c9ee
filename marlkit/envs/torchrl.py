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
from torchrl.data import Bounded, Categorical, OneHot, Unbounded
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
    ``"state"``, ``(group, "action_mask")`` and ``(group, "mask")`` (which agents are alive) where they exist. A ``"truncated"``
    of the environment itself is kept, and `max_steps` truncates besides; only finished environments are reset.

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
            self._now = self.env.reset()
        self.prepare(self._team_spec(actions))

    def seed(self, seed: int) -> None:
        """Seed the generators of the environment, such as those of Gymnasium's."""
        self.env.set_seed(seed)

    def restart(self) -> TensorDictBase:
        """Reset the environment; what it shows, batch ``[B]``."""
        self._now = self.env.reset()
        return self._now

    def simulate(self, action: Tensor) -> Outcome[TensorDictBase]:
        """One step of the environment with actions ``[B, N]`` or ``[B, N, D]``."""
        self._stepped = self.env.step(self._now.set(self._layout.action_key, self._layout.encode(action)))
        following = self._stepped["next"]
        return Outcome(following, self._layout.reward(following, self.spec.n_agents), *self._layout.ends(following))

    def proceed(self, seen: TensorDictBase, done: Tensor, finished: Tensor) -> TensorDictBase:
        """Reset the environments that are ``done`` ``[B, 1]``; what the environment shows afterwards, batch ``[B]``."""
        self._now = step_mdp(self._stepped)
        if finished.numel():
            for key in self.env.reset_keys:
                place = key[:-1] if isinstance(key, tuple) else ()
                shape = self.env.full_done_spec[(*place, "done")].shape
                self._now.set(key, done.reshape(self.num_envs, *[1] * (len(shape) - 1)).expand(shape).clone())
            self._now = self.env.reset(self._now)
        return self._now

    # What is read is copied: the environment may write to its own tensors at the next step.

    def observation(self, seen: TensorDictBase) -> Tensor:
        """``[B, N, O]``."""
        return self._layout.observation(seen).clone()

    def state(self, seen: TensorDictBase) -> Tensor | None:
        """The environment's own state ``[B, S]``, where it has one."""
        return None if self._layout.state_size is None else seen["state"].reshape(self.num_envs, -1).float().clone()

    def alive(self, seen: TensorDictBase) -> Tensor:
        """``[B, N, 1]``; all agents where the environment has no mask of them."""
        found = self._layout.alive(seen, self.spec.n_agents)
        return super().alive(seen) if found is None else found.clone()

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
        return {"resumable": True, "simulation": self.env.export_state(), "now": now, "steps": self._steps.clone()}

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

    def close(self) -> None:
        """Close the environment."""
        if not self.env.is_closed:
            self.env.close()


class _Layout:
    """Where an environment keeps what is read from it, always with the agents on the axis behind the batch."""

    def __init__(self, env: EnvBase) -> None:
        if len(env.action_keys) != 1:
            found = ", ".join(keys.name(key) for key in env.action_keys)
            raise OptionError("factory", f"the environment has several groups of agents ({found}); only one can be trained")
        self.batch = env.batch_size[0]
        self.action_key = env.action_keys[0]
        self.group: tuple[str, ...] = self.action_key[:-1] if isinstance(self.action_key, tuple) else ()
        self.action_spec = env.full_action_spec[self.action_key]
        self.action = self._action()
        self._observation_keys = self._find_observations(env.observation_spec)
        known = set(env.observation_spec.keys(True, True))
        self.state_size = env.observation_spec["state"].shape[1:].numel() if "state" in known and self.group else None
        self._mask_key = self._within(known, "action_mask")
        self._alive_key = self._within(known, "mask")
        self._reward_key = env.reward_keys[0]
        self.shared_reward = bool(self.group) and not isinstance(self._reward_key, tuple)
        ends = set(env.full_done_spec.keys(True, True))
        self._ends = [self._end_key(ends, name) for name in ("terminated", "truncated")]

    # --- reading -------------------------------------------------------------------------------------------------------------

    def observation(self, now: TensorDictBase) -> Tensor:
        parts = [self._per_agent(now[key]).flatten(2).float() for key in self._observation_keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def mask(self, now: TensorDictBase) -> Tensor | None:
        return None if self._mask_key is None else self._per_agent(now[self._mask_key])

    def alive(self, now: TensorDictBase, n_agents: int) -> Tensor | None:
        if self._alive_key is None:
            return None
        return self._per_agent(now[self._alive_key]).reshape(self.batch, n_agents, 1)

    def reward(self, following: TensorDictBase, n_agents: int) -> Tensor:
        reward = following[self._reward_key].float()
        return reward.reshape(self.batch, -1, 1).expand(-1, n_agents, -1)

    def ends(self, following: TensorDictBase) -> tuple[Tensor, Tensor]:
        """Terminated and truncated ``[B, 1]``; where only the agents have such flags, all of them must be raised."""
        ended = []
        for key in self._ends:
            flags = following[key] if key is not None else torch.zeros(self.batch, 1, dtype=torch.bool, device=following.device)
            ended.append(flags.reshape(self.batch, -1).all(1, keepdim=True))
        return ended[0], ended[1]

    def encode(self, action: Tensor) -> Tensor:
        """The action in the form of the environment's own spec."""
        if isinstance(self.action_spec, OneHot):
            return self._own(torch.nn.functional.one_hot(action, self.action_spec.space.n).to(self.action_spec.dtype))
        if isinstance(self.action_spec, Categorical):
            return self._own(action).reshape(self.action_spec.shape)
        return self.action_spec.project(self._own(action.to(self.action_spec.dtype)))

    def _own(self, action: Tensor) -> Tensor:
        return action if self.group else action.squeeze(1)

    def _per_agent(self, tensor: Tensor) -> Tensor:
        return tensor if self.group else tensor.unsqueeze(1)

    # --- finding out ---------------------------------------------------------------------------------------------------------

    def _action(self) -> Discrete | Continuous:
        spec = self.action_spec
        if isinstance(spec, (OneHot, Categorical)):
            return Discrete(int(spec.space.n))
        if not isinstance(spec, (Bounded, Unbounded)) or -1 in spec.shape or spec.ndim > (3 if self.group else 2):
            raise OptionError(
                "factory", f"actions of this kind cannot be used: {spec}. They must be numbers or one choice per agent"
            )
        size = spec.shape[-1]
        if isinstance(spec, Unbounded) or not all(bound.isfinite().all() for bound in (spec.space.low, spec.space.high)):
            return Continuous(size)
        bounds = [bound.expand(spec.shape)[0].reshape(-1, size).tolist() for bound in (spec.space.low, spec.space.high)]
        low, high = (tuple(map(tuple, bound)) for bound in bounds)
        return Continuous(size, low, high)

    def _find_observations(self, spec: Any) -> list[Any]:
        found = [key if isinstance(key, tuple) else (key,) for key in spec.keys(True, True)]
        depth = len(self.group)
        inside = [key for key in found if key[:depth] == self.group and (depth or len(key) == 1)]
        chosen = [key for key in inside if key[depth] == "observation"]
        if not chosen:
            chosen = [key for key in inside if key[depth] not in {"info", "mask", "action_mask", "state"}]
        if not chosen:
            raise OptionError("factory", f"nothing to observe was found; the environment has {sorted(map(keys.name, found))}")
        return sorted(chosen)

    def _within(self, known: set[Any], name: str) -> Any:
        key = (*self.group, name) if self.group else name
        return key if key in known else None

    def _end_key(self, known: set[Any], name: str) -> Any:
        return name if name in known else self._within(known, name)


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
