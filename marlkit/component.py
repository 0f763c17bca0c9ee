"""The base class of each kind of component: what it is given, what it must do, what it says of itself.

A component reads and writes keys of :mod:`marlkit.keys` and knows others only by keys and traits, never by class or name.
Its keyword-only constructor arguments are its options in a recipe; their defaults live there and nowhere else.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, get_type_hints

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn.probabilistic import InteractionType, interaction_type
from torch import Tensor, nn

from marlkit import keys
from marlkit.contract import KINDS, Contract, carried
from marlkit.errors import MarlkitError, OptionError
from marlkit.keys import Key
from marlkit.learning import Afterwards, Learning, Metrics, RunStep, at_once, run_directly
from marlkit.nn.distributions import AgentDistribution, TeamDistribution
from marlkit.nn.networks import GroupedParameters
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import CompileMode, problem_with, with_those_above
from marlkit.ranks import ALONE, Ranks
from marlkit.spec import TeamSpec


@dataclass(frozen=True)
class Runtime:
    """Where, with which seed and how an environment runs; not part of a recipe's `env` section.

    Attributes:
        device: where its tensors live.
        seed: decides its random choices.
        compile: ``record`` replays recorded operations, ``graph`` the same as a CUDA graph (:mod:`marlkit.recorder.recording`);
            an environment whose steps cannot be recorded, or do not gain by it, takes them as with ``none``.
        load_actor: gives the trained actor of a run folder; ``None`` outside of recipes.
    """

    device: torch.device
    seed: int
    compile: CompileMode = "none"
    load_actor: Callable[[str], Actor] | None = None


def option_parameters(component: type) -> dict[str, inspect.Parameter]:
    """The options of a component class: its keyword-only constructor arguments, annotations resolved.

    Where the constructor ends in ``**options``, it hands them to the one above it, whose options count too; each has its default
    in the nearest constructor that names it.
    """
    found: dict[str, inspect.Parameter] = {}
    for constructor in (vars(cls)["__init__"] for cls in component.__mro__ if "__init__" in vars(cls)):
        hints = get_type_hints(constructor, include_extras=True)
        parameters = inspect.signature(constructor).parameters.values()
        own = {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in parameters if p.kind is p.KEYWORD_ONLY}
        found = with_those_above(found, own)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return found


class Component:
    """Base of all kinds.

    Attributes:
        contract: what the class reads, writes, needs and has; literals only, so that it can be read without importing it.
        options: the completed options of this instance, defaults included.
        spec: the team that it was built for.

    Raises:
        OptionError: an option has a value outside what its annotation allows.
    """

    contract: ClassVar[Contract] = Contract()
    options: dict[str, Any]
    spec: TeamSpec

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Check the options against the constructor's annotations before the constructor runs."""
        instance = super().__new__(cls)
        completed: dict[str, Any] = {}
        for name, parameter in option_parameters(cls).items():
            if name in kwargs:
                problem = problem_with(kwargs[name], parameter.annotation)
                if problem:
                    raise OptionError(name, problem)
                completed[name] = kwargs[name]
            elif parameter.default is not inspect.Parameter.empty:
                completed[name] = parameter.default
        object.__setattr__(instance, "options", completed)
        return instance

    # Options and spec do not change after the constructor, and these are read several times a step.

    @cached_property
    def reads(self) -> tuple[Key, ...]:
        """Keys that must be present when this component runs, those of its parts included."""
        return self._resolved("reads")

    @cached_property
    def writes(self) -> tuple[Key, ...]:
        """Keys that this component adds, those of its parts included."""
        return self._resolved("writes")

    @cached_property
    def traits(self) -> frozenset[str]:
        """Facts about this component that others may need, those that it inherits from its parts included."""
        own = self.contract.resolve("traits", self.options, self.spec.traits)
        return self.contract.all_traits(own, {name: part.traits for name, part in self._parts().items()})

    @cached_property
    def carried(self) -> tuple[Key, ...]:
        """Keys that it reads and writes anew for the next step, such as the hidden state of a recurrent actor."""
        return carried(self.reads, self.writes)

    def _parts(self) -> dict[str, Component]:
        return {name: part for name, part in self.options.items() if isinstance(part, Component)}

    def _resolved(self, field_name: str) -> tuple[Any, ...]:
        own = self.contract.resolve(field_name, self.options, self.spec.traits)
        return tuple(dict.fromkeys([*own, *(entry for part in self._parts().values() for entry in getattr(part, field_name))]))


