"""The contract of a component: a description that can be read without running it.

A contract is a class attribute made of literals, so that ``marlkit check`` reads it from the source in milliseconds, without
importing torch and without executing untrusted code. The contract test checks that every component keeps it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from marlkit.keys import Key, following


@dataclass(frozen=True)
class Trait:
    """A fact about a component that others may need.

    Attributes:
        sections: the kinds of components that may have it.
        meaning: what is so of a component that has it.
    """

    sections: tuple[str, ...]
    meaning: str


TRAITS: dict[str, Trait] = {
    "discrete": Trait(("env",), "actions are numbers from 0; what is not `discrete` is `continuous`"),
    "continuous": Trait(("env",), "actions are real numbers"),
    "team_reward": Trait(("env",), "all agents receive the same reward at every step"),
    "opposing": Trait(("env",), "agents do not share one aim: what one gains another may lose"),
    "stochastic": Trait(("actor",), "it learns what it draws actions from: log-probability and entropy have gradients"),
    "reparametrised": Trait(("actor",), "it gives fresh actions with the gradient of its parameters, by `reparametrised`"),
    "independent_agents": Trait(("actor",), "no agent's distribution depends on what another chooses"),
    "autoregressive": Trait(("actor",), "an agent may depend on the actions of the agents before it, on no others"),
    "greedy": Trait(("actor",), "it owns `ACTION_VALUES`, and prefers of the available actions the one of the highest value"),
    "centralised_execution": Trait(("actor",), "an agent may depend on what others observe or do: all act at one place"),
    "separate_parameters": Trait(("actor", "critic"), "each agent has parameters of its own, which its loss alone reaches"),
    "differentiable_in_action": Trait(("critic",), "`action_value` has a gradient in each agent's own action"),
    "action_values": Trait(("critic",), "it values every own action of an agent at once, by `action_values`"),
    "individual_global_max": Trait(
        ("critic",), "no value falls where one of the actor's values of the actions taken rises: greedy agents are a greedy team"
    ),
    "true_policies": Trait(("opponents",), "every agent believes what the others' policies are"),
    "lagging": Trait(("targets",), "values are bootstrapped with copies that lag behind the networks that learn"),
    "on_policy": Trait(
        ("data", "update"), "batches are what the present policy has just played, in order; an update with it takes no others"
    ),
    "per_agent": Trait(("update",), "it can update one agent's policy, or the critic, alone: `fit_policy`, `fit_critic`"),
    "by_gradient": Trait(("update",), "parameters change only in `Learning.minimise`, by steps on gradients"),
}
"""Every trait of marlkit; each is checked by :mod:`marlkit.testing`. A user's components may have others, of other names."""


def as_yaml(value: Any) -> str:
    """A scalar as a recipe would write it: ``true``, ``null``, ``0.5``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


@dataclass(frozen=True)
class Condition:
    """One thing that must be true: an option has a value, or any other, or the environment has a trait.

    Attributes:
        name: the option or the trait.
        value: the option's value as YAML writes it; ``None`` for a trait.
        other: whether the option must have any other value than this one.
    """

    name: str
    value: str | None = None
    other: bool = False

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}{'!=' if self.other else '='}{self.value}"

    def holds(self, options: Mapping[str, Any], environment: Collection[str]) -> bool:
        """Whether it is true of these options and of this environment's traits."""
        return self.name in environment if self.value is None else self.allows(options.get(self.name))

    def allows(self, value: Any) -> bool:
        """Whether it is true where the option has this value; 0 and 0.0 are the same."""
        return (as_yaml(value) == self.value or _is_number(value, self.value)) is not self.other

    def settings(self, choices: Iterable[Any], *, hold: bool) -> list[str]:
        """Values of the option, as YAML writes them, with which it holds, or does not: its own or those of the choices."""
        if self.value is None:
            return []
        if hold is not self.other:
            return [self.value]
        plain = (value for value in choices if value is None or isinstance(value, (str, int, float)))
        return [as_yaml(value) for value in plain if self.allows(value) is hold]


def _is_number(value: Any, text: str | None) -> bool:
    if text is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return float(text) == value
    except ValueError:
        return False


@dataclass(frozen=True)
class When:
    """Entries that hold only under a condition.

    ``condition`` is ``"option=value"`` or ``"option!=value"`` (an option of the component itself, its value as YAML writes it) or
    a bare trait of the environment (``"discrete"``); several are joined by ``" & "``.
    """

    condition: str
    then: tuple[Any, ...]

    @cached_property
    def parts(self) -> tuple[Condition, ...]:
        """What is joined by ``" & "``, each by itself."""
        split = (part.strip().partition("=") for part in self.condition.split("&"))
        return tuple(
            Condition(name.removesuffix("!"), value if equals else None, other=name.endswith("!"))
            for name, equals, value in split
        )

    def holds(self, options: Mapping[str, Any], environment: Collection[str]) -> bool:
        """Whether every part of the condition holds for these options and the environment's traits."""
        return all(part.holds(options, environment) for part in self.parts)


class Code(NamedTuple):
    """Code outside of marlkit that a component would import.

    Attributes:
        option: the component's option that names it.
        path: dotted path.
        arguments: what it would be called with, where it may be any function.
    """

    option: str
    path: str
    arguments: Any = None


