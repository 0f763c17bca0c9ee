"""The stochastic actor: each agent samples from a distribution of its own observation."""

from __future__ import annotations

from typing import Literal

from marlkit import keys
from marlkit.actors._independent import ObservingActor
from marlkit.contract import Contract, When
from marlkit.nn.networks import group_of_agents
from marlkit.options import Activation, Hidden, Initialisation, PositiveFloat, PositiveInt, Probability, Share, StartingDeviation
from marlkit.spec import TeamSpec


class StochasticActor(ObservingActor):
    """Independent policies ``pi_i(a_i | o_i)``: categorical for discrete actions, normal for continuous ones.

    A normal policy works in half-ranges of the action: ``loc = middle + half * f(o)`` and ``scale = half * deviation`` (middle 0
    and half 1 where actions are unbounded). Samples are not squashed; the environment clips them to its bounds.

    Args:
        spec: the team.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart (without it they act alike on equal observations).
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the observation and the hidden layers' outputs, as the MAPPO reference does.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.
        body: `mlp`, or `gru` for a recurrent policy that remembers its episode.
        sequence_length: steps over which a `gru` is trained; 10 in the MAPPO reference.
        std: `parameter` for a deviation that is learnt but does not depend on the observation, `predicted` for one that does.
        initial_std: deviation at the start, in half-ranges of the action; 0.3 to 1.
        output_gain: gain of the last layer's initialisation, unless it is `uniform`; 0.01 starts near-uniform (Yu et al. 2022).
        uniform_share: share of discrete actions that are chosen uniformly among the available ones. It is part of the policy, in
            log-probabilities, entropies and losses too: ``(1 - e) softmax + e / n``; COMA's floor, 0.5 at its start.
        uniform_share_end: its value at the end of the training, reached linearly; `null`: unchanged. 0.01 in COMA.
    """

    contract = Contract(
        reads=(
            keys.OBSERVATION,
            When("discrete", (keys.ACTION_MASK,)),
            When("continuous", (keys.ACTION_DIMS,)),
            When("body=gru", (keys.IS_FIRST, keys.HIDDEN)),
        ),
        writes=(
            keys.ACTION,
            keys.LOG_PROB,
            When("discrete", (keys.LOGITS,)),
            When("continuous", (keys.LOC, keys.SCALE)),
            When("body=gru", (keys.following(keys.HIDDEN),)),
        ),
        traits=(
            "stochastic",
            "independent_agents",
            When("share=none", ("separate_parameters",)),
        ),
    )

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
        body: Literal["mlp", "gru"] = "mlp",
        sequence_length: PositiveInt = 10,
        std: Literal["parameter", "predicted"] = "parameter",
        initial_std: StartingDeviation = 1.0,
        output_gain: PositiveFloat = 0.01,
        uniform_share: Probability = 0.0,
        uniform_share_end: Probability | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        groups = group_of_agents(share, spec.n_agents)
        outputs = self.count_outputs(std)
        self.prepare_network(
            outputs,
            groups,
            hidden=hidden,
            agent_id=agent_id,
            activation=activation,
            layer_norm=layer_norm,
            initialisation=initialisation,
            body=body,
            sequence_length=sequence_length,
            output_gain=output_gain,
        )
        self.prepare_policy(groups, initial_std=initial_std, uniform_share=uniform_share, uniform_share_end=uniform_share_end)