if TYPE_CHECKING:
    # tensordict has no types: a base class of type Any would switch off the checks of every component.
    TensorDictModuleBase = nn.Module
else:
    from tensordict.nn import TensorDictModuleBase


class ModuleComponent(Component, TensorDictModuleBase):
    """A component that is a module of tensordict: it reads ``in_keys`` and writes ``out_keys``, the keys of its contract.

    It composes with ``TensorDictSequential`` and with TorchRL's collectors and losses.
    """

    @property
    def in_keys(self) -> list[Key]:
        """The keys that it reads."""
        return list(self.reads)

    @property
    def out_keys_source(self) -> list[Key]:
        """The keys that it writes."""
        return list(self.writes)

    @property
    def out_keys(self) -> list[Key]:
        """The keys that it writes, or those of them that ``select_out_keys`` has kept."""
        return list(self.writes) if self._selected is None else self._selected

    @out_keys.setter
    def out_keys(self, selected: list[Key]) -> None:
        self._selected = None if list(selected) == list(self.writes) else list(selected)

    _selected: list[Key] | None = None

    def agent_parameters(self, agents: Sequence[int]) -> Iterable[nn.Parameter]:
        """Parameters of ``agents`` alone, in one order for every agent (trait ``separate_parameters``).

        Those of all :class:`marlkit.nn.networks.GroupedParameters` within; override for parameters that are kept otherwise.

        Raises:
            NotImplementedError: agents share parameters.
        """
        if "separate_parameters" not in self.traits:
            raise NotImplementedError(f"{type(self).__name__} does not keep separate parameters per agent")
        grouped = [module for module in self.modules() if isinstance(module, GroupedParameters)]
        return [parameter for module in grouped for parameter in module.agent_parameters(agents)]

    def shared_parameters(self, agent: int) -> Iterable[nn.Parameter]:
        """Those of ``agent_parameters([agent])`` on which agents agree by consensus, in one order for every agent.

        All of them, unless a component keeps some individual: F2A2 shares ``w_sh`` and keeps ``w_in`` (Li et al. 2023, eq. 4.5).
        """
        return self.agent_parameters([agent])


class Environment(Component, ABC):
    """A batch of environments that step together and reset themselves.

    Its constructor takes a :class:`Runtime` first. ``num_envs`` B is an option of every environment.
    """

    num_envs: int
    device: torch.device

    def seed(self, seed: int) -> None:
        """Seed the random generators that the environment keeps itself; nothing where it draws from the global ones.

        Called before the reset of every evaluation, with the global generators seeded: equal seeds give equal episodes.
        """

    @abstractmethod
    def reset(self) -> TensorDict:
        """Start every environment anew and return what the agents see: batch ``[B]``, all current keys of the contract."""

    @abstractmethod
    def step(self, action: Tensor) -> tuple[TensorDict, TensorDict]:
        """Take one joint step.

        Args:
            action: ``[B, N]`` int64 or ``[B, N, D]`` float in the environment's units (clipped to its bounds here).

        Returns:
            ``(arrived, current)``, each of batch ``[B]``. ``arrived`` is what a rollout stores under ``"next"``: the state
            before any reset, with reward, terminated, truncated and done. ``current`` is where the next step starts: equal
            to ``arrived`` except in the environments that finished, which have been reset. Neither may be written to later.
            Where agents may end before the episode does, ``arrived`` also has ``keys.AGENT_ENDS``, which no contract declares.
        """

    def refuse_unfit_action(self, action: Tensor, who: str) -> None:
        """Check the shape ``[B, N]`` or ``[B, N, D]`` and the type of an action; not its values, which would wait for the device.

        Raises:
            MarlkitError: it is not what the team spec says; the message begins with ``who``.
        """
        spec = self.spec
        shape = (self.num_envs, spec.n_agents) if spec.discrete else (self.num_envs, spec.n_agents, spec.action_features)
        if action.shape != shape or action.is_floating_point() == spec.discrete:
            wanted = "whole numbers [B, N]" if spec.discrete else "floating-point numbers [B, N, D]"
            raise MarlkitError(f"{who} takes actions as {wanted} = {list(shape)}, got {action.dtype} {list(action.shape)}")

    def refuse_unequal_rewards(self, reward: Tensor) -> None:
        """Check that all agents receive the same rewards, or sums of them, ``[*, N, 1]`` where the team spec says so.

        Raises:
            MarlkitError: they do not; says by how much.
        """
        if not self.spec.team_reward or self.spec.n_agents < 2:
            return
        apart = (reward - reward[..., :1, :]).abs().amax().item()
        if apart > 0:
            raise MarlkitError(
                f"{type(self).__name__} says that all agents always receive the same reward (`team_reward` of its team spec), "
                f"but paid one of them {apart:g} more or less than another. Pay all the same, or set it to false"
            )

    @cached_property
    def traits(self) -> frozenset[str]:
        """What its contract says under its options, and what its team spec says."""
        return super().traits | self.spec.traits

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of the simulation, as plain data and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""

    def draw(self, index: int = 0) -> Any:
        """Picture of environment ``index`` as an RGB array ``[height, width, 3]`` uint8; ``None`` where it has none."""
        return None

    def close(self) -> None:
        """Give back what the environment holds."""


