"""Opponents modelled by a theory of mind that is learnt beside the policy (Rabinowitz et al. 2018; F2A2, Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.component import Opponents
from marlkit.contract import Contract, When
from marlkit.functional.beliefs import mean_of_logits, mean_of_normals, pairs_modelled
from marlkit.functional.reduce import masked_mean
from marlkit.keys import Key
from marlkit.learning import Learning, Metrics, RunStep, run_directly
from marlkit.nn.actions import ActionRange, action_features, in_own_view
from marlkit.nn.distributions import CategoricalTeam, NormalTeam, TeamDistribution, stored_distribution
from marlkit.nn.networks import group_of_agents
from marlkit.opponents._belief_networks import BeliefNetworks
from marlkit.opponents._first_trajectories import FirstTrajectories
from marlkit.opponents._latest_steps import LatestSteps
from marlkit.options import Activation, Depth, Hidden, NonNegativeFloat, PositiveFloat, PositiveInt, Repeats, Share, Width
from marlkit.ranks import ALONE, Ranks
from marlkit.recorder.steps import ResultKey
from marlkit.spec import Continuous, TeamSpec

EVALUATIONS = {"cpu": 16384, "cuda": 65536}
"""Evaluations (agents times networks) per chunk where no gradient is needed: bounds memory."""

BELIEFS: dict[Key, Key] = {keys.LOGITS: keys.OPPONENT_LOGITS, keys.LOC: keys.OPPONENT_LOC, keys.SCALE: keys.OPPONENT_SCALE}


class TheoryOfMindOpponents(Opponents):
    """Agent i's belief about agent j is a prediction of j's action from j's observation, character and mental state.

    *Character*: the mean, over the first trajectories of the training, of the last hidden state of a recurrent network on
    ``(o_j, a_j)``. *Mental state*: the hidden state of another such network on j's last steps of the running episode, without the
    present action. The *natural* prediction reads ``o_j``, character and mental state, the *impromptu* prediction
    ``o_j`` alone; the belief is their geometric mean (mean of logits, precision-weighted mean of normals; the paper leaves both
    this and the loss open). The loss is the sum of the cross-entropies of the executed ``a_j`` under the belief and under each
    prediction, over ``j != i`` and agents that are alive; that of the impromptu prediction is on the latest steps. No other loss
    trains these networks.

    An agent's belief about itself is written too, and is meaningless. One network models all j; where agents share, it does so
    for several i, and with `share: all` all beliefs are equal (view axis of size 1).

    Args:
        spec: the team.
        noise: of continuous actions that others are believed to choose: `chosen`, what the actors add to theirs there (nothing,
            or the targets' noise); `behaviour`, what they are believed to explore with. Discrete ones are drawn.
        share: which modelling agents use the same network: `none` (decentralised), `all`, or groups such as `[[0, 1], [2]]`.
        history: steps before the present one that a mental state is computed from; 5 in F2A2.
        characters: trajectories per agent that characters are computed from; 1000 in F2A2, fewer here: every fit reads all.
        character_length: steps of a trajectory, fewer where its episode ends; 25 in F2A2.
        character_batch: trajectories, drawn at random, through which a fit trains the characters.
        memory: features of a character and of a mental state.
        memory_layers: number of stacked recurrent units.
        hidden: widths of the hidden layers of each prediction.
        activation: non-linearity of the hidden layers.
        head_coef: weight of each prediction's own cross-entropy; 1 weights all three equally. Where behaviour depends on more
            than the observation, the two predictions disagree, and a smaller weight gives a better belief.
        every: updates from one fit to the next.
        fit_rows: joint steps per fit, drawn at random; 1600 pairs of observation and action in F2A2, 533 steps of three agents.
        recent: latest pairs of observation and action, of all agents, that train the impromptu prediction.
        max_grad_norm: largest gradient norm, by clipping; `null`: no clipping.
    """

    contract = Contract(
        reads=(
            *(keys.OBSERVATION, keys.ACTION, keys.ALIVE, keys.IS_FIRST),
            *(keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID),
            When("discrete", (keys.ACTION_MASK,)),
            When("continuous", (keys.ACTION_DIMS,)),
            When("continuous & noise=chosen", (keys.LOC,)),
        ),
        writes=(
            keys.JOINT_ACTION,
            keys.SAMPLE_SEED,
            When("discrete", (keys.OPPONENT_LOGITS,)),
            When("continuous", (keys.OPPONENT_LOC, keys.OPPONENT_SCALE)),
        ),
        formerly={"noise": "behaviour"},
    )

    character: Tensor
    updates: Tensor
    pairs: Tensor
    views: Tensor

    def __init__(
        self,
        spec: TeamSpec,
        *,
        noise: Literal["chosen", "behaviour"] = "chosen",
        share: Share = "none",
        history: Repeats = 5,
        characters: Repeats = 64,
        character_length: Width = 25,
        character_batch: PositiveInt = 16,
        memory: Width = 64,
        memory_layers: Depth = 2,
        hidden: Hidden = [128],  # noqa: B006
        activation: Activation = "leaky_relu",
        head_coef: NonNegativeFloat = 1.0,
        every: PositiveInt = 1,
        fit_rows: PositiveInt = 512,
        recent: PositiveInt = 1200,
        max_grad_norm: PositiveFloat | None = 10.0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.noise = noise
        self.history = history
        self.character_batch = character_batch
        self.head_coef = head_coef
        self.every = every
        self.fit_rows = fit_rows
        self.max_grad_norm = max_grad_norm
        groups = group_of_agents(share, spec.n_agents)
        self.networks = BeliefNetworks(
            spec.observation,
            spec.action_features,
            spec.action_features * (1 if spec.discrete else 2),
            networks=max(groups) + 1,
            width=memory,
            layers=memory_layers,
            hidden=hidden,
            activation=activation,
        )
        if isinstance(spec.action, Continuous):
            self.range = ActionRange(spec.action, spec.n_agents)
        self.trajectories = FirstTrajectories(spec, characters, character_length)
        self.latest = LatestSteps(spec, -(-recent // spec.n_agents))
        self.register_buffer("character", torch.zeros(spec.n_agents, max(groups) + 1, memory))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pairs", pairs_modelled(groups).unsqueeze(-1), persistent=False)
        self.register_buffer("views", torch.tensor([0] if share == "all" else groups), persistent=False)

    # --- beliefs --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(self, batch: TensorDictBase, played: bool = True) -> TensorDictBase:
        """Write each agent's beliefs on a batch ``[*]``; if the actions were not ``played``, sample the others' from them."""
        if not played or self.wanted is None or self.wanted & set(BELIEFS.values()):
            self._write_beliefs(batch, played)
        if played:
            batch.set(keys.JOINT_ACTION, batch[keys.ACTION].detach().unsqueeze(batch.batch_dims))
        device = batch[keys.ACTION].device
        return batch.set(keys.SAMPLE_SEED, torch.randint(2**62, (*batch.batch_size, 1), device=device))

    def _write_beliefs(self, batch: TensorDictBase, played: bool) -> None:
        rows = batch.select(*(self.reads_for(self.writes) if played else self.reads)).reshape(-1)
        blocks = [self._annotated(block, played) for block in rows.split(self._at_a_time(self.pairs.numel()))]
        for key in blocks[0]:
            found = torch.cat([block[key] for block in blocks])
            batch.set(key, found.view(*batch.batch_size, *found.shape[1:]))

    def _at_a_time(self, evaluations: int) -> int:
        """Items per chunk where each takes ``evaluations`` evaluations."""
        return max(1, EVALUATIONS.get(self.character.device.type, EVALUATIONS["cuda"]) // evaluations)

    def _annotated(self, rows: TensorDictBase, played: bool) -> dict[Key, Tensor]:
        """The written keys of ``rows`` ``[R]`` that need a network."""
        belief, _ = self.beliefs(rows, self.character)
        parameters = belief.parameters()
        written = {BELIEFS[key]: value[:, self.views] for key, value in parameters.items()}
        if not played:
            written[keys.JOINT_ACTION] = self._imagined(rows, parameters)
        return written

    def _imagined(self, rows: TensorDictBase, parameters: dict[Key, Tensor]) -> Tensor:
        """Own actions as chosen, the others' as each agent believes, ``[R, N, N]`` or ``[R, N, N, D]``."""
        each = [value[:, self.views].expand(-1, self.spec.n_agents, -1, -1) for value in parameters.values()]
        own = rows[keys.ACTION].detach()
        if self.spec.discrete:
            return in_own_view(CategoricalTeam(each[0]).sample().unsqueeze(-1), own.unsqueeze(-1)).squeeze(-1)
        if self.noise == "chosen":
            others = each[0].to(own.dtype) + (own - rows[keys.LOC].detach()).unsqueeze(1)
        else:
            others = NormalTeam(each[0], each[1]).sample().to(own.dtype)
        return in_own_view(others.masked_fill(~rows[keys.ACTION_DIMS].unsqueeze(1), 0.0), own)

    def beliefs(self, rows: TensorDictBase, character: Tensor) -> tuple[TeamDistribution, TeamDistribution]:
        """The beliefs of each network, and its natural predictions.

        Args:
            rows: batch ``[R]`` with the keys that this component reads.
            character: ``[N, G, H]``.

        Returns:
            Distributions of the actions of all agents, ``[R, G, N, *]``.
        """
        recent = [rows[keys.RECENT_OBSERVATION], action_features(rows[keys.RECENT_ACTION], self.spec)]
        dtype = character.dtype
        mental = self.networks.mental_states(torch.cat([x.to(dtype) for x in recent], -1), rows[keys.RECENT_VALID])
        natural = self._prediction(self.networks.natural(rows[keys.OBSERVATION].to(dtype), character, mental), rows)
        return self._combined(natural, self.impromptu(rows), rows), natural

    def impromptu(self, rows: TensorDictBase) -> TeamDistribution:
        """The impromptu predictions ``[R, G, N, *]`` of each network, from the present observations ``[R, N, O]``."""
        return self._prediction(self.networks.impromptu(rows[keys.OBSERVATION].to(self.character.dtype)), rows)

    def _prediction(self, output: Tensor, rows: TensorDictBase) -> TeamDistribution:
        if self.spec.discrete:
            return CategoricalTeam(output, rows[keys.ACTION_MASK].unsqueeze(1))
        mean, log_deviation = output.chunk(2, -1)
        return self.range.normal(mean, log_deviation, rows[keys.ACTION_DIMS].unsqueeze(1))

    def _combined(self, first: TeamDistribution, second: TeamDistribution, rows: TensorDictBase) -> TeamDistribution:
        if isinstance(first, CategoricalTeam) and isinstance(second, CategoricalTeam):
            return CategoricalTeam(mean_of_logits(first.log_probs, second.log_probs))
        assert isinstance(first, NormalTeam)
        assert isinstance(second, NormalTeam)
        loc, scale = mean_of_normals((first.loc, first.scale), (second.loc, second.scale))
        return NormalTeam(loc, scale, rows[keys.ACTION_DIMS].unsqueeze(1))

    def reads_for(self, beliefs: Sequence[Key]) -> tuple[Key, ...]:
        """Of steps that were played, all but the mean that the noise of a choice is told from."""
        return tuple(key for key in super().reads_for(beliefs) if key != keys.LOC)

    # --- learning ------------------------------------------------------------------------------------------------------

    def observe(self, played: TensorDictBase) -> None:
        """Store the first trajectories of steps ``[B, T]`` for characters, and the latest for the impromptu prediction."""
        if self.spec.n_agents == 1:
            return
        self.latest.record(played)
        if not self.trajectories.complete:
            self.trajectories.record(played)
            self._refresh_character()

    def _refresh_character(self, run_step: RunStep = run_directly) -> None:
        """Recompute the characters from all trajectories."""
        begun = self.trajectories.begun
        if begun > 0:
            everything = torch.arange(begun, device=self.character.device)
            run_step("characters", self._characters, TensorDict({"index": everything}, batch_size=[begun]))

    @torch.no_grad()
    def _characters(self, trajectories: TensorDictBase) -> dict[ResultKey, Tensor]:
        size = self._at_a_time(self.pairs.numel() * self.trajectories.observation.shape[1])
        encoded = [self.networks.characters(*self.trajectories.steps(some)) for some in trajectories["index"].split(size)]
        self.character.copy_(torch.cat(encoded).mean(0))
        return {}

    def fit(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        """Every ``every`` updates, one optimiser step on steps of a batch ``[*]`` and on the latest steps."""
        if self.spec.n_agents == 1:
            return {}
        due = self.every == 1 or int(self.updates) % self.every == 0
        self.updates += 1
        if not due:
            return {}
        given = TensorDict({"rows": self._drawn(batch), "trajectories": self._some_trajectories()})
        metrics = learning.run_step("opponents", lambda taken: self._learn(taken, learning), given)
        self._refresh_character(learning.run_step)
        return metrics

    def _learn(self, given: TensorDictBase, learning: Learning) -> Metrics:
        rows = given["rows"]
        rows.batch_size = rows[keys.ALIVE].shape[:1]
        loss, metrics = self.loss(rows, given["trajectories"], learning.ranks)
        return metrics | learning.minimise(loss, self.max_grad_norm)

    def _some_trajectories(self) -> Tensor:
        """Indices ``[S]`` of random trajectories, through which a fit trains the characters."""
        return torch.randperm(self.trajectories.begun, device=self.character.device)[: self.character_batch]

    def _drawn(self, batch: TensorDictBase) -> TensorDictBase:
        """Rows ``[R]`` of the batch, a random subset if it has more than ``fit_rows``, with the true policies if it has them."""
        played = self.reads_for(self.writes)
        wanted = dict.fromkeys([*played, *(key for key in BELIEFS if key in batch.keys(include_nested=True))])
        given = batch.select(*wanted).detach()
        count = batch.batch_size.numel()
        if count <= self.fit_rows:
            return given.reshape(-1)
        index = torch.randperm(count, device=self.character.device)[: self.fit_rows]
        return given[torch.unravel_index(index, batch.batch_size)]

    def loss(self, rows: TensorDictBase, trajectories: Tensor, ranks: Ranks = ALONE) -> tuple[Tensor, Metrics]:
        """The weighted sum ``[]`` of the three cross-entropies, and metrics of the beliefs.

        Args:
            rows: batch ``[R]`` with the keys that this component reads and, for the divergence, the parameters of the policy.
            trajectories: indices ``[S]`` of the trajectories through which the characters are trained; may be empty.
            ranks: the processes over whose rows the loss is a mean; characters and latest steps are those of each rank.
        """
        belief, natural = self.beliefs(rows, self._trained_character(trajectories))
        latest = self.latest.steps()
        combined = self._cross_entropy(belief, rows, ranks)
        natural_loss = self._cross_entropy(natural, rows, ranks)
        impromptu_loss = self._cross_entropy(self.impromptu(latest), latest, ranks)
        metrics = {
            "opponents/cross_entropy": combined.detach(),
            "opponents/natural_cross_entropy": natural_loss.detach(),
            "opponents/impromptu_cross_entropy": impromptu_loss.detach(),
        }
        return combined + self.head_coef * (natural_loss + impromptu_loss), metrics | self._quality(belief, rows)

    def _trained_character(self, trajectories: Tensor) -> Tensor:
        """Characters ``[N, G, H]`` computed from these trajectories, with gradient."""
        if len(trajectories) == 0:
            return self.character
        return self.networks.characters(*self.trajectories.steps(trajectories)).mean(0)

    def _cross_entropy(self, belief: TeamDistribution, rows: TensorDictBase, ranks: Ranks) -> Tensor:
        """``-mean log q_i(a_j)`` over rows, i, and j != i that are alive."""
        own = -self._mean(belief.log_prob(self._executed(rows)), rows)
        return ranks.weigh(self._weight(rows), own)

    @torch.no_grad()
    def _quality(self, belief: TeamDistribution, rows: TensorDictBase) -> Metrics:
        """How often the most likely action was executed, and the divergence of the beliefs from the true policies in the rows."""
        metrics = {}
        if self.spec.discrete:
            hit = belief.mode() == self._executed(rows)
            metrics["opponents/accuracy"] = self._mean(hit.unsqueeze(-1).to(self.character.dtype), rows)
        known = {key for key in BELIEFS if key in rows.keys(include_nested=True)}
        if {key for key, believed in BELIEFS.items() if believed in self.writes} <= known:
            true = stored_distribution(rows.unsqueeze(1), discrete=self.spec.discrete)
            metrics["opponents/kl"] = self._mean(true.kl(belief), rows)
        return metrics

    def _executed(self, rows: TensorDictBase) -> Tensor:
        """The executed actions, ``[R, G, N]`` or ``[R, G, N, D]``."""
        action = rows[keys.ACTION].unsqueeze(1)
        return action.expand(-1, len(self.pairs), *action.shape[2:])

    def _mean(self, values: Tensor, rows: TensorDictBase) -> Tensor:
        """Mean of ``[R, G, N, 1]`` over rows, modelling agents and modelled agents that are alive."""
        return masked_mean(values, self._weight(rows))

    def _weight(self, rows: TensorDictBase) -> Tensor:
        return rows[keys.ALIVE].unsqueeze(1) * self.pairs
