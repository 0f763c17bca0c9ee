"""Rules for critics."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Critic, least, option_parameters
from marlkit.keys import Key
from marlkit.nn.actions import action_features
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import problem_with
from marlkit.testing.agents import require_separate_parameters
from marlkit.testing.batches import batch_for, leaves
from marlkit.testing.rules import close, require, rule

OWN_ACTION: dict[Key, int] = {
    keys.ACTION: 0,
    keys.LOG_PROB: 0,
    keys.JOINT_ACTION: 1,
    keys.OPPONENT_LOGITS: 1,
    keys.OPPONENT_LOC: 1,
    keys.OPPONENT_SCALE: 1,
}
"""Keys that tell of an agent's own action, and the axis of the agent behind the batch."""


def _normalised(critic: Critic) -> Critic:
    """A critic whose normalised units are not the real ones."""
    critic.normaliser.update(3 * torch.randn(64) + 5)
    return critic


def _batches(critic: Critic, batch_size: tuple[int, ...] = (4,)) -> Iterator[TensorDict]:
    """What it reads, where all believe the same and where each believes for itself."""
    for views in sorted({1, critic.spec.n_agents}):
        batch = batch_for(critic, batch_size, views=views)
        if keys.JOINT_ACTION in leaves(batch) and keys.ACTION in leaves(batch):
            _let_own_action_be_known(batch)
        yield batch


def _let_own_action_be_known(batch: TensorDict) -> None:
    """In its own view an agent's action is what it has chosen."""
    joint, own = batch[keys.JOINT_ACTION], batch[keys.ACTION]
    axis, n_agents = batch.batch_dims, own.shape[batch.batch_dims]
    for view in range(joint.shape[axis]):
        for agent in range(n_agents) if joint.shape[axis] == 1 else (view,):
            joint.select(axis, view).select(axis, agent).copy_(own.select(axis, agent))


@rule("critic")
def predicts_a_key(critic: Critic) -> None:
    """A critic declares what it `predicts`, and has a `normaliser` between real and normalised units."""
    predicted = critic.contract.predicted(critic.options, critic.spec.traits)
    require(predicted is not None, "declares no `predicts`", "Name the key in its contract: `predicts=…`.")
    kept = isinstance(getattr(critic, "normaliser", None), ValueNormaliser)
    require(kept, "has no `normaliser`", "Set `self.normaliser = ValueNormaliser(enabled=…)`.")


@rule("critic")
def writes_what_it_predicts(critic: Critic) -> None:
    """`predictions` is `[K, *, N, 1]`; `predict` is the least of the K, and in real units what the critic writes."""
    key = critic.predicts
    for batch in _batches(_normalised(critic)):
        found, written = critic.predictions(batch.clone()), critic(batch.clone())[key]
        _require_networks("predictions", found, written.shape)
        remedy = "Let `forward` write `normaliser.denormalise(predict(batch))`."
        problem = f"writes a `{keys.name(key)}` that is not its predictions in real units"
        require(close(critic.normaliser.denormalise(least(found)), written), problem, remedy)
        require(
            close(critic.predict(batch.clone()), least(found)), "has a `predict` that is not the least of its predictions", remedy
        )


def _require_networks(name: str, values: Tensor, shape: torch.Size) -> None:
    problem = f"has {name} of the shape {list(values.shape)}, not K x {list(shape)}"
    require(values.dim() == len(shape) + 1 and values.shape[1:] == shape, problem, "One entry of the first axis per network.")


@rule("critic")
def does_not_see_the_own_action(critic: Critic) -> None:
    """A baseline of agent i (`state_value`) and its `action_values` do not depend on agent i's own action, for any agent i."""
    watched = {keys.STATE_VALUE, keys.ACTION_VALUES} & set(critic.writes)
    for batch in _batches(critic, (6,)):
        wanted = critic(batch.clone())
        for agent in range(critic.spec.n_agents):
            found = critic(_own_action_moved(critic, batch, agent))
            for key in watched:
                # Not bit for bit: a critic may evaluate the agents in one product, whose rounding depends on its size.
                problem = f"lets agent {agent}'s {keys.name(key)} depend on its own action"
                remedy = "Hide agent i's entry from row i, as `others_features` does; the baseline cancels only then."
                require(close(found[key][:, agent], wanted[key][:, agent]), problem, remedy)


