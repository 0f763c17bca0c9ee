"""The deterministic actor: actions as differentiable functions of the observation (MADDPG, Lowe et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor
from marlkit.contract import Contract, When
from marlkit.functional.schedule import linear
from marlkit.nn.actions import ActionRange
from marlkit.nn.distributions import CategoricalTeam, NormalTeam, TeamDistribution
from marlkit.nn.networks import TeamNetwork, group_of_agents
from marlkit.options import Activation, Hidden, Initialisation, NonNegativeFloat, PositiveFloat, Share
from marlkit.spec import Continuous, TeamSpec


class DeterministicActor(Actor):
    """Independent agents whose actions carry the gradient of what they are worth.

    Continuous: ``mu_i(o_i) = middle + half_range tanh(f(o_i))``, played with normal noise of a fixed deviation,
    ``exploration * half_range``. The distribution is that of the behaviour, so that stored log-probabilities and ratios are
    defined; what a value is bootstrapped with is ``mu``. Noise is not squashed; the environment clips to its bounds.

    Discrete: a straight-through Gumbel-softmax, one-hot forward and with the gradient of ``softmax((f(o_i) + g) / temperature)``.
    Its samples are exactly categorical, so that the distribution is ``softmax(f(o_i))`` and nothing is added to explore.

    Args:
        spec: the team.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart.
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the observation and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        output_gain: gain of the last layer's initialisation; 0.01 starts in the middle of the range, or near-uniform.
        exploration: deviation of the noise on continuous actions, in half-ranges; 0.05 to 0.3.
        exploration_end: its value at the end of the training, reached linearly; `null`: unchanged.
        temperature: of the relaxation of discrete actions; 1 in MADDPG.
        target_noise: deviation of normal noise on the continuous actions that values are bootstrapped with, in half-ranges, so
            that neighbouring actions have similar values; 0.2 in TD3. Discrete ones are drawn from the policy.
        target_noise_limit: what that noise is cut to on both sides, in half-ranges; 0.5 in TD3.
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
        ),
        traits=("reparametrised", "independent_agents", When("share=none", ("separate_parameters",))),
    )

    exploration: Tensor

    def __init__(
        self,
        spec: TeamSpec,
        *,
        hidden: Hidden = [64, 64],  # noqa: B006
        share: Share = "all",
        agent_id: bool = True,
        activation: Activation = "tanh",
        layer_norm: bool = False,
        initialisation: Initialisation = "orthogonal",
        output_gain: PositiveFloat = 0.01,
        exploration: PositiveFloat = 0.1,
        exploration_end: PositiveFloat | None = None,
        temperature: PositiveFloat = 1.0,
        target_noise: NonNegativeFloat = 0.0,
        target_noise_limit: PositiveFloat = 0.5,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.temperature = temperature
        self.target_noise = target_noise
        self.target_noise_limit = target_noise_limit
        self.explorations = (exploration, exploration_end)
        self.network = TeamNetwork(
            spec.observation,
            spec.action_features,
            hidden=hidden,
            groups=group_of_agents(share, spec.n_agents),
            activation=activation,
            output_gain=output_gain,
            agent_id=agent_id,
            layer_norm=layer_norm,
            initialisation=initialisation,
        )
        # A buffer, so that a copy of the policy and a checkpoint explore as the policy did.
        self.register_buffer("exploration", torch.tensor(float(exploration)))
        self.range = ActionRange(spec.action, spec.n_agents) if isinstance(spec.action, Continuous) else None

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        """The behaviour of all agents, or of ``agents`` only: ``mu_i`` with noise, or ``softmax(f(o_i))``; batch ``[*]``."""
        of = slice(None) if agents is None else list(agents)
        outputs = self.network(batch[keys.OBSERVATION][..., of, :], agents)
        if self.range is None:
            return CategoricalTeam(outputs, self.available(batch, agents))
        dims, half = self.available(batch, agents), self.range.half_range[of]
        # Padding stays in the middle of its range: it is not played, and must not vary in the input of a critic.
        loc = self.range.middle[of] + half * outputs.tanh().masked_fill(~dims, 0.0)
        return NormalTeam(loc, half * self.exploration, dims)

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        """Choose actions as they are played, with noise unless ``deterministic``; batch ``[*]``."""
        policy = self.distribution(batch)
        return self._write(batch, policy, policy.mode() if deterministic else policy.sample())

    def bootstrap(self, batch: TensorDictBase) -> TensorDictBase:
        """Choose ``mu``, with no other noise than the target's; of discrete actions a sample of the policy; batch ``[*]``."""
        policy = self.distribution(batch)
        if self.range is None:
            return self._write(batch, policy, policy.sample())
        action = policy.mode()
        if self.target_noise:
            noise = (self.target_noise * torch.randn_like(action)).clamp(-self.target_noise_limit, self.target_noise_limit)
            bound = self.range.half_range
            # Not beyond what the policy can choose, where no value was ever learnt.
            action = (action + bound * noise - self.range.middle).clamp(-bound, bound) + self.range.middle
        return self._write(batch, policy, action)

    def reparametrised(self, batch: TensorDictBase) -> Tensor:
        """``mu`` ``[*, N, D]``, or a straight-through sample ``[*, N, A]``, with gradient."""
        policy = self.distribution(batch)
        if isinstance(policy, CategoricalTeam):
            return policy.rsample(self.temperature)
        return policy.mode()

    def schedule(self, progress: float) -> None:
        """Let the noise go linearly from its start to its end."""
        self.exploration.fill_(linear(*self.explorations, progress))

    def _write(self, batch: TensorDictBase, policy: TeamDistribution, action: Tensor) -> TensorDictBase:
        if not self.spec.discrete:
            action = torch.where(self.available(batch), action, policy.mode())
        return self.write_choice(batch, policy, action)
