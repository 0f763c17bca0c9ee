"""No copies: values are bootstrapped with the networks that learn."""

from __future__ import annotations

from marlkit.component import Actor, Critic, Targets
from marlkit.contract import Contract
from marlkit.spec import TeamSpec


class OnlineTargets(Targets):
    """The online networks are their own targets.

    Args:
        spec: the team.
    """

    contract = Contract()

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec

    def track(self, actor: Actor, critic: Critic) -> None:
        """Keep references to the networks; they belong to the learner."""
        self._online = (actor, critic)

    def actor(self) -> Actor:
        """The policy that learns."""
        return self._online[0]

    def critic(self) -> Critic:
        """The critic that learns."""
        return self._online[1]
