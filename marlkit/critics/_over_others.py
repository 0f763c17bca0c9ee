"""What critics have in common whose network reads the others' actions: at given ones, or averaged over what they may do."""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import When
from marlkit.errors import OptionError
from marlkit.functional import marginal
from marlkit.functional.counterfactual import others_features
from marlkit.functional.one_hot import one_hot
from marlkit.nn.actions import ActionBounds, action_features
from marlkit.nn.kernels.activation import IN_PLACE, InPlace
from marlkit.nn.kernels.sample_mean import Sampling, mean_hidden
from marlkit.nn.networks import TeamLinear, TeamNetwork, group_of_agents
from marlkit.options import Activation, Hidden, Initialisation, PositiveInt, Repeats, Share
from marlkit.spec import TeamSpec

MOST_JOINT_ACTIONS = 2**20
"""Joint actions of the others that are summed over at most."""

READS = (
    When("view=state", (keys.STATE,)),
    When("view=own", (keys.OBSERVATION,)),
    keys.SAMPLE_SEED,
    When("discrete", (keys.OPPONENT_LOGITS,)),
    When("continuous", (keys.OPPONENT_LOC, keys.OPPONENT_SCALE, keys.ACTION_DIMS)),
)
"""The keys that such a critic reads for its view and its samples."""

Exact = Literal["auto", "always", "never"]


