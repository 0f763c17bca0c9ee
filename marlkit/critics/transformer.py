"""The transformer critic: each agent is valued from the encoded observations of all (MAT and MAT-Dec, Wen et al. 2022)."""

from __future__ import annotations

from typing import Literal

from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract, When
from marlkit.errors import OptionError
from marlkit.nn.networks import TeamNetwork, group_of_agents
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.nn.transformer import ELSEWHERE, ObservationEncoder
from marlkit.options import Activation, Depth, Hidden, Share, ValueNorm, Width
from marlkit.spec import TeamSpec


class TransformerCritic(Critic):
    """``V_i(o_1..o_N) = head(e_i)``, each regressed on its own target, as in MAT.

    The paper's advantage over ``(1/N) sum_i V_i`` is `update.team_advantage`; MAT's code takes each agent's own.

    With `encoder: own` it encodes the observations itself (MAT-Dec, beside any actor). With `encoder: actor` it reads the
    encoding that a transformer actor writes, and its loss trains the actor's encoder too (MAT).

    Args:
        spec: the team.
        encoder: `own`, or `actor` to share the actor's.
        embedding: features of a token; with `encoder: actor` the same as the actor's.
        blocks: encoder blocks, where the encoder is its own; 1 to 3.
        heads: attention heads, where the encoder is its own; must divide `embedding`.
        agent_id: whether agents can be told apart, where the encoder is its own.
        hidden: widths of the hidden layers of the head.
        share: which agents use the same head: `all`, `none`, or groups such as `[[0, 1], [2]]`; the encoder is one for all.
        activation: non-linearity of the head's hidden layers.
        layer_norm: normalise the outputs of the head's hidden layers, as MAT does; the encoding is normalised already.
        value_norm: regress on running-normalised targets (Yu et al. 2022); `popart`: and rewrite the last layer whenever their
            scale changes, so that no value does (van Hasselt et al. 2016).
    """

    contract = Contract(
        reads=(When("encoder=own", (keys.OBSERVATION,)), When("encoder=actor", (keys.ENCODING,))),
        writes=(keys.STATE_VALUE,),
        predicts=keys.STATE_VALUE,
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        encoder: Literal["own", "actor"] = "own",
        embedding: Width = 64,
        blocks: Depth = 1,
        heads: Width = 1,
        agent_id: bool = True,
        hidden: Hidden = [64],  # noqa: B006
        share: Share = "all",
        activation: Activation = "gelu",
        layer_norm: bool = True,
        value_norm: ValueNorm = True,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=value_norm)
        self.embedding = embedding
        self.encoder = None
        if encoder == "own":
            self.encoder = ObservationEncoder(spec, embedding=embedding, blocks=blocks, heads=heads, agent_id=agent_id)
        self.head = TeamNetwork(
            embedding,
            1,
            hidden=hidden,
            groups=group_of_agents(share, spec.n_agents),
            activation=activation,
            output_gain=ELSEWHERE,
            agent_id=False,
            layer_norm=layer_norm,
            input_norm=False,
        )

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.head.rescale(scale, shift)

    def predict(self, batch: TensorDictBase) -> Tensor:
        """``V_i(o_1..o_N)`` in normalised units, ``[*, N, 1]``.

        Raises:
            OptionError: the actor's encoding has another size than ``embedding``.
        """
        return self.head(self._encoding(batch) if self.encoder is None else self.encoder(batch[keys.OBSERVATION]))

    def _encoding(self, batch: TensorDictBase) -> Tensor:
        encoding = batch[keys.ENCODING]
        features = encoding.shape[-1]
        if features != self.embedding:
            raise OptionError(
                "embedding",
                f"is {self.embedding}, but the actor whose encoder it shares writes {features} features per agent: "
                f"set critic.embedding={features}, or actor.embedding={self.embedding}",
            )
        return encoding
