"""Diagnostics: how well the critic predicts, how much values and gradients vary, how far the policy moves (docs/diagnostics.md).

They read batches and work on copies of the components, with random draws of their own: a training with them is bit for bit the
same as without.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from marlkit import keys, rng
from marlkit.batches import units
from marlkit.component import Actor, Critic, Estimator, Opponents, Update
from marlkit.errors import OptionError
from marlkit.functional.reduce import masked_mean
from marlkit.functional.variance import split_variance, variance_of_mean
from marlkit.keys import Key
from marlkit.learning import Adjust, Learning, Metrics, mean_metrics
from marlkit.nn.distributions import UNAVAILABLE, TeamDistribution
from marlkit.options import Diagnostic
from marlkit.ranks import Ranks, rank_seed
from marlkit.training.returns import as_word

SEED = 3_000_000
"""Distance of the seeds of diagnostics from that of the training."""

DRAWS = 4
"""Draws of own actions at a state, and of the others' for each."""

SPLITS = 8
"""Parts that a batch is split into for the variance of its gradient, at most."""

STATES = 2048
"""States of a batch at which the critic's variance is estimated, at most; more are drawn from."""

BELIEFS = {keys.JOINT_ACTION, keys.OPPONENT_LOGITS, keys.OPPONENT_LOC}
"""Where a critic may read the others' actions."""


class _Parts(NamedTuple):
    """The components that a measurement may change: copies of those that train."""

    actor: Actor
    critic: Critic
    opponents: Opponents
    update: Update

    @classmethod
    def copied(cls, learning: Learning, update: Update) -> _Parts:
        return copy.deepcopy(cls(learning.actor, learning.critic, learning.opponents, update))


