"""The transformer actor: agents choose one after another, each knowing what those before it chose (MAT, Wen et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional as F

from marlkit import keys
from marlkit.component import Actor
from marlkit.contract import Contract, When
from marlkit.errors import MarlkitError
from marlkit.nn.actions import ActionRange, action_features
from marlkit.nn.distributions import CategoricalTeam, TeamDistribution
from marlkit.nn.transformer import ActionDecoder, AttentionCache, ObservationEncoder
from marlkit.options import Depth, StartingDeviation, Width
from marlkit.spec import Continuous, TeamSpec

ALL_AGENTS = slice(None)


class TransformerActor(Actor):
    """``pi(a | o) = prod_i pi_i(a_i | o_1..o_N, a_1..a_(i-1))``, in the order of the agents.

    An encoder turns all observations into ``ENCODING``; a causal decoder reads it beside the actions of the agents before.
    Actions are played agent by agent and evaluated in one pass over the stored ones (teacher forcing), with the same result.
    Acting takes the observations of all agents at one place: execution is centralised.

    The distributions are categorical for discrete actions, and for continuous ones normal in half-ranges of the action, with a
    deviation that does not depend on the observations. A critic that reads ``ENCODING`` shares the encoder:
    :meth:`distribution` writes it with gradient.

    Args:
        spec: the team.
        embedding: features of a token, in encoder and decoder; 64 in the MAT reference.
        blocks: encoder blocks, and as many decoder blocks; 1 to 3.
        heads: attention heads; must divide `embedding`.
        agent_id: whether agents can be told apart (without it only by their observations and by the actions before them).
        initial_std: deviation at the start, in half-ranges of the action; 0.37 in the MAT reference.
    """

    contract = Contract(
        reads=(
            keys.OBSERVATION,
            When("discrete", (keys.ACTION_MASK,)),
            When("continuous", (keys.ACTION_DIMS,)),
        ),
        writes=(
            keys.ACTION,
            keys.LOG_PROB,
            When("discrete", (keys.LOGITS,)),
            When("continuous", (keys.LOC, keys.SCALE)),
            keys.ENCODING,
        ),
        traits=("stochastic", "autoregressive", "centralised_execution"),
    )

    start: Tensor

    def __init__(
        self,
        spec: TeamSpec,
        *,
        embedding: Width = 64,
        blocks: Depth = 1,
        heads: Width = 1,
        agent_id: bool = True,
        initial_std: StartingDeviation = 0.37,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = ObservationEncoder(spec, embedding=embedding, blocks=blocks, heads=heads, agent_id=agent_id)
        # The first of the features of a discrete token marks the start, where no action precedes.
        features = spec.action_features + int(spec.discrete)
        self.decoder = ActionDecoder(
            features, spec.action_features, bias=not spec.discrete, embedding=embedding, blocks=blocks, heads=heads
        )
        start = torch.zeros(1, features)
        if isinstance(spec.action, Continuous):
            self.range = ActionRange(spec.action, spec.n_agents)
            self.log_deviation = nn.Parameter(torch.full((spec.action.size,), math.log(initial_std)))
        else:
            start[0, 0] = 1.0
        self.register_buffer("start", start, persistent=False)

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        """``pi_i(. | o, a_1..a_(i-1))`` with the stored actions, of all agents; writes ``ENCODING`` ``[*, N, E]``, with gradient.

        Raises:
            MarlkitError: ``agents`` names some of the agents: all have the same parameters.
        """
        if agents is not None:
            raise MarlkitError("the transformer actor has one network for the team; its agents cannot be evaluated alone")
        encoding = self.encoder(batch[keys.OBSERVATION])
        batch.set(keys.ENCODING, encoding)
        start = self.start.expand(*encoding.shape[:-2], -1, -1)
        chosen = self._tokens(batch[keys.ACTION], batch, ALL_AGENTS)
        tokens = torch.cat([start, chosen[..., :-1, :]], -2)
        return self._policy(self.decoder(tokens, encoding), batch, ALL_AGENTS)

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        """Choose actions agent by agent, batch ``[*]``; ``deterministic``: each agent's most likely one after those before."""
        encoding = self.encoder(batch[keys.OBSERVATION])
        token = self.start.expand(*encoding.shape[:-2], -1, -1)
        memory: AttentionCache = {}
        outputs, actions = [], []
        for agent in range(self.spec.n_agents):
            own = slice(agent, agent + 1)
            outputs.append(self.decoder(token, encoding[..., own, :], memory))
            policy = self._policy(outputs[-1], batch, own)
            actions.append(policy.mode() if deterministic else policy.sample())
            token = self._tokens(actions[-1], batch, own)
        policy = self._policy(torch.cat(outputs, -2), batch, ALL_AGENTS)
        action = torch.cat(actions, batch.batch_dims)
        return self.write_choice(batch, policy, action).set(keys.ENCODING, encoding)

    def _tokens(self, action: Tensor, batch: TensorDictBase, agents: slice) -> Tensor:
        """Actions ``[*, n]`` or ``[*, n, D]`` of ``agents`` as the decoder reads them, ``[*, n, A + 1]`` or ``[*, n, D]``."""
        if self.spec.discrete:
            return F.pad(action_features(action, self.spec, self.start.dtype), (1, 0))
        return self.range.scaled(action, agents).masked_fill(~self.available(batch)[..., agents, :], 0.0)

    def _policy(self, outputs: Tensor, batch: TensorDictBase, agents: slice) -> TeamDistribution:
        if self.spec.discrete:
            return CategoricalTeam(outputs, self.available(batch)[..., agents, :])
        return self.range.normal(outputs, self.log_deviation, self.available(batch)[..., agents, :], agents)
