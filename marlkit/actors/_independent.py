"""What policies share that are independent given a network's outputs: logits, or means and deviations, per agent."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor
from marlkit.errors import OptionError
from marlkit.functional.schedule import linear
from marlkit.keys import Key
from marlkit.nn.actions import ActionRange
from marlkit.nn.distributions import CategoricalTeam, TeamDistribution
from marlkit.nn.networks import ACTIVATIONS, TeamGRU, TeamLinear, TeamNetwork, TeamParameter
from marlkit.options import Initialisation
from marlkit.spec import Continuous

Body = Literal["mlp", "gru"]
Deviation = Literal["parameter", "predicted"]


class IndependentActor(Actor):
    """Base of policies ``pi_i(a_i | x_i)`` whose parameters are a network's outputs ``x_i``, ``[*, N, F]``.

    Discrete: F counts actions, the outputs are logits. Continuous, in half-ranges of the action: the outputs are means, with a
    learnt deviation per group of agents, or means and logarithms of deviations, so that F is twice the number of dimensions.
    """

    uniform_share: Tensor | None

    def count_outputs(self, std: Deviation) -> int:
        """F, of a team whose ``spec`` is set."""
        self.predicts_deviation = not self.spec.discrete and std == "predicted"
        return self.spec.action_features * (2 if self.predicts_deviation else 1)

    def prepare_policy(
        self, groups: Sequence[int], *, initial_std: float, uniform_share: float, uniform_share_end: float | None
    ) -> None:
        """Make what turns outputs into a policy, after the network.

        Args:
            groups: the group of each agent; a deviation is learnt for each.
            initial_std: deviation at the start, in half-ranges of the action.
            uniform_share: share of discrete actions that are chosen uniformly.
            uniform_share_end: its value at the end of the training; ``None``: unchanged.

        Raises:
            OptionError: there is a share, and actions are continuous.
        """
        self.groups = tuple(groups)
        self.uniform_shares = (uniform_share, uniform_share_end)
        # A buffer, so that a copy of the policy and a checkpoint explore as the policy did; absent where nothing is mixed in.
        self.register_buffer("uniform_share", torch.tensor(float(uniform_share)) if any(self.uniform_shares) else None)
        if isinstance(self.spec.action, Continuous):
            self._refuse_uniform_share()
            self._prepare_continuous(self.spec.action, initial_std)

    def _refuse_uniform_share(self) -> None:
        for option, share in zip(("uniform_share", "uniform_share_end"), self.uniform_shares, strict=True):
            if share:
                message = f"mixes in discrete actions, but this environment's are continuous: must be 0 here, got {share}"
                raise OptionError(option, message)

    def _prepare_continuous(self, action: Continuous, initial_std: float) -> None:
        self.range = ActionRange(action, self.spec.n_agents)
        self.initial_log_deviation = math.log(initial_std)
        if not self.predicts_deviation:
            self.log_deviation = TeamParameter(torch.full((action.size,), self.initial_log_deviation), self.groups)

    @abstractmethod
    def outputs(self, batch: TensorDictBase, agents: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
        """``x_i`` of all agents or of ``agents``, ``[*, n, F]``, and the hidden state of the next step where there is one."""

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        """``pi_i(. | x_i)`` of all agents, or of ``agents`` only; batch ``[*]``."""
        outputs, _ = self.outputs(batch, agents)
        return self.policy(outputs, batch, agents)

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        """Choose actions for a batch ``[*]``; a recurrent actor also writes the hidden state of the next step."""
        outputs, hidden = self.outputs(batch, None)
        policy = self.policy(outputs, batch, None)
        action = policy.mode() if deterministic else policy.sample()
        self.write_choice(batch, policy, action)
        return batch if hidden is None else batch.set(keys.following(keys.HIDDEN), hidden)

    def schedule(self, progress: float) -> None:
        """Let the share of uniformly chosen actions go linearly from its start to its end."""
        if self.uniform_share is not None:
            self.uniform_share.fill_(linear(*self.uniform_shares, progress))

    def policy(self, outputs: Tensor, batch: TensorDictBase, agents: Sequence[int] | None) -> TeamDistribution:
        """The distribution with these ``outputs`` ``[*, n, F]`` of all agents, or of ``agents``."""
        if self.spec.discrete:
            return CategoricalTeam(outputs, self.available(batch, agents), self.uniform_share)
        selected = list(range(self.spec.n_agents)) if agents is None else list(agents)
        if self.predicts_deviation:
            outputs, raw = outputs.chunk(2, -1)
            log_deviation = raw + self.initial_log_deviation
        else:
            log_deviation = self.log_deviation.stacked(selected)
        dims = self.available(batch, agents)
        return self.range.normal(outputs, log_deviation, dims, slice(None) if agents is None else selected)


class ObservingActor(IndependentActor):
    """Base of policies whose ``x_i`` is a function of the agent's own observation, or of those of its episode so far."""

    def prepare_network(
        self,
        outputs: int,
        groups: Sequence[int],
        *,
        hidden: Sequence[int],
        agent_id: bool,
        activation: str,
        layer_norm: bool,
        initialisation: Initialisation,
        body: Body,
        sequence_length: int,
        output_gain: float,
    ) -> None:
        """Make the network, of a team whose ``spec`` is set: a perceptron, with a `gru` behind its last hidden layer.

        Args:
            outputs: F.
            groups: the group of each agent.
            hidden: widths of the hidden layers; the last is that of the hidden state of a `gru`.
            agent_id: whether agents that share a network have an identity.
            activation: name of the non-linearity.
            layer_norm: whether to normalise the observation and the hidden layers' outputs.
            initialisation: how the layers are drawn.
            body: `mlp` or `gru`.
            sequence_length: steps over which a `gru` is trained.
            output_gain: gain of the last layer's initialisation.
        """
        self.activation = ACTIVATIONS[activation]
        self.recurrent = body == "gru"
        self.sequence_length = sequence_length if self.recurrent else None
        widths = list(hidden) or [self.spec.observation]
        self.network = TeamNetwork(
            self.spec.observation,
            widths[-1] if self.recurrent else outputs,
            hidden=widths[:-1] if self.recurrent else hidden,
            groups=groups,
            activation=activation,
            output_gain=math.sqrt(2) if self.recurrent else output_gain,
            agent_id=agent_id,
            layer_norm=layer_norm,
            initialisation=initialisation,
        )
        if self.recurrent:
            self.memory = TeamGRU(widths[-1], groups, initialisation)
            self.head = TeamLinear(widths[-1], outputs, groups, gain=output_gain, initialisation=initialisation)

    def initial_state(self, batch_size: int) -> dict[Key, Tensor]:
        """A ``HIDDEN`` of zeros ``[B, N, H]`` for a `gru`."""
        if not self.recurrent:
            return {}
        weight = self.head.weights[0]
        return {keys.HIDDEN: weight.new_zeros(batch_size, self.spec.n_agents, weight.shape[1])}

    def outputs(self, batch: TensorDictBase, agents: Sequence[int] | None) -> tuple[Tensor, Tensor | None]:
        """The network's outputs ``[*, n, F]``, and the hidden state of the next step for a `gru`."""
        features = self.network(of_agents(batch[keys.OBSERVATION], agents), agents)
        if not self.recurrent:
            return features, None
        hidden = of_agents(batch[keys.HIDDEN], agents)
        first = hidden if batch.batch_dims == 1 else hidden[:, 0]
        states = self.memory(self.activation(features), first, batch[keys.IS_FIRST], agents)
        return self.head(states, agents), states


def of_agents(tensor: Tensor, agents: Sequence[int] | None) -> Tensor:
    """The rows of ``agents`` of a ``[*, N, F]`` tensor; of all where ``None``."""
    return tensor if agents is None else tensor[..., list(agents), :]