@dataclass(frozen=True)
class Contract:
    """Keys and traits of a component.

    Attributes:
        reads: keys that must have been written before it runs.
        writes: keys that it adds.
        traits: properties that other components may need.
        needs: for a section (``"actor"``) or an own option that holds a component (``"step"``), the traits that component must
            have; an entry may be conditional like those of ``reads``.
        prefers: as ``needs``, for traits without which it runs, but after a warning: each with what is lost, as the end of a
            sentence.
        predicts: for a critic, the written key that is regressed on the value target; where options decide it, entries like those
            of ``reads``.
        inherits: own options that hold a component whose traits this one has too, as a wrapper has.
        without: inherited traits that it does not pass on.
        at_most: for an own option, what it may not exceed: options (``"data.capacity"``) or products of options
            (``"env.num_envs * data.steps"``).
        check: ``"module:function"`` inside marlkit, called with the completed options and with the folders in which dotted paths
            are looked up; yields ``(option, message)`` pairs.
        derives: a function like ``check`` that returns the traits that no condition can say; ``None`` where only building tells.
        holds: for an own option that is a mapping of options: the own option that names whose options they are, and a function
            like ``check`` that returns the names that it is known to take; ``None`` where that is not known.
        formerly: for own options that the component did not always have, what it did before it had them, where that is not the
            default: runs from then go on as they began.
        code: ``"module:function"`` inside marlkit, called with the completed options; yields the :class:`Code` that they name,
            less what is known to be harmless. Without it, every option of the type ``DottedPath`` counts.
    """

    reads: tuple[Any, ...] = ()
    writes: tuple[Any, ...] = ()
    traits: tuple[Any, ...] = ()
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    prefers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    predicts: Key | tuple[When, ...] | None = None
    inherits: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    at_most: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    check: str | None = None
    derives: str | None = None
    holds: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    formerly: Mapping[str, Any] = field(default_factory=dict)
    code: str | None = None

    def resolve(self, field_name: str, options: Mapping[str, Any], environment: Collection[str]) -> tuple[Any, ...]:
        """``reads``, ``writes`` or ``traits`` with every condition resolved."""
        return tuple(_decided(getattr(self, field_name), options, environment))

    @property
    def predictions(self) -> tuple[Any, ...]:
        """``predicts`` as entries like those of ``reads``; none where nothing is predicted."""
        if self.predicts is None:
            return ()
        conditional = isinstance(self.predicts, tuple) and all(isinstance(entry, When) for entry in self.predicts)
        return tuple(self.predicts) if conditional else (self.predicts,)

    def predicted(self, options: Mapping[str, Any], environment: Collection[str]) -> Key | None:
        """``predicts`` with every condition resolved."""
        return next(iter(_decided(self.predictions, options, environment)), None)

    def all_traits(self, own: Iterable[str], parts: Mapping[str, Iterable[str]]) -> frozenset[str]:
        """``own`` traits and those inherited from ``parts``, the traits of the components that own options hold."""
        inherited = {trait for option in self.inherits for trait in parts.get(option, ())}
        return frozenset(own) | (inherited - set(self.without))

    def needed(self, options: Mapping[str, Any], environment: Collection[str]) -> dict[str, tuple[str, ...]]:
        """``needs`` with every condition resolved, without the sections for which no trait remains."""
        decided = {target: tuple(dict.fromkeys(_decided(wanted, options, environment))) for target, wanted in self.needs.items()}
        return {target: wanted for target, wanted in decided.items() if wanted}


def _decided(entries: Iterable[Any], options: Mapping[str, Any], environment: Collection[str]) -> Iterable[Any]:
    for entry in entries:
        if not isinstance(entry, When):
            yield entry
        elif entry.holds(options, environment):
            yield from entry.then


def carried(reads: Iterable[Key], writes: Collection[Key]) -> tuple[Key, ...]:
    """The keys that are read and written again for the next step, such as the hidden state of a recurrent actor."""
    return tuple(key for key in reads if following(key) in writes)


@dataclass(frozen=True)
class Kind:
    """A section of a recipe and the components that may fill it.

    Attributes:
        section: the section's name.
        package: the package whose modules hold marlkit's own components of this kind.
        base: dotted path of the class that every component of the kind extends.
        suffix: what the class names end with (``CentralisedCritic``); the rest, in snake case, is the name in a recipe.
        default: the component of an absent section (``None``: the section is required).
    """

    section: str
    package: str
    base: str
    suffix: str
    default: str | None = None


KINDS: dict[str, Kind] = {
    kind.section: kind
    for kind in (
        Kind("env", "marlkit.envs", "marlkit.component.Environment", "Environment"),
        Kind("actor", "marlkit.actors", "marlkit.component.Actor", "Actor"),
        Kind("opponents", "marlkit.opponents", "marlkit.component.Opponents", "Opponents", default="true_policy"),
        Kind("critic", "marlkit.critics", "marlkit.component.Critic", "Critic"),
        Kind("targets", "marlkit.targets", "marlkit.component.Targets", "Targets", default="online"),
        Kind("data", "marlkit.data", "marlkit.component.Data", "Data", default="rollout"),
        Kind("estimator", "marlkit.estimators", "marlkit.component.Estimator", "Estimator"),
        Kind("update", "marlkit.optim", "marlkit.component.Update", "Update"),
        Kind("optimizer", "marlkit.optim", "marlkit.component.Optimizer", "Optimizer", default="adam"),
        Kind("trainer", "marlkit.trainers", "marlkit.component.Trainer", "Trainer", default="lightning"),
    )
}
"""The sections in the order in which they run; beside them a recipe may hold ``seed``, ``name`` and ``extends``."""