class Diagnostics(nn.Module):
    """Measures the batches that a learner learns from.

    Args:
        wanted: some of :data:`marlkit.options.Diagnostic`, or all.
        estimator: of the training, which has the discount factor.
        critic: of the training.
        seed: of the recipe.

    Raises:
        OptionError: something is wanted that cannot be measured: an error without a discount, or of no value.
    """

    def __init__(
        self,
        wanted: Literal["all"] | Collection[str],
        *,
        estimator: Estimator,
        critic: Critic,
        seed: int,
    ) -> None:
        super().__init__()
        self.wanted = frozenset(get_args(Diagnostic) if wanted == "all" else wanted)
        self.seed = seed
        self.discount = estimator.discount
        self._refuse_unfit(estimator, critic)
        self.of_action = keys.ACTION_VALUE in critic.writes
        self.td_error_sum = 0.0
        self._found: list[Metrics] = []
        self._old: TeamDistribution | None = None

    def _refuse_unfit(self, estimator: Estimator, critic: Critic) -> None:
        problem = ""
        if "td_error" in self.wanted and self.discount is None:
            problem = f"`td_error`: {type(estimator).__name__} has no discount factor, no option `gamma`"
        if {"td_error", "variance"} & self.wanted and not {keys.ACTION_VALUE, keys.STATE_VALUE} & set(critic.writes):
            problem = f"`td_error` or `variance`: {type(critic).__name__} writes no value of a state or of an action"
        if problem:
            named = ", ".join(name for name in get_args(Diagnostic) if name in self.wanted)
            raise OptionError("diagnostics", f"cannot measure {problem}. Leave that out of [{named}]")

    def before(self, batch: TensorDictBase, learning: Learning, estimator: Estimator, update: Update, iteration: int) -> None:
        """Measure a batch ``[*, T]`` that ``estimator`` has estimated and ``update`` is to learn from."""
        with rng.isolated(rank_seed(self.seed, learning.ranks.index) + SEED + iteration), torch.no_grad():
            parts = _Parts.copied(learning, update)
            self._found.append(self._measured(batch, learning, estimator, update, parts))
            # Of the copy: parameters of the distribution may be those of the network, which move.
            self._old = self._policy(batch, parts.actor)

    def after(self, batch: TensorDictBase, actor: Actor) -> None:
        """Measure how far learning from the batch ``[*, T]`` has moved the policy."""
        if self._old is not None:
            with rng.isolated(self.seed), torch.no_grad():
                new = self._policy(batch, actor)
                assert new is not None
                divergence = self._old.kl(new)
                self._found[-1]["actor/kl_update"] = masked_mean(divergence, _alive(_rows_of(batch, actor), divergence))
        self._old = None

    def take(self, ranks: Ranks) -> dict[str, float]:
        """The means over the batches measured since the last call and over the ranks, and the sums over the training."""
        measured = {name: float(value) for name, value in ranks.mean_each(mean_metrics(self._found)).items()}
        self._found.clear()
        if "td_error" not in self.wanted:
            return measured
        self.td_error_sum += measured.get("critic/td_error", 0.0)
        return measured | {"critic/td_error_sum": self.td_error_sum}

    def get_extra_state(self) -> dict[str, Any]:
        """What is summed over the training."""
        return {"td_error_sum": self.td_error_sum}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get_extra_state`."""
        self.td_error_sum = state["td_error_sum"]

    def _measured(
        self, batch: TensorDictBase, learning: Learning, estimator: Estimator, update: Update, parts: _Parts
    ) -> Metrics:
        found: Metrics = {}
        if "td_error" in self.wanted:
            found["critic/td_error"] = self._td_error(batch, parts, estimator)
        if "variance" in self.wanted:
            found |= self._variance(batch, parts)
        if "gradient" in self.wanted:
            found |= _gradient_variance(batch, learning, update)
        return {name: value.detach() for name, value in found.items()}

    # --- the critic -----------------------------------------------------------------------------------------------------

    def _value(self, rows: TensorDictBase, parts: _Parts) -> Tensor:
        """What the critic says of the present state or of the action taken there, in real units: ``[*, N, 1]``."""
        owned = keys.WITH_GRADIENT & set(parts.critic.reads) & set(parts.actor.writes)
        if any(rows.get(key, None) is None for key in owned):  # off policy this is left to the update
            parts.actor.distribution(rows)
        value: Tensor = parts.critic(rows)[keys.ACTION_VALUE if self.of_action else keys.STATE_VALUE]
        return value

    def _td_error(self, batch: TensorDictBase, parts: _Parts, estimator: Estimator) -> Tensor:
        """``mean |r + gamma (1 - terminated) U(s') - V(s)|`` of a batch ``[*, T]``."""
        assert self.discount is not None
        critic = parts.critic
        present = keys.ACTION_VALUE if self.of_action else keys.STATE_VALUE
        value = batch.get(present, None)
        if value is None:  # off policy the critic says nothing of the present state
            value = self._value(batch.select(*parts.actor.reads, *critic.reads, strict=False), parts)
        after = keys.STATE_VALUE if keys.STATE_VALUE in critic.writes else keys.ACTION_VALUE
        following, ended = batch[keys.following(after)], batch.get(keys.AGENT_TERMINATED, None)
        ended = batch[keys.TERMINATED].unsqueeze(-2) if ended is None else ended
        return (estimator.rewards(batch) + self.discount * following.masked_fill(ended, 0.0) - value).abs().mean()

    def _variance(self, batch: TensorDictBase, parts: _Parts) -> Metrics:
        """The variance of the critic's estimate over states and actions by its sources, and of what it averages over samples."""
        actor, critic = parts.actor, parts.critic
        of_others = bool(BELIEFS & set(critic.reads)) and critic.spec.n_agents > 1
        if "independent_agents" not in actor.traits and (self.of_action or of_others):
            return {}
        rows = units(batch.select(*actor.reads, *critic.reads, keys.ACTION, keys.ALIVE, strict=False), None)
        if len(rows) < 2:
            return {}
        if len(rows) > STATES:
            rows = rows[torch.randperm(len(rows), device=rows[keys.ACTION].device)[:STATES]]
        alive = _alive(rows, rows[keys.OBSERVATION][..., :1]).squeeze(-1)
        draws = []
        for _ in range(DRAWS if self.of_action else 1):
            own = _drawn(rows, actor) if self.of_action else rows[keys.ACTION]
            each = [_at(rows, own, _drawn(rows, actor)) for _ in range(DRAWS)] if of_others else [rows.copy()]
            draws.append(torch.stack([self._value(at.set(keys.ACTION, own), parts).squeeze(-1) for at in each]))
        split = split_variance(torch.stack(draws), alive)
        found = {"critic/variance": split.total, "critic/variance_state": split.state}
        if split.own is not None:
            found["critic/variance_own"] = split.own
        if split.others is not None:
            found["critic/variance_others"] = split.others
            if keys.SAMPLE_SEED in critic.reads:
                found["critic/variance_averaged"] = self._variance_of_average(rows, parts, alive)
                found["critic/variance_averaged_predicted"] = split.marginal + split.others / critic.averaged_samples
        return found

    def _variance_of_average(self, rows: TensorDictBase, parts: _Parts, alive: Tensor) -> Tensor:
        """``Var(Qh_K)`` of what the critic averages over its samples, these and the own action drawn anew together."""
        draws = []
        for _ in range(DRAWS):
            at = rows.copy().set(keys.ACTION, _drawn(rows, parts.actor))
            at.set(keys.SAMPLE_SEED, torch.randint_like(rows[keys.SAMPLE_SEED], 2**62))
            draws.append(self._value(at, parts).squeeze(-1))
        return split_variance(torch.stack(draws).unsqueeze(0), alive).total

    # --- the policy -----------------------------------------------------------------------------------------------------

    def _policy(self, batch: TensorDictBase, actor: Actor) -> TeamDistribution | None:
        """The policy at the states of a batch ``[*, T]``; ``None`` where its divergence is not wanted, or there is none."""
        if "kl" not in self.wanted or "stochastic" not in actor.traits:
            return None
        return actor.distribution(_rows_of(batch, actor))


def _rows_of(batch: TensorDictBase, actor: Actor) -> TensorDictBase:
    """What the actor reads of a batch ``[*, T]``, and the actions, which an autoregressive one reads too."""
    return units(batch.select(*actor.reads, keys.ACTION, keys.ALIVE, strict=False), actor.sequence_length)


def _alive(rows: TensorDictBase, like: Tensor) -> Tensor:
    """Who takes part, ``[*, N, 1]``; all where no component reads it."""
    alive = rows.get(keys.ALIVE, None)
    return torch.ones_like(like, dtype=torch.bool) if alive is None else alive


def _drawn(rows: TensorDictBase, actor: Actor) -> Tensor:
    """Actions of all agents as the present policy plays them, ``[R, N]`` or ``[R, N, D]``."""
    action: Tensor = actor(rows.select(*actor.reads, strict=False), deterministic=False)[keys.ACTION]
    return action


def _at(rows: TensorDictBase, own: Tensor, others: Tensor) -> TensorDictBase:
    """``rows`` ``[R]`` in which the others of each agent have taken theirs of ``others``, and the agent its own of ``own``.

    Beliefs become certain, so that a critic that averages over samples of them gives the value at these actions.
    """
    at, n_agents = rows.copy(), others.shape[1]
    views = others.unsqueeze(1).expand(-1, n_agents, *others.shape[1:]).clone()
    itself = torch.arange(n_agents, device=own.device)
    views[:, itself, itself] = own
    at.set(keys.JOINT_ACTION, views)
    for key in (keys.OPPONENT_LOGITS, keys.OPPONENT_LOC, keys.OPPONENT_SCALE):
        belief = rows.get(key, None)
        if belief is not None:
            at.set(key, _certain(key, belief, others.unsqueeze(1)))
    return at


def _certain(key: Key, belief: Tensor, action: Tensor) -> Tensor:
    """A belief ``[R, V, N, F]`` of which every sample is ``action``, ``[R, 1, N]`` or ``[R, 1, N, F]``."""
    if key == keys.OPPONENT_LOGITS:
        index = action.unsqueeze(-1).expand(*belief.shape[:-1], 1)
        return torch.full_like(belief, UNAVAILABLE).scatter(-1, index, 0.0)
    return action.expand_as(belief) if key == keys.OPPONENT_LOC else torch.zeros_like(belief)


def _gradient_variance(batch: TensorDictBase, learning: Learning, update: Update) -> Metrics:
    """The variance of the gradient that the whole batch ``[B, T]`` gives, of each agent's parameters or of all.

    Parts of the batch each give a gradient; their mean varies as that of the whole batch. Nothing where there is one part.
    """
    samples: dict[str, list[Tensor]] = {}
    for part in _split(batch, learning.actor.sequence_length):
        for name, gradient in _gradients(part, learning, update).items():
            samples.setdefault(name, []).append(gradient)
    return {name: variance_of_mean(torch.stack(each)) for name, each in samples.items() if len(each) > 1}


def _split(batch: TensorDictBase, sequence_length: int | None) -> list[TensorDictBase]:
    """Parts of a batch ``[B, T]`` of equal sizes: of its environments, or of the steps of a single one, whole sequences."""
    unit = 1 if len(batch) > 1 else sequence_length or 1
    rows = batch if len(batch) > 1 else batch.transpose(0, 1)
    splits = min(SPLITS, len(rows) // unit)
    size = len(rows) // unit // max(splits, 1) * unit
    parts = [rows[first : first + size] for first in range(0, splits * size, size or 1)]
    return parts if len(batch) > 1 else [part.transpose(0, 1) for part in parts]


def _gradients(batch: TensorDictBase, learning: Learning, update: Update) -> dict[str, Tensor]:
    """The gradients of the losses that an update on ``batch`` would take its steps on, before any step: by metric, ``[P]``."""
    parts = _Parts.copied(learning, update)
    parameters = [parameter for parameter in parts.actor.parameters() if parameter.requires_grad]
    taken: dict[int, list[Tensor]] = {id(parameter): [] for parameter in parameters}

    def keep(loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if slope is not None:
                taken[id(parameter)].append(slope)
        return {}

    # Alone and without what follows a step: none is taken, and other ranks and neighbours hear of nothing.
    trial = Learning(*parts[:3], keep, learning.progress, afterwards=lambda action: None)
    with torch.enable_grad():
        parts.update.update(batch, trial)
    found = {}
    for name, own in _by_agent(parts.actor).items():
        slopes = [_mean_slope(parameter, taken.get(id(parameter), [])) for parameter in own]
        found[name] = torch.cat([slope.flatten() for slope in slopes])
    return found


def _mean_slope(parameter: nn.Parameter, taken: list[Tensor]) -> Tensor:
    """The mean gradient of a parameter; that which an update without optimiser left on it, or zero where none reached it."""
    if taken:
        return torch.stack(taken).mean(0)
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _by_agent(actor: Actor) -> dict[str, list[nn.Parameter]]:
    """The parameters of each agent by metric, or all where agents share some."""
    metric = "actor/gradient_variance"
    if "separate_parameters" not in actor.traits:
        return {metric: list(actor.parameters())}
    names = actor.spec.agent_names
    return {f"{metric}/{as_word(name)}": list(actor.agent_parameters([agent])) for agent, name in enumerate(names)}