class OverOthersCritic(Critic):
    """Base of critics of a network ``f_i(x_i, a_-i)`` that is averaged over ``a_j ~ pi_j(. | o_j)``, ``j != i``.

    ``x_i`` is the state or agent i's own observation; agent i's own action is no input. The first layer is split: ``W x`` is
    computed once per row and agent, the actions' share per sample. Work is cut into chunks of ``chunk`` evaluations; with
    gradients each chunk is recomputed in the backward pass, so memory does not grow with ``samples``. Repeated discrete samples
    are evaluated once and weighted. Continuous actions enter within the bounds of the environment, as it executes them; their
    samples use the same memory for all chunks, unless layers are normalised or the activation's derivative needs more than its
    value (`gelu`).

    Args:
        spec: the team.
        outputs: numbers F that the network gives.
        beside: numbers that a critic puts beside the view.
        output_gain: gain of the last layer's initialisation.
        view: `state` or `own`: what the value depends on besides the others' actions.
        samples: K; 10 to learn quickly, 100 in the paper.
        exact: `auto` sums over all joint actions of the others where they are no more than `samples`; `always`, `never`.
        chunk: evaluations of the network at a time; `null`: 4096 on a CPU, whose cache they fit, and 262144 elsewhere.
        hidden: widths of the hidden layers.
        share: which agents use the same parameters: `all`, `none`, or groups such as `[[0, 1], [2]]`.
        agent_id: whether agents that share parameters can be told apart.
        activation: non-linearity of the hidden layers.
        layer_norm: normalise the input and the hidden layers' outputs.
        initialisation: `orthogonal` (Saxe et al. 2014; MAPPO's), `xavier` (Glorot and Bengio 2010), or `uniform`, as
            `torch.nn.Linear` starts, without gains.

    Raises:
        OptionError: `exact` is `always`, and the others' joint actions cannot be summed over.
    """

    eye: Tensor
    table: Tensor | None
    others: Tensor

    def __init__(
        self,
        spec: TeamSpec,
        outputs: int,
        beside: int = 0,
        output_gain: float = 1.0,
        *,
        view: Literal["state", "own"] = "state",
        samples: Repeats = 10,
        exact: Exact = "auto",
        chunk: PositiveInt | None = None,
        hidden: Hidden = [64, 64],  # noqa: B006
        share: Share = "all",
        agent_id: bool = True,
        activation: Activation = "tanh",
        layer_norm: bool = False,
        initialisation: Initialisation = "orthogonal",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.outputs = outputs
        self.view = view
        self.samples = samples
        self.chunk = chunk
        sampled = {keys.SAMPLE_SEED, keys.OPPONENT_LOGITS, keys.OPPONENT_LOC, keys.OPPONENT_SCALE, keys.ACTION_DIMS}
        self.sampling_keys = [key for key in self.reads if key in sampled]
        groups = group_of_agents(share, spec.n_agents)
        viewed = (spec.state_size if view == "state" else spec.observation) + beside
        actions = spec.n_agents * spec.action_features
        self.network = TeamNetwork(
            viewed,
            outputs,
            hidden=hidden,
            groups=groups,
            activation=activation,
            output_gain=output_gain,
            agent_id=agent_id,
            layer_norm=layer_norm,
            initialisation=initialisation,
            further_inputs=actions,
        )
        width = hidden[0] if hidden else outputs
        self.action_layer = TeamLinear(
            actions, width, groups, gain=1.0, bias=False, initialisation=initialisation, further_inputs=viewed
        )
        self.bounds = ActionBounds(spec)
        self.single_group = max(groups) == 0
        self.in_place = None if layer_norm or not hidden else IN_PLACE.get(activation)
        self.register_buffer("eye", torch.eye(spec.n_agents, dtype=torch.bool), persistent=False)
        self._prepare_enumeration(exact)

    def _prepare_enumeration(self, exact: Exact) -> None:
        spec = self.spec
        count = spec.action_features ** (spec.n_agents - 1) if spec.discrete else None
        if exact == "always" and count is None:
            raise OptionError("exact", "continuous actions cannot be summed over; set it to auto or never")
        if exact == "always" and count is not None and count > MOST_JOINT_ACTIONS:
            found = f"{spec.n_agents - 1} others with {spec.action_features} actions each have {count:,} joint actions"
            raise OptionError(
                "exact", f"{found}, more than the {MOST_JOINT_ACTIONS:,} that can be summed; set it to auto or never"
            )
        limit = {"auto": self.samples, "always": MOST_JOINT_ACTIONS, "never": 0}[exact]
        enumerated = count is not None and count <= limit
        table = marginal.joint_actions(spec.n_agents - 1, spec.action_features) if enumerated else None
        self.register_buffer("others", marginal.others_of(spec.n_agents), persistent=False)
        self.register_buffer("table", table, persistent=False)

    @property
    def averaged_samples(self) -> float:
        """K; infinity where all joint actions of the others are summed over."""
        return float(self.samples) if self.table is None else math.inf

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Replace every prediction ``f`` by ``scale f + shift``, ``[]`` each."""
        self.network.rescale(scale, shift, self.action_layer)

    # --- evaluations ---------------------------------------------------------------------------------------------------------

    def at_executed(self, batch: TensorDictBase) -> Tensor:
        """``f_i(x_i, a_-i)`` at the joint action of a batch ``[*]`` as agent i views it, in normalised units: ``[*, N, F]``."""
        if self.spec.n_agents == 1:
            return self.network(self._view(batch))
        entered = self._entered(batch)
        joint = self.bounds(action_features(batch[keys.JOINT_ACTION], self.spec, entered.dtype))
        if not self.spec.discrete:
            joint = joint.masked_fill(~batch[keys.ACTION_DIMS].unsqueeze(-3), 0.0)
        return self.network.leave(entered + self.action_layer(others_features(joint)))

    def averaged(self, batch: TensorDictBase) -> Tensor:
        """The mean of ``f_i(x_i, a_-i)`` over the others' actions in a batch ``[*]``, in normalised units: ``[*, N, F]``."""
        n_agents = self.spec.n_agents
        if n_agents == 1:
            return self.network(self._view(batch))
        rows = batch.batch_size.numel()
        entered = self._entered(batch).expand(*batch.batch_size, n_agents, -1).reshape(rows, n_agents, -1)
        flat = batch.select(*self.sampling_keys).reshape(rows)
        if self.in_place is not None and not self.spec.discrete and not self.network.hooked:
            values = self._mean_of_samples(entered, flat, self.in_place)
        else:
            size = max(1, self._chunk_size() // self._evaluations_per_row())
            blocks = zip(entered.split(size), flat.split(size), strict=True)
            values = torch.cat([self._block(entered_, rows_) for entered_, rows_ in blocks])
        return values.reshape(*batch.batch_size, n_agents, -1)

    def _view(self, batch: TensorDictBase) -> Tensor:
        view = batch[keys.OBSERVATION] if self.view == "own" else batch[keys.STATE].unsqueeze(-2)
        return view if self.single_group else view.expand(*view.shape[:-2], self.spec.n_agents, -1)

    def _entered(self, batch: TensorDictBase) -> Tensor:
        """What the view adds to the first layer: ``[*, N, H]``, or ``[*, 1, H]`` where it is the same for all."""
        return self.network.enter(self._view(batch))

    def _mean_of_samples(self, entered: Tensor, rows: TensorDictBase, activation: InPlace) -> Tensor:
        """Means ``[R, N, F]`` over samples of continuous actions, without autograd between the first and the last layer."""
        *between, last = cast(list[TeamLinear], list(self.network.layers)[1:])
        sampling = Sampling(
            draw=lambda some, samples: self._continuous_samples(rows[some], samples.start, samples.stop),
            samples=self.samples,
            chunk=self._chunk_size(),
            activation=activation,
        )
        from_sample = self.action_layer.stacked(self.action_layer.weights)
        mean = mean_hidden(
            sampling,
            entered.unflatten(1, (len(from_sample), -1)).movedim(1, 0),
            from_sample,
            [layer.stacked(layer.weights) for layer in between],
            [layer.stacked(layer.biases) for layer in between],
        )
        return last(mean.movedim(0, 1).flatten(1, 2))

    def _evaluations_per_row(self) -> int:
        per_agent = self.samples if self.table is None else len(self.table)
        return self.spec.n_agents * per_agent

    def _chunk_size(self) -> int:
        if self.chunk is not None:
            return self.chunk
        return 4096 if self.eye.device.type == "cpu" else 262144

    def _block(self, entered: Tensor, rows: TensorDictBase) -> Tensor:
        """Means ``[R, N, F]`` of a block of rows, a chunk of samples or joint actions at a time."""
        per_agent = self._evaluations_per_row() // self.spec.n_agents
        size = max(1, self._chunk_size() // (self.spec.n_agents * len(entered)))
        evaluate = self._sampled if self.table is None else self._enumerated
        total = entered.new_zeros(*entered.shape[:-1], self.outputs)
        for first in range(0, per_agent, size):
            last = min(first + size, per_agent)
            if torch.is_grad_enabled():
                total = total + checkpoint(evaluate, entered, rows, first, last, use_reentrant=False, preserve_rng_state=False)
            else:
                total = total + evaluate(entered, rows, first, last)
        return total

    def _enumerated(self, entered: Tensor, rows: TensorDictBase, first: int, last: int) -> Tensor:
        """``sum_a_-i pi_-i(a_-i) f_i(x_i, a_-i)`` over joint actions ``first`` to ``last`` of the table."""
        assert self.table is not None
        table = self.table[first:last]
        n_agents, joint = self.spec.n_agents, len(table)
        log_probs = rows[keys.OPPONENT_LOGITS].log_softmax(-1).expand(-1, n_agents, -1, -1)
        weight = entered.new_zeros(len(rows), joint, n_agents)
        actions = torch.zeros(joint, n_agents, n_agents, dtype=torch.int64, device=entered.device)
        for position in range(n_agents - 1):
            other = self.others[:, position]
            own_row = torch.arange(n_agents, device=other.device)
            weight = weight + log_probs[:, own_row, other][..., table[:, position]].transpose(1, 2)
            actions[:, own_row, other] = table[:, position].unsqueeze(-1)
        features = one_hot(actions, self.spec.action_features, entered.dtype)
        features = features.masked_fill(self.eye.unsqueeze(-1), 0.0).flatten(-2)
        values = self.network.leave(entered.unsqueeze(1) + self.action_layer(features))
        return (weight.exp().unsqueeze(-1) * values).sum(1)

    def _sampled(self, entered: Tensor, rows: TensorDictBase, first: int, last: int) -> Tensor:
        """``(1/K) sum_k f_i(x_i, a_-i^(k))`` over the samples ``first`` to ``last``."""
        if self.spec.discrete:
            actions = marginal.categorical_from_uniform(
                rows[keys.OPPONENT_LOGITS].unsqueeze(1), self._uniform(rows, first, last, 1).squeeze(-1)
            )
            return self._sampled_discrete(entered, actions.expand(-1, -1, self.spec.n_agents, -1))
        features = self._continuous_samples(rows, first, last)
        values = self.network.leave(self.action_layer(features).add_(entered.unsqueeze(1)))
        return values.sum(1) / self.samples

    def _uniform(self, rows: TensorDictBase, first: int, last: int, draws: int) -> Tensor:
        """The random numbers of the samples ``first`` to ``last``, ``[R, last - first, 1, N, draws]``."""
        each = self.spec.n_agents * draws
        uniform = marginal.counter_uniform(rows[keys.SAMPLE_SEED], first * each, (last - first) * each)
        return uniform.view(len(rows), last - first, 1, self.spec.n_agents, draws)

    def _continuous_samples(self, rows: TensorDictBase, first: int, last: int) -> Tensor:
        """``a_-i^(k)`` as each agent i reads it, ``[R, last - first, N, N D]``."""
        noise = marginal.normal_from_uniform(self._uniform(rows, first, last, self.spec.action_features))
        sampled = self.bounds(rows[keys.OPPONENT_LOC].unsqueeze(1) + rows[keys.OPPONENT_SCALE].unsqueeze(1) * noise)
        read = rows[keys.ACTION_DIMS][:, None, None] & ~self.eye.unsqueeze(-1)
        return torch.where(read, sampled, 0.0).flatten(-2)

    def _sampled_discrete(self, entered: Tensor, actions: Tensor) -> Tensor:
        """The share of samples ``actions`` ``[R, K, N, N]``, each distinct joint action of the others evaluated once."""
        actions = actions.masked_fill(self.eye, 0)
        order, count = marginal.repeats(marginal.action_code(actions))
        # Unshared networks are evaluated agent by agent in one product, which wants as many rows for each agent.
        slots = count > 0 if self.single_group else (count > 0).any(2, keepdim=True).expand_as(count)
        row, slot, agent = slots.nonzero(as_tuple=True)
        distinct = actions[row, order[row, slot, agent], agent]
        features = one_hot(distinct, self.spec.action_features, entered.dtype)
        features = features.masked_fill(self.eye[agent].unsqueeze(-1), 0.0).flatten(-2)
        shape = (-1, 1) if self.single_group else (-1, self.spec.n_agents)
        entering = entered[row, agent] + self.action_layer(features.view(*shape, features.shape[-1])).flatten(0, 1)
        values = self.network.leave(entering.view(*shape, entering.shape[-1])).reshape(-1, self.outputs)
        weighted = values * count[row, slot, agent].unsqueeze(-1) / self.samples
        total = entered.new_zeros(len(entered) * self.spec.n_agents, self.outputs)
        return total.index_add(0, row * self.spec.n_agents + agent, weighted).view(len(entered), self.spec.n_agents, -1)