def _own_action_moved(critic: Critic, batch: TensorDict, agent: int) -> TensorDict:
    """``batch`` with another action of one agent, and other beliefs about it."""
    moved = batch.clone()
    for key, axis in OWN_ACTION.items():
        if key in leaves(batch):
            rows = moved[key].select(1 + axis, agent)
            if rows.dtype == torch.int64:
                rows.copy_((rows + 1) % critic.spec.own_action_sizes[agent])
            elif key == keys.OPPONENT_LOGITS:
                rows.copy_(rows.where(rows < -1e6, rows.flip(0) + torch.randn(rows.shape)))
            else:
                rows.copy_(rows.abs() + 0.7 if key == keys.OPPONENT_SCALE else rows + 0.7)
    return moved


@rule("critic")
def values_each_agent_by_what_it_sees(critic: Critic) -> None:
    """Where a critic reads observations and no state, agent i's row depends on agent i's observation."""
    if keys.OBSERVATION not in critic.reads or keys.STATE in critic.reads:
        return
    batch = next(_batches(critic, (6,)))
    wanted = critic.predict(batch.clone())
    for agent in range(critic.spec.n_agents):
        moved = batch.clone()
        moved[keys.OBSERVATION][:, agent] += torch.randn(6, critic.spec.observation)
        blind = close(critic.predict(moved)[:, agent], wanted[:, agent])
        require(not blind, f"values agent {agent} without its own observation", "Row i is about agent i: keep the agents' order.")


@rule("critic")
def values_rows_the_same_in_any_batch(critic: Critic) -> None:
    """A row has the same value in a batch `[R]`, in `[B, T]` and alone in `[]`, whatever stands beside it."""
    for rows in _batches(critic, (6,)):
        wanted, predicted = critic(rows.clone()), critic.predictions(rows.clone())
        for shape, batch in {"[B, T]": rows.reshape(2, 3), "[]": rows[1]}.items():
            found = critic(batch.clone())
            for key in critic.writes:
                same = wanted[key][1] if shape == "[]" else wanted[key].unflatten(0, (2, 3))
                problem = f"writes another `{keys.name(key)}` in a batch {shape} than in [R]"
                require(close(found[key], same), problem, "Count agents and features from the last axes, and mix no rows.")
            inside = predicted[:, 1] if shape == "[]" else predicted.unflatten(1, (2, 3))
            same_inside = close(critic.predictions(batch.clone()), inside)
            require(same_inside, f"predicts otherwise in a batch {shape} than in [R]", "Mix no rows.")


@rule("critic")
def has_predictions_with_gradient(critic: Critic) -> None:
    """Each of the K predictions has a gradient in the critic's parameters, and in what it reads of `keys.WITH_GRADIENT`."""
    batch = next(_batches(critic))
    learnt = [parameter for parameter in critic.parameters() if parameter.requires_grad]
    read = [batch[key].requires_grad_() for key in keys.WITH_GRADIENT & set(critic.reads)]
    found = critic.predictions(batch)
    for index, values in enumerate(found):
        problem = f"gives its prediction {index} without gradient"
        require(values.requires_grad or not (learnt or read), problem, "Detach nothing in `predictions`.")
        if not values.requires_grad:
            continue
        slopes = torch.autograd.grad(values.square().sum(), [*learnt, *read], retain_graph=True, allow_unused=True)
        reached = [slope is not None and bool(slope.abs().max() > 0) for slope in slopes]
        require(any(reached[: len(learnt)]) or not learnt, problem, "Detach nothing in `predictions`.")
        problem = "passes no gradient on to the encoding that it reads of the actor"
        require(all(reached[len(learnt) :]), problem, "Detach nothing: this gradient trains the actor's encoder.")


@rule("critic", trait="separate_parameters")
def keeps_values_apart(critic: Critic) -> None:
    """With `separate_parameters`, agents have parameters of their own, and the loss of one reaches its own only."""
    require_separate_parameters(critic, lambda agent: critic.predictions(next(_batches(critic)))[..., agent, 0])


