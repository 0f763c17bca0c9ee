"""Types of component options: the valid values in a recipe.

A constructor annotates its keyword-only arguments with these (or with ``int``, ``float``, ``bool``, ``str``, ``Literal``,
``list[...]``, ``dict[str, Any]``, a union of them, or a kind of component), and the same annotation is read from the source
for ``marlkit check`` and enforced when the component is built. This module imports no torch.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from marlkit.contract import as_yaml

_Option = TypeVar("_Option")


@dataclass(frozen=True)
class Range:
    """Bounds of a number; ``above`` and ``below`` exclude the bound itself."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    @property
    def words(self) -> str:
        """The bounds in words: ``"from 0 to 1"``, ``"above 0"``."""
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        bounds = {"of at least": self.at_least, "of at most": self.at_most, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def problem(self, value: float) -> str | None:
        """Why ``value`` is out of bounds, or ``None``."""
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be finite, got {value}"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least:g}, got {value}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most:g}, got {value}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above:g}, got {value}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below:g}, got {value}"
        return None


def with_those_above(own: Mapping[str, _Option], above: Mapping[str, _Option]) -> dict[str, _Option]:
    """The options of a constructor that ends in ``**options``, and ``above`` those of the constructor that it hands them to.

    New ones come first; one that it names again, with another default, keeps its place.
    """
    return {name: option for name, option in own.items() if name not in above} | dict(above) | dict(own)


@dataclass(frozen=True)
class Dotted:
    """A word that names something of a module, ``package.module.Name``; whether it is there is not looked up."""

    words: str = "of the form package.module.Name"

    def problem(self, value: str) -> str | None:
        """Why ``value`` is no dotted path, or ``None``."""
        if "." in value and all(part.isidentifier() for part in value.split(".")):
            return None
        return f"must be a dotted path of the form package.module.Name, got {value!r}"


def names_code(annotation: Any) -> bool:
    """Whether values of an annotation name something to import, as those of :data:`DottedPath` do."""
    return any(isinstance(part, Dotted) or names_code(part) for part in get_args(annotation))


PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
Probability = Annotated[float, Range(at_least=0, at_most=1)]
Fraction = Annotated[float, Range(above=0, below=1)]
Part = Annotated[float, Range(above=0, at_most=1)]
Finite = Annotated[float, Range()]
StartingDeviation = Annotated[float, Range(at_least=0.007, at_most=7.3)]
Discount = Annotated[float, Range(at_least=0, at_most=1)]

DottedPath = Annotated[str, Dotted()]

Width = Annotated[int, Range(at_least=1, at_most=16_384)]
"""Features of a layer; a matrix of the largest between two layers takes a gigabyte."""

Depth = Annotated[int, Range(at_least=1, at_most=100)]
"""How many layers or blocks follow one another."""

Repeats = Annotated[int, Range(at_least=1, at_most=10_000)]
"""How often something is repeated within one iteration of the training."""

Processes = Annotated[int, Range(at_least=1, at_most=1024)]
"""Threads of a process, or processes of a machine."""

Hidden = list[Width]
"""Widths of the hidden layers."""

Activation = Literal["tanh", "relu", "leaky_relu", "gelu", "elu"]

Initialisation = Literal["orthogonal", "xavier", "uniform"]
"""How weights are drawn at the start (:func:`marlkit.nn.initialisation.initialise`)."""

ReplayMode = Literal["record", "graph"]
Diagnostic = Literal["td_error", "variance", "gradient", "kl"]
"""What can be measured beside a training: `docs/diagnostics.md`."""

CompileMode = Literal["none", ReplayMode]
"""How steps run: operation by operation, as recorded operations, or as a CUDA graph (:mod:`marlkit.recorder.recording`)."""

ValueNorm = bool | Literal["popart"]
"""Whether values are regressed on running-normalised targets, and what is kept: the network, or what it says (PopArt)."""

Share = Literal["all", "none"] | list[list[NonNegativeInt]]
"""Which agents use the same parameters: all, none, or groups such as ``[[0, 1], [2, 3]]``."""


_LISTS = (list, Sequence)
_MAPPINGS = (dict, Mapping)
_WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a word", "words"),
    list: ("a list", "lists"),
    dict: ("a mapping", "mappings"),
    type(None): ("null", "null"),
    Any: ("anything", "anything"),
}


def describe_type(annotation: Any, *, several: bool = False) -> str:
    """An annotation in words: ``"a list of whole numbers"``, ``"own or state"``."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words = [found.words for found in arguments[1:] if isinstance(found, (Range, Dotted)) and found.words]
        return " ".join([describe_type(arguments[0], several=several), *words])
    if origin is Literal:
        return " or ".join(map(as_yaml, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(part, several=several) for part in arguments)
    if origin in _LISTS:
        return f"{'lists' if several else 'a list'} of {describe_type(arguments[0], several=True)}"
    if origin is tuple:
        return f"a list [{', '.join('…' if part is ... else describe_type(part) for part in arguments)}]"
    annotation = dict if origin in _MAPPINGS or annotation in _MAPPINGS else annotation
    name = getattr(annotation, "__name__", str(annotation))
    return _WORDS.get(annotation, (name, name))[several]


def problem_with(value: Any, annotation: Any) -> str | None:
    """Why ``value`` does not fit ``annotation``, or ``None`` if it does."""
    origin = get_origin(annotation)
    if annotation is Any:
        return None
    if origin is Annotated:
        base, *constraints = get_args(annotation)
        wrong = problem_with(value, base)
        for constraint in constraints if wrong is None else ():
            wrong = wrong or constraint.problem(value)
        return wrong
    if origin in (Union, types.UnionType):
        return _problem_with_union(value, get_args(annotation))
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(annotation)):
            return None
    elif isinstance(value, (list, tuple)) and (origin in _LISTS or origin is tuple):
        wanted = _entries(get_args(annotation), len(value), origin)
        if len(wanted) == len(value):
            problems = (problem_with(item, part) for item, part in zip(value, wanted, strict=True))
            return next((f"entry {index}: {problem}" for index, problem in enumerate(problems) if problem), None)
    elif origin in _MAPPINGS or annotation in _MAPPINGS:
        if isinstance(value, Mapping):
            return None
    elif origin is None and _is_instance(value, annotation):
        return None
    return f"must be {describe_type(annotation)}, got {value!r}"


def _entries(parts: tuple[Any, ...], length: int, origin: Any) -> list[Any]:
    """The annotation of each entry of a list of `length` entries."""
    return [parts[0]] * length if origin is not tuple or parts[-1] is ... else list(parts)


def _problem_with_union(value: Any, parts: tuple[Any, ...]) -> str | None:
    problems = [problem_with(value, part) for part in parts]
    if None in problems:
        return None
    # The message of the part whose type fits is the most specific: 0 for `int >= 1 or null` is out of range, not of a wrong type.
    specific = [problem for problem, part in zip(problems, parts, strict=True) if _same_shape(value, part)]
    wanted = " or ".join(describe_type(part) for part in parts)
    return specific[0] if specific else f"must be {wanted}, got {value!r}"


def _same_shape(value: Any, annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _same_shape(value, get_args(annotation)[0])
    if origin in _LISTS or origin is tuple:
        return isinstance(value, (list, tuple))
    return origin is None and _is_instance(value, annotation)


def _is_instance(value: Any, annotation: Any) -> bool:
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is type(None):
        return value is None
    return isinstance(annotation, type) and isinstance(value, annotation)