class Actor(ModuleComponent, ABC):
    """Chooses the agents' actions.

    A recurrent actor reads ``HIDDEN`` and ``IS_FIRST`` and writes the ``HIDDEN`` of the next step, which the player carries there
    (:attr:`carried`). With one batch dimension every row is one step and starts from its own ``HIDDEN``; with two, ``[M, L]``,
    every row is a sequence that starts from ``HIDDEN[:, 0]`` and returns to zero where ``IS_FIRST`` holds.

    ``ACTION_MASK`` and ``ACTION_DIMS`` may be left out where every agent has all the actions of its own space, as in TorchRL's
    environments: :meth:`available` then follows from the team spec.
    """

    sequence_length: int | None = None
    """Steps over which a recurrent actor is trained; ``None`` for actors without memory."""

    @abstractmethod
    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        """The distribution of the actions, of all agents ``[*, N]`` or of ``agents`` only (trait ``independent_agents``).

        An autoregressive actor conditions agent i on the stored actions of the agents before it.
        """

    @abstractmethod
    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        """Choose actions as they are played, batch ``[*]``: writes ``ACTION``, ``LOG_PROB`` and the distribution's parameters.

        Whatever explores belongs in here, so that ``LOG_PROB`` is that of the behaviour.
        """

    def __call__(self, batch: TensorDictBase, deterministic: bool | None = None) -> Any:
        """As :meth:`forward`; where ``deterministic`` is not given, TorchRL's ``set_exploration_type`` decides it."""
        if deterministic is None:
            deterministic = interaction_type() not in (None, InteractionType.RANDOM)
        return super().__call__(batch, deterministic=deterministic)

    def bootstrap(self, batch: TensorDictBase) -> TensorDictBase:
        """Choose the actions that a value is bootstrapped with, for a batch ``[*]``: as :meth:`forward` without exploration."""
        return self(batch)

    def write_choice(self, batch: TensorDictBase, policy: TeamDistribution, action: Tensor) -> TensorDictBase:
        """Write what every actor writes of an ``action`` ``[*, N]`` or ``[*, N, D]`` chosen from ``policy``."""
        batch.set(keys.ACTION, action).set(keys.LOG_PROB, policy.log_prob(action))
        for key, value in policy.parameters().items():
            batch.set(key, value)
        return batch

    def reparametrised(self, batch: TensorDictBase) -> Tensor:
        """A fresh action of every agent with gradient, ``[*, N, F]`` (trait ``reparametrised``).

        ``F`` counts action dimensions, or discrete actions (one-hot, with the gradient of a relaxation).
        """
        raise NotImplementedError(f"{type(self).__name__} has no actions with gradient")

    def schedule(self, progress: float) -> None:
        """Called at the start of every iteration with the share of the training that is done; for exploration that fades.

        What fades is held in a buffer, filled in place: a number in an attribute makes steps be recorded anew, or no more
        (``trainer.compile``).
        """

    def initial_state(self, batch_size: int) -> dict[Key, Tensor]:
        """What the carried keys hold before the first step: for recurrent actors a ``HIDDEN`` of zeros, ``[B, N, H]``."""
        return {}

    def available(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> Tensor:
        """Actions or action dimensions that all agents, or ``agents``, have: ``[*, n, A]`` or ``[*, n, D]`` bool."""
        found = batch.get(keys.ACTION_MASK if self.spec.discrete else keys.ACTION_DIMS, None)
        if found is None:
            sizes = torch.tensor(self.spec.own_action_sizes, device=batch[keys.OBSERVATION].device).unsqueeze(-1)
            own = torch.arange(self.spec.action_features, device=sizes.device) < sizes
            found = own.expand(*batch.batch_size, *own.shape)
        return found if agents is None else found[..., list(agents), :]

    def get_dist(self, batch: TensorDictBase) -> AgentDistribution:
        """The distribution of the actions as one of torch, for TorchRL's losses; its log-probabilities are ``[*, N, 1]``."""
        return AgentDistribution(self.distribution(batch))

    def make_tensordict_primer(self) -> Any:
        """TorchRL's transform that starts the carried keys of an environment, as TorchRL's own recurrent modules make it.

        For recurrent actors in ``TransformedEnv``; beside it, ``InitTracker(init_key="is_first")`` writes ``IS_FIRST``.
        """
        from torchrl.data import Composite, Unbounded
        from torchrl.envs import TensorDictPrimer

        primers = Composite()
        for key, value in self.initial_state(1).items():
            group = key[:-1] if isinstance(key, tuple) else ()
            if group and group not in primers.keys(include_nested=True):
                # As TorchRL's environments, whose groups have the batch size [B, N].
                primers[group] = Composite(shape=(self.spec.n_agents,))
            primers[key] = Unbounded(shape=value.shape[1:])
        return TensorDictPrimer(primers, expand_specs=True)


class Opponents(ModuleComponent, ABC):
    """Models what each agent believes of the others' policies.

    It reads ``RECENT_*`` of the ``history`` steps before each step, if that is not 0, and is trained beside the policy.
    """

    history: int = 0
    """Number of steps M before each step that it reads; 0: none."""

    wanted: frozenset[Key] | None = None
    """The keys that other components read; others need not be written. ``None``: all."""

    @abstractmethod
    def forward(self, batch: TensorDictBase, played: bool = True) -> TensorDictBase:
        """Write the beliefs under ``"opponents"``, without gradient.

        Args:
            batch: of any batch size ``[*]``.
            played: whether ``ACTION`` is what the agents really did. If not, each agent has only chosen its own, and the others'
                are what it believes: agent i's ``JOINT_ACTION`` holds its own ``ACTION`` and its beliefs of the rest.
        """

    def reads_for(self, beliefs: Sequence[Key]) -> tuple[Key, ...]:
        """What has to be there for these of the keys that it writes; nothing for none."""
        return tuple(self.reads) if beliefs else ()

    def observe(self, played: TensorDictBase) -> None:
        """See the steps ``[B, T]`` that were just played, once, in order."""

    def fit(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """Train on a batch ``[B, T]``, after every update; nothing where there is nothing to learn."""
        return {}


class Critic(ModuleComponent, ABC):
    """Predicts values.

    The network predicts in normalised units; :meth:`forward` writes real units. ``normaliser`` converts between them (the
    identity unless value normalisation is on), and the update regresses in normalised units.
    """

    normaliser: ValueNormaliser

    @cached_property
    def predicts(self) -> Key:
        """The key that is regressed on the value target, conditions of the contract resolved."""
        found = self.contract.predicted(self.options, self.spec.traits)
        assert found is not None, f"{type(self).__name__} declares no `predicts`"
        return found

    @property
    def averaged_samples(self) -> float:
        """Number K of samples of the others' actions that a value is the mean over: 1, infinity for the exact mean."""
        return 1.0

    @abstractmethod
    def predict(self, batch: TensorDictBase) -> Tensor:
        """The prediction of :attr:`predicts` in normalised units, with gradient: ``[*, N, 1]``.

        A critic of several networks, such as twins, gives the least of theirs (:func:`least`).
        """

    def predictions(self, batch: TensorDictBase) -> Tensor:
        """The predictions of each of its K networks, all of which updates regress: ``[K, *, N, 1]``. K is 1 unless overridden."""
        return self.predict(batch).unsqueeze(0)

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write the prediction ``[*, N, 1]`` in real units."""
        return batch.set(self.predicts, self.normaliser.denormalise(self.predict(batch)))

    @torch.no_grad()
    def learn_scale(self, target: Tensor, ranks: Ranks = ALONE, counted: Tensor | None = None) -> None:
        """Update the normaliser with targets ``[*]`` in real units, or those ``counted``; with PopArt no value changes."""
        if not self.normaliser.rescales:
            self.normaliser.update(target, ranks, counted)
            return
        before = self.normaliser.mean_and_deviation()
        self.normaliser.update(target, ranks, counted)
        self.rescale(*self.normaliser.change_since(before))

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each, in the last layer (``value_norm: popart``)."""
        raise NotImplementedError(f"{type(self).__name__} cannot rewrite its last layer")

    def action_value(self, batch: TensorDictBase, own: Tensor, joint: Tensor) -> Tensor:
        """``Q_i`` of joint actions that agent i views, by each network: ``[K, *, N, 1]`` (trait ``differentiable_in_action``).

        In normalised units.

        Args:
            batch: what the critic reads, its actions aside.
            own: ``[*, N, F]``: action of agent i in its own view, one-hot (or a relaxation) where discrete; may carry a gradient.
            joint: ``[*, V, N, F]``: the actions of all in each view; agent i's own entry in its own view is replaced by ``own``.
        """
        raise NotImplementedError(f"{type(self).__name__} is no differentiable function of the actions")

    def action_values(self, batch: TensorDictBase) -> Tensor:
        """``Q_i`` of every own action, by each network, in normalised units: ``[K, *, N, A]`` (trait ``action_values``)."""
        raise NotImplementedError(f"{type(self).__name__} does not value every own action")


def least(values: Tensor) -> Tensor:
    """The smallest of the predictions ``[K, *]`` of K networks, ``[*]``; of one network its own (Fujimoto et al. 2018)."""
    return values.squeeze(0) if len(values) == 1 else values.amin(0)


def each(values: Tensor) -> tuple[Tensor, ...]:
    """The predictions of each of K networks, ``[*]``, from ``[K, *]``; of one network a view without a copy in its gradient."""
    return (values.squeeze(0),) if len(values) == 1 else values.unbind(0)


class Targets(Component, nn.Module, ABC):
    """What values are bootstrapped with: the online networks themselves, or copies that lag behind (trait ``lagging``).

    The estimator's values at ``next`` come from :meth:`critic`, on actions that :meth:`actor` chooses where they were not played.
    """

    @abstractmethod
    def track(self, actor: Actor, critic: Critic) -> None:
        """Start from equal copies of the online networks; called once, when the learner is built."""

    @abstractmethod
    def actor(self) -> Actor:
        """The policy whose actions a value is bootstrapped with."""

    @abstractmethod
    def critic(self) -> Critic:
        """The critic that values them."""

    def chooser(self) -> Actor:
        """The policy that chooses these actions off policy, if not :meth:`actor`, whose values of them then count."""
        return self.actor()

    def follow(self, changed: Sequence[str], afterwards: Afterwards = at_once) -> None:
        """An optimiser step has changed these of ``"actor"`` and ``"critic"``; ``afterwards`` runs what is Python after it."""


class Estimator(ModuleComponent, ABC):
    """Turns rewards and values into value targets, and into advantages where there is a baseline.

    Beside what it reads, it is given the agents' own ends (``keys.AGENT_ENDS``) where the environment writes them: the return of
    an agent then ends with the agent, not with the episode.
    """

    def observe(self, played: TensorDictBase, ranks: Ranks = ALONE) -> None:
        """See the steps ``[B, T]`` that were just played, once, before any batch is estimated; for running statistics.

        These are held in buffers, and are the same on all ``ranks``.
        """

    @property
    def discount(self) -> float | None:
        """The discount factor: its option ``gamma``, or that of an estimator that it holds; ``None`` where there is none."""
        parts = (part.discount for part in self._parts().values() if isinstance(part, Estimator))
        return self.options["gamma"] if "gamma" in self.options else next(parts, None)

    def rewards(self, batch: TensorDictBase) -> Tensor:
        """The rewards that returns are made of, ``[B, T, N, 1]``: those received, unless it changes them."""
        parts = (part.rewards(batch) for part in self._parts().values() if isinstance(part, Estimator))
        return next(parts, batch[keys.REWARD])

    @abstractmethod
    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        """Write ``VALUE_TARGET`` and, where declared, ``ADVANTAGE`` on a batch ``[B, T]``; no gradient."""


class Optimizer(Component, ABC):
    """Builds the optimiser of the parameters and changes its learning rates linearly over the training.

    Every optimiser has the options ``lr``, ``critic_lr`` (``None``: the same) and ``lr_end`` (the share of the rates left at
    the end).
    """

    lr: float
    critic_lr: float | None
    lr_end: float

    @abstractmethod
    def build(self, parameters: dict[str, list[nn.Parameter]]) -> torch.optim.Optimizer:
        """One torch optimiser with a parameter group per entry of ``parameters`` (``"actor"``, ``"critic"``, …)."""

    def groups(self, parameters: dict[str, list[nn.Parameter]]) -> list[dict[str, Any]]:
        """Parameter groups for torch; each remembers its initial learning rate for :meth:`schedule`."""
        rates = {"critic": self.lr if self.critic_lr is None else self.critic_lr}
        chosen = {name: rates.get(name, self.lr) for name in parameters}
        return [{"params": own, "lr": chosen[name], "initial_lr": chosen[name]} for name, own in parameters.items()]

    def schedule(self, optimizer: torch.optim.Optimizer, progress: float) -> None:
        """``lr(p) = lr (1 - (1 - lr_end) p)`` for the share ``p`` of the training that is done."""
        for group in optimizer.param_groups:
            rate = group["initial_lr"] * (1 - (1 - self.lr_end) * progress)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class Update(Component, nn.Module, ABC):
    """Changes the parameters from an estimated batch."""

    def attach(self, actor: Actor, critic: Critic) -> None:
        """Called once, when the learner is built, before any state is loaded: for updates that keep state of parameters."""

    @abstractmethod
    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """Losses, gradients, parameters. ``batch`` is ``[B, T]`` with every key that the update reads."""

    def prepare(self, batch: TensorDictBase, learning: Learning) -> TensorDictBase:
        """What is computed of a batch ``[B, T]`` once per iteration, before any parameter moves (trait ``per_agent``)."""
        raise NotImplementedError(f"{type(self).__name__} does not update agents one by one")

    def fit_policy(self, batch: TensorDictBase, learning: Learning, agents: Sequence[int]) -> Metrics:
        """Update the policies of ``agents`` alone from a prepared batch ``[B, T]`` (trait ``per_agent``)."""
        raise NotImplementedError(f"{type(self).__name__} does not update agents one by one")

    def fit_critic(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """Update the critic alone from a prepared batch ``[B, T]`` (trait ``per_agent``)."""
        raise NotImplementedError(f"{type(self).__name__} does not update agents one by one")


class Data(Component, ABC):
    """Plays, and produces the batches to learn from.

    With the trait ``on_policy``, a batch is what the current policy just played, step after step; without it, batches come from
    the past, and nothing follows a batch's last step.
    """

    history: int = 0
    """Number of steps M before each step that batches show under ``RECENT_*``; 0: those keys are left out."""

    shown: frozenset[Key] | None = None
    """Keys that a component reads from batches; what was played has others, which need not be kept. ``None``: all."""

    inspect: Callable[[TensorDictBase, TensorDictBase], None] | None = None
    """Called with what was just played, ``[B, T]``, and where the next step starts, ``[B]``, before any of it is kept for later
    iterations; raises if it is broken. What :meth:`collect` returns is looked at in any case."""

    @abstractmethod
    def collect(self, env: Environment, actor: Actor, run_step: RunStep = run_directly) -> TensorDict:
        """Play the steps of one iteration and return them, batch ``[B, T]``; ``run_step`` takes the actor's steps."""

    def batches(self, played: TensorDict, actor: Actor) -> Iterator[TensorDict]:
        """The batches ``[*, T]`` to learn from in this iteration, one at a time; here what was just played, once."""
        yield played

    def held_bytes(self, envs: int, played: TensorDictBase) -> int:
        """Bytes that it will hold for ``envs`` environments, judged by a few steps ``[B, T]``; 0 where that is not known."""
        return 0

    @classmethod
    def brief(cls, steps: int) -> dict[str, Any]:
        """Options for a trial: ``steps`` steps of two environments, and a batch to learn from at once."""
        return {}

    def refuse_unfit(self, envs: int, iterations: int, sequence_length: int | None) -> None:
        """Check that this many environments and iterations give batches to learn from.

        Args:
            envs: number of environments.
            iterations: length of the training.
            sequence_length: of the sequences that batches are cut into; ``None``: into single steps.

        Raises:
            OptionError: they do not; names an option of its own, or `sequence_length` of the actor.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what the next :meth:`collect` and :meth:`batches` give."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""


class Trainer(Component, ABC):
    """How long, where and how to train, evaluate, log and save."""


BASES: dict[str, type[Component]] = {section: globals()[kind.base.rpartition(".")[2]] for section, kind in KINDS.items()}
"""The base class of the components of each section."""


def who_is(component: Component) -> str:
    """A component in messages: its section and its class, ``critic (LocalCritic)``."""
    sections = (section for section, base in BASES.items() if isinstance(component, base))
    # What stands in the place of an environment has its class.
    return f"{next(sections, 'component')} ({component.__class__.__name__})"
