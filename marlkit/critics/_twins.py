"""Twin critics: two networks, the smaller of whose values counts (clipped double Q-learning, Fujimoto et al. 2018)."""

from __future__ import annotations

from typing import TypeVar

from marlkit.component import Critic

SomeCritic = TypeVar("SomeCritic", bound=Critic)


def twin_of(critic: SomeCritic) -> SomeCritic:
    """Another critic of the same class and options, with parameters of its own, which predicts in the same normalised units."""
    # The units are those of the first, whose normaliser keeps them for both.
    return type(critic)(critic.spec, **critic.options | {"twins": False, "value_norm": False})