@rule("critic", trait="differentiable_in_action")
def climbs_the_own_action(critic: Critic) -> None:
    """With `differentiable_in_action`, `action_value` has a gradient in each agent's own action, and in no other's."""
    remedy = "Put `own` in the place of agent i's own action, and detach nothing."
    for batch in _batches(critic):
        own, joint = (action_features(batch[key], critic.spec, torch.float32) for key in (keys.ACTION, keys.JOINT_ACTION))
        own = own.clone().requires_grad_()
        values = critic.action_value(batch, own, joint)
        _require_networks("an `action_value`", values, torch.Size((4, critic.spec.n_agents, 1)))
        if critic.predicts == keys.ACTION_VALUE:
            same = close(values.detach(), critic.predictions(batch).detach())
            require(same, "values the actions taken by `action_value` otherwise than it predicts", remedy)
        written = critic.normaliser.normalise(critic(batch.copy())[keys.ACTION_VALUE])
        same = close(least(values).detach(), written.detach())
        require(same, "values the actions taken by `action_value` otherwise than it writes", remedy)
        blind = _own_entries_moved(joint, critic.spec.n_agents)
        seen = close(critic.action_value(batch, own, blind).detach(), values.detach())
        require(seen, "reads agent i's entry in `joint`, not in `own`", remedy)
        for agent in range(critic.spec.n_agents):
            value = values[..., agent, :].sum()
            slope = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
            climbs = slope is not None and bool(slope[:, agent].abs().max() > 0)
            require(climbs, f"has no gradient of agent {agent}'s value in its own action", remedy)
            assert slope is not None
            others = [other for other in range(critic.spec.n_agents) if other != agent and bool(slope[:, other].abs().max() > 0)]
            problem = f"lets agent {agent}'s value climb the own action of {others}"
            require(not others, problem, "Take the others' actions from `joint`.")


def _own_entries_moved(joint: Tensor, n_agents: int) -> Tensor:
    """``joint`` ``[4, V, N, F]`` with other actions of agent i in its own view, where views are apart."""
    moved = joint.clone()
    if joint.shape[1] == n_agents:
        for agent in range(n_agents):
            moved[:, agent, agent] = moved[:, agent, agent].flip(-1)
    return moved


@rule("critic", trait="action_values")
def values_every_own_action(critic: Critic) -> None:
    """With `action_values`, these are `[K, *, N, A]`, in real units what is written; `action_value` is the action's entry."""
    for batch in _batches(_normalised(critic)):
        written, values = critic(batch.clone()), critic.action_values(batch.clone())
        wanted = written[keys.ACTION_VALUES]
        _require_networks("action values", values, wanted.shape)
        remedy = "Write the least of the K, in real units, and pick the action's own entry."
        problem = "writes `agents.action_values` that are not its `action_values` in real units"
        require(close(critic.normaliser.denormalise(least(values)), wanted), problem, remedy)
        if keys.ACTION_VALUE in critic.writes and keys.ACTION in leaves(batch):
            taken = wanted.gather(-1, batch[keys.ACTION].unsqueeze(-1))
            problem = "writes an `agents.action_value` that is not the entry of the action taken"
            require(close(taken, written[keys.ACTION_VALUE]), problem, remedy)


@rule("critic", trait="individual_global_max")
def never_falls_where_an_action_value_rises(critic: Critic) -> None:
    """With `individual_global_max`, no prediction falls in an action value of the actor, nor knows one of an action not taken."""
    remedy = "Weigh `action_values` of the actions taken by numbers that are not negative."
    for batch in _batches(critic, (16,)):
        require(keys.ACTION_VALUES in leaves(batch), "does not read the actor's `agents.action_values`", remedy)
        values, taken = batch[keys.ACTION_VALUES].requires_grad_(), batch[keys.ACTION].unsqueeze(-1)
        slopes = []
        for prediction in critic.predictions(batch).movedim(-2, 0).flatten(0, 1):
            (slope,) = torch.autograd.grad(prediction.sum(), values, retain_graph=True)
            slopes.append(slope)
            require(bool((slope >= 0).all()), "has values that fall where an action value rises", remedy)
            others = slope.scatter(-1, taken, 0.0)
            require(not others.any(), "lets values of actions that were not taken into its value", remedy)
        reached = torch.stack(slopes).amax((0, 1, 3))
        require(bool((reached > 0).all()), "leaves an agent's action values out of all its values", remedy)


@rule("critic")
def keeps_its_values_with_popart(critic: Critic) -> None:
    """With `value_norm: popart`, what the critic writes stays what it was when the scale of its targets changes."""
    option = option_parameters(type(critic)).get("value_norm")
    if option is None or problem_with("popart", option.annotation) is not None:
        return
    own = type(critic)(critic.spec, **{**critic.options, "value_norm": "popart"})
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for batch in _batches(own):
        before = own(batch.clone())
        own.learn_scale(30 * torch.randn(64) + 5)
        after = own(batch.clone())
        for key in own.writes:
            problem = f"writes another `{keys.name(key)}` once the scale of its targets has changed, with `value_norm: popart`"
            near = torch.allclose(after[key], before[key], rtol=1e-3, atol=1e-3)
            require(near, problem, "Let `rescale` replace every prediction `f` by `scale f + shift` in the last layer.")
