"""Rules for actors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from marlkit import keys, rng
from marlkit.component import Actor
from marlkit.keys import Key
from marlkit.nn.distributions import TeamDistribution
from marlkit.testing.agents import require_separate_parameters
from marlkit.testing.batches import batch_for, fake_batch, leaves, own_actions
from marlkit.testing.rules import changed, close, require, rule, tensors_of

DRAWS = 1024
"""Draws from which frequencies are taken; they may be ``TOLERANCE`` standard errors off."""

TOLERANCE = 6.0


def stored(actor: Actor, batch_size: tuple[int, ...] = (4,), seed: int = 0) -> TensorDict:
    """What the actor reads, ``[*]``, with actions that were played."""
    batch = batch_for(actor, batch_size, seed)
    return batch.set(keys.ACTION, fake_batch(actor.spec, batch_size, [keys.ACTION], seed + 1)[keys.ACTION])


def _masked(actor: Actor, rows: int) -> tuple[TensorDict, Tensor]:
    """A batch in which some of the agents' own actions are unavailable, and the mask; at least one is available."""
    batch, own = batch_for(actor, (rows,)), own_actions(actor.spec)
    if not actor.spec.discrete:
        mask = own.expand(rows, *own.shape).clone()
        return batch.set(keys.ACTION_DIMS, mask), mask
    mask = own & (torch.rand(rows, *own.shape) < 0.5)
    mask |= torch.nn.functional.one_hot(torch.zeros(rows, len(own), dtype=torch.int64), own.shape[-1]).bool() & ~mask.any(
        -1, True
    )
    return batch.set(keys.ACTION_MASK, mask), mask


def _parameters(policy: TeamDistribution) -> dict[Key, Tensor]:
    return {key: value.detach() for key, value in policy.parameters().items()}


def _require_row(found: dict[Key, Tensor], wanted: dict[Key, Tensor], agent: int, problem: str, remedy: str) -> None:
    """The distribution of one agent is the same in both; ``[*, N, F]``."""
    for key, value in wanted.items():
        require(close(found[key][..., agent, :], value[..., agent, :]), problem, remedy)


@rule("actor")
def writes_the_log_probability_of_the_action(actor: Actor) -> None:
    """`log_prob` is that of the action written, under `distribution` and the parameters written, of own dimensions alone."""
    batch = actor(batch_for(actor, (32,)))
    action, written = batch[keys.ACTION], batch[keys.LOG_PROB]
    remedy = "Write action, log-probability and parameters by `write_choice`."
    again = actor.distribution(batch.clone()).log_prob(action)
    require(close(again, written), "writes another `agents.log_prob` than its `distribution` has of the action", remedy)
    by_hand = _log_prob(actor, batch)
    if by_hand is not None:
        problem = "writes another `agents.log_prob` than the written parameters give the action"
        require(close(by_hand, written), problem, remedy)


def _log_prob(actor: Actor, batch: TensorDict) -> Tensor | None:
    """Computed from the written parameters alone, ``[*, N, 1]``; ``None`` where they are others than the table's."""
    if keys.LOGITS in actor.writes:
        return batch[keys.LOGITS].log_softmax(-1).gather(-1, batch[keys.ACTION].unsqueeze(-1))
    if not {keys.LOC, keys.SCALE} <= set(actor.writes):
        return None
    loc, scale = batch[keys.LOC], batch[keys.SCALE]
    each = -0.5 * ((batch[keys.ACTION] - loc) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
    return each.masked_fill(~own_actions(actor.spec), 0.0).sum(-1, keepdim=True)


@rule("actor")
def plays_available_actions_only(actor: Actor) -> None:
    """No unavailable action is chosen or has a probability; dimensions that an agent does not have add nothing to `log_prob`."""
    batch, mask = _masked(actor, 256)
    plays: tuple[Any, ...] = (lambda: actor(batch.clone()), lambda: actor(batch.clone(), deterministic=True))
    remedy = "Hand `self.available(batch)` to the distribution, and declare that you read `action_mask` or `action_dims`."
    for play in (*plays, lambda: actor.bootstrap(batch.clone())):
        played = play()
        if actor.spec.discrete:
            chosen = mask.gather(-1, played[keys.ACTION].unsqueeze(-1))
            require(chosen.all(), "chooses actions that are not available", remedy)
        if keys.LOGITS in actor.writes:
            share = played[keys.LOGITS].softmax(-1).masked_fill(mask, 0.0)
            require(bool(share.max() < 1e-6), "gives unavailable actions a probability", remedy)
    if not actor.spec.discrete:
        moved = played.clone()
        moved[keys.ACTION] = torch.where(mask, moved[keys.ACTION], moved[keys.ACTION] + 1)
        first, second = (actor.distribution(rows).log_prob(rows[keys.ACTION]) for rows in (played, moved))
        require(close(first, second), "lets dimensions that an agent does not have into `log_prob`", remedy)
        entropy, before = (actor.distribution(rows).entropy() for rows in (played, moved))
        require(close(entropy, before), "lets dimensions that an agent does not have into the entropy", remedy)


@rule("actor")
def knows_the_own_actions_without_a_mask(actor: Actor) -> None:
    """Where `action_mask` and `action_dims` are absent, as in TorchRL's environments, the team spec says what agents have."""
    batch = stored(actor)
    bare = batch.exclude(keys.ACTION_MASK, keys.ACTION_DIMS)
    found, wanted = (_parameters(actor.distribution(rows.clone())) for rows in (bare, batch))
    for key, value in wanted.items():
        problem = f"gives other `{keys.name(key)}` without a mask than with the agents' own"
        require(close(found[key], value), problem, "Ask `self.available(batch)`.")
    actor(bare.exclude(keys.ACTION))


@rule("actor")
def plays_the_mode_without_drawing(actor: Actor) -> None:
    """`deterministic=True` plays the mode of the distribution and draws no random numbers."""
    before = rng.state()
    batch = actor(batch_for(actor, (16,)), deterministic=True)
    drawn = rng.drawn_since(before)
    require(not drawn, "draws random numbers although it is to play deterministically", "Take `policy.mode()`.")
    mode = actor.distribution(batch.clone()).mode()
    require(
        close(mode, batch[keys.ACTION]),
        "does not play the mode although it is to play deterministically",
        "Take `policy.mode()`.",
    )


@rule("actor")
def plays_what_its_distribution_says(actor: Actor) -> None:
    """Actions are drawn from the distribution written: whatever explores is part of it."""
    batch = actor(batch_for(actor, (1,)).expand(DRAWS).clone())
    remedy = "Draw with `policy.sample()`, and put whatever explores into the distribution."
    for what, surplus, variance in _surplus(actor, batch):
        error = surplus.sum(0).abs() / variance.sum(0).clamp(min=1.0).sqrt()
        problem = f"plays actions whose {what} is {error.max():.1f} standard errors off that of its distribution"
        require(bool(error.max() < TOLERANCE), problem, remedy)


def _surplus(actor: Actor, batch: TensorDict) -> Iterator[tuple[str, Tensor, Tensor]]:
    """By how much the draws ``[R, N, F]`` are above what is expected, and the variance of that."""
    if keys.LOGITS in actor.writes:
        share = batch[keys.LOGITS].softmax(-1)
        chosen = torch.nn.functional.one_hot(batch[keys.ACTION], actor.spec.action_features)
        yield "frequency", chosen - share, share * (1 - share)
    elif {keys.LOC, keys.SCALE} <= set(actor.writes):
        own = own_actions(actor.spec)
        standard = ((batch[keys.ACTION] - batch[keys.LOC]) / batch[keys.SCALE]).masked_fill(~own, 0.0)
        yield "mean", standard, torch.ones_like(standard)
        yield "deviation", (standard.square() - 1).masked_fill(~own, 0.0), torch.full_like(standard, 2.0)


@rule("actor")
def gives_rows_the_same_in_any_batch(actor: Actor) -> None:
    """A row gives the same in a batch `[R]`, alone in `[1]`, and, but for recurrent actors, in `[B, T]` and in `[]`."""
    rows = stored(actor, (6,))
    wanted = _parameters(actor.distribution(rows.clone())) | {keys.ACTION: actor(rows.clone(), deterministic=True)[keys.ACTION]}
    shapes = {"[1]": rows[1:2]} | ({} if actor.carried else {"[B, T]": rows.reshape(2, 3), "[]": rows[1]})
    for shape, batch in shapes.items():
        found = _parameters(actor.distribution(batch.clone()))
        found[keys.ACTION] = actor(batch.clone(), deterministic=True)[keys.ACTION]
        for key, value in wanted.items():
            same = {"[]": value[1], "[1]": value[1:2], "[B, T]": value.unflatten(0, (2, 3))}[shape]
            problem = f"gives another `{keys.name(key)}` in a batch {shape} than in [R]"
            require(close(found[key], same), problem, "Count agents and features from the last axes, and mix no rows.")


@rule("actor", without="centralised_execution")
def acts_on_what_the_agent_itself_sees(actor: Actor) -> None:
    """An agent's distribution depends on its own observation, mask and memory alone, so that each can act by itself."""
    batch, other = stored(actor, seed=0), stored(actor, seed=7)
    wanted = _parameters(actor.distribution(batch.clone()))
    played = actor(batch.exclude(keys.ACTION), deterministic=True)[keys.ACTION]
    for agent in range(actor.spec.n_agents):
        moved = _others_moved(actor, batch, other, agent, leaves(batch) - {keys.ACTION})
        remedy = "Let each agent read its own row, or declare the trait `centralised_execution`."
        problem = f"lets agent {agent} depend on what others observe"
        _require_row(_parameters(actor.distribution(moved.clone())), wanted, agent, problem, remedy)
        action = actor(moved.exclude(keys.ACTION), deterministic=True)[keys.ACTION]
        require(close(action[:, agent], played[:, agent]), problem, remedy)


def _others_moved(actor: Actor, batch: TensorDict, other: TensorDict, agent: int, moving: set[Key]) -> TensorDict:
    """``batch`` with everything but the agent's own rows taken from ``other``."""
    moved = batch.clone()
    for key in moving:
        dimensions = keys.describe(key).dimensions(discrete=actor.spec.discrete)
        if dimensions[0] == "N":
            own = batch[key][:, agent].clone()
            moved[key] = other[key].clone()
            moved[key][:, agent] = own
        elif key != keys.IS_FIRST:
            moved[key] = other[key].clone()
    return moved


@rule("actor", trait="independent_agents")
def acts_independently_of_what_others_choose(actor: Actor) -> None:
    """With `independent_agents`, no agent's distribution depends on others' actions, and draws of two agents are uncorrelated."""
    batch, other = stored(actor, seed=0), stored(actor, seed=7)
    wanted = _parameters(actor.distribution(batch.clone()))
    remedy = "Draw each agent's action from its own distribution, or remove the trait `independent_agents`."
    for agent in range(actor.spec.n_agents):
        moved = _others_moved(actor, batch, other, agent, {keys.ACTION})
        problem = f"lets agent {agent} depend on the actions of others"
        _require_row(_parameters(actor.distribution(moved)), wanted, agent, problem, remedy)
    draws = actor(batch_for(actor, (1,)).expand(DRAWS).clone())
    for _, surplus, variance in _surplus(actor, draws):
        standard = surplus / variance.sqrt().clamp(min=1e-3)
        for agent in range(1, actor.spec.n_agents):
            error = (standard[:, 0].unsqueeze(-1) * standard[:, agent].unsqueeze(-2)).mean(0).abs() * DRAWS**0.5
            problem = f"draws the actions of agents 0 and {agent} together: they are correlated"
            require(bool(error.max() < TOLERANCE), problem, remedy)


@rule("actor", trait="independent_agents")
def has_the_same_policy_of_an_agent_alone(actor: Actor) -> None:
    """With `independent_agents`, `distribution(batch, agents)` is that of these agents among all."""
    batch = stored(actor)
    wanted = actor.distribution(batch.clone()).log_prob(batch[keys.ACTION])
    for agent in range(actor.spec.n_agents):
        alone = actor.distribution(batch.clone(), [agent]).log_prob(batch[keys.ACTION][:, [agent]])
        problem = f"has another distribution of agent {agent} alone than among all"
        require(close(alone, wanted[:, [agent]]), problem, "Let `distribution(batch, agents)` select rows.")


@rule("actor", trait="autoregressive")
def depends_on_the_actions_of_earlier_agents_only(actor: Actor) -> None:
    """With `autoregressive`, an agent's distribution does not depend on the actions of itself and of the agents after it."""
    batch, other = stored(actor, seed=0), stored(actor, seed=7)
    wanted = _parameters(actor.distribution(batch.clone()))
    for agent in range(actor.spec.n_agents):
        moved = batch.clone()
        moved[keys.ACTION][:, agent:] = other[keys.ACTION][:, agent:]
        problem = f"lets agent {agent} depend on an action that is not chosen before its own"
        _require_row(_parameters(actor.distribution(moved)), wanted, agent, problem, "Mask what an agent may see of the actions.")


@rule("actor", trait="stochastic")
def learns_what_it_draws_from(actor: Actor) -> None:
    """With `stochastic`, the log-probability of an action and the entropy have gradients in the actor's parameters."""
    for name in ("log_prob", "entropy"):
        batch = stored(actor)
        policy = actor.distribution(batch)
        value = policy.log_prob(batch[keys.ACTION]) if name == "log_prob" else policy.entropy()
        reached = _reached(actor, value)
        remedy = "Compute it with gradient, from parameters; else remove the trait `stochastic`."
        require(bool(reached), f"has no gradient of its {name.replace('_', '-')}", remedy)


@rule("actor", trait="greedy")
def prefers_the_action_that_it_values_most(actor: Actor) -> None:
    """With `greedy`, the mode is the available action with the highest of the `action_values` written; so is what bootstraps."""
    require(keys.ACTION_VALUES in actor.writes, "writes no `agents.action_values`", "Remove the trait `greedy`, or write them.")
    batch, mask = _masked(actor, 64)
    mode = actor.distribution(batch.clone()).mode()
    for played in (actor(batch.clone(), deterministic=True), actor.bootstrap(batch.clone())):
        best = played[keys.ACTION_VALUES].masked_fill(~mask, -torch.inf).argmax(-1)
        greedy = close(played[keys.ACTION], best) and close(mode, best)
        require(greedy, "prefers another action than the one that it values most", "See EpsilonGreedyTeam.")


@rule("actor", without="greedy")
def passes_gradient_to_its_network(actor: Actor) -> None:
    """The logits, or the means, of its distribution have gradients in the actor's parameters."""
    if not any(parameter.requires_grad for parameter in actor.parameters()):
        return
    for key, value in actor.distribution(stored(actor)).parameters().items():
        if key in (keys.LOGITS, keys.LOC):
            reached = _reached(actor, value.masked_fill(value < -1e6, 0.0).square())
            require(bool(reached), f"gives `{keys.name(key)}` without gradient", "Detach nothing in `distribution`.")


def _reached(module: nn.Module, value: Tensor) -> list[str]:
    """The parameters that ``value`` ``[*]`` has a gradient in."""
    module.zero_grad(set_to_none=True)
    if value.requires_grad:
        value.sum().backward()
    return [name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.abs().max() > 0)]


@rule("actor")
def gives_a_complete_distribution(actor: Actor) -> None:
    """`distribution` has mode, draws with and without gradient, log-probability, entropy and divergence of each agent."""
    batch, spec = stored(actor), actor.spec
    policy, again = (actor.distribution(batch.clone()) for _ in range(2))
    action, each = batch[keys.ACTION], (4, spec.n_agents, 1)
    relaxed = policy.rsample()
    shapes = {
        "mode": (policy.mode(), tuple(action.shape)),
        "sample": (policy.sample(), tuple(action.shape)),
        "rsample": (relaxed, (4, spec.n_agents, spec.action_features)),
        "log_prob": (policy.log_prob(action), each),
        "entropy": (policy.entropy(), each),
        "kl": (policy.kl(again), each),
    }
    for name, (value, shape) in shapes.items():
        require(
            tuple(value.shape) == shape, f"has a `{name}` of shape {tuple(value.shape)}, not {shape}", "See TeamDistribution."
        )
    require(not policy.sample().requires_grad, "draws by `sample` with gradient", "Detach it; `rsample` has the gradient.")
    if spec.discrete:
        one_hot = bool(((relaxed - relaxed.round()).abs() < 1e-5).all()) and bool((relaxed.sum(-1) - 1).abs().max() < 1e-5)
        require(one_hot, "has an `rsample` that is not one-hot", "See CategoricalTeam.rsample.")
    require(bool(policy.kl(again).abs().max() < 1e-5), "diverges from itself", "`kl(self)` is zero.")
    for key, value in policy.parameters().items():
        problem = f"has the parameter `{keys.name(key)}`, which it does not write"
        require(key in actor.writes, problem, "Add it to `writes`, and write it.")
        written = actor(batch.exclude(keys.ACTION))[key]
        require(
            written.shape == value.shape, f"writes `{keys.name(key)}` of another shape than `distribution` has", "Let both agree."
        )


@rule("actor", trait="separate_parameters")
def keeps_agents_apart(actor: Actor) -> None:
    """With `separate_parameters`, agents have parameters of their own, and the loss of one reaches its own only."""

    def value(agent: int) -> Tensor:
        batch = stored(actor)
        policy = actor.distribution(batch)
        learnt: Tensor = batch[keys.ACTION_VALUES] if "greedy" in actor.traits else policy.log_prob(batch[keys.ACTION])
        return learnt[:, agent]

    require_separate_parameters(actor, value)


@rule("actor", trait="reparametrised")
def gives_actions_with_gradient(actor: Actor) -> None:
    """With `reparametrised`, a fresh available action of every agent has a gradient in the actor's parameters."""
    batch, mask = _masked(actor, 8)
    action, spec = actor.reparametrised(batch), actor.spec
    shape = (8, spec.n_agents, spec.action_features)
    require(
        tuple(action.shape) == shape, f"gives actions of shape {tuple(action.shape)}, not {shape}", "Give features, [*, N, F]."
    )
    require(action.isfinite().all(), "gives actions with NaN or infinity", "Look for a division or logarithm of zero.")
    if spec.discrete:
        whole = bool((action.detach().sum(-1) - 1).abs().max() < 1e-5) and bool(
            (action.detach() - action.detach().round()).abs().max() < 1e-5
        )
        require(whole, "gives discrete actions that are not one-hot", "See CategoricalTeam.rsample.")
        chosen = action.detach().masked_fill(mask, 0.0)
        require(
            bool(chosen.max() < 0.5), "gives actions that are not available", "Hand `self.available(batch)` to the distribution."
        )
    batch = batch_for(actor, (32,))
    for agent in range(spec.n_agents):
        weight = torch.randn(spec.action_features)
        reached = _reached(actor, actor.reparametrised(batch)[:, agent] * weight * own_actions(spec)[agent])
        several = spec.own_action_sizes[agent] > int(spec.discrete)
        problem = f"gives agent {agent} an action without gradient"
        require(
            bool(reached) or not several, problem, "Draw with `rsample`, or give a differentiable function of the parameters."
        )


@rule("actor")
def chooses_what_values_are_bootstrapped_with(actor: Actor) -> None:
    """`bootstrap` writes what playing writes but for what is carried, and the log-probability of its action."""
    found = actor.bootstrap(batch_for(actor, (4,)))
    missing = {key for key in actor.writes if key[0] != "next"} - leaves(found)
    names = sorted(map(keys.name, missing))
    require(not missing, f"does not write {names} in `bootstrap`", "Write there what `forward` writes, without exploration.")
    again = actor.distribution(found.clone()).log_prob(found[keys.ACTION])
    require(
        close(again, found[keys.LOG_PROB]), "bootstraps with another `agents.log_prob` than its action has", "Use `write_choice`."
    )


@rule("actor")
def renews_keys_with_gradient(actor: Actor) -> None:
    """`distribution` writes what the actor writes of `keys.WITH_GRADIENT`, with gradient, and as playing does."""
    owned = keys.WITH_GRADIENT & set(actor.writes)
    if not owned:
        return
    played = actor(batch_for(actor, (4,))).detach()
    renewed = played.clone()
    actor.distribution(renewed)
    for key in owned:
        remedy = "Let `distribution` set it on the batch, with gradient."
        require(bool(_reached(actor, renewed[key].square())), f"does not renew `{keys.name(key)}` with gradient", remedy)
        require(
            close(renewed[key].detach(), played[key].detach()),
            f"renews `{keys.name(key)}` as another than it played with",
            remedy,
        )


@rule("actor")
def fades_in_place(actor: Actor) -> None:
    """`schedule(progress)` changes buffers in place: no attribute, no parameter, and the same again at the same progress."""

    def plain() -> dict[str, Any]:
        kinds = (bool, int, float, str, type(None))
        return {
            f"{path}.{name}".lstrip("."): value
            for path, module in actor.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, kinds)
        }

    actor.schedule(0.0)
    places = {name: buffer.data_ptr() for name, buffer in actor.named_buffers()}
    values, parameters, attributes = tensors_of(actor), {n: p.detach().clone() for n, p in actor.named_parameters()}, plain()
    actor.schedule(1.0)
    remedy = "Keep what fades in a buffer and write `buffer.fill_(…)`: steps that are replayed read buffers, and no Python."
    moved = [name for name, value in plain().items() if attributes.get(name, value) != value]
    require(not moved, f"changes the attribute `{', '.join(moved)}` in `schedule`", remedy)
    replaced = [name for name, buffer in actor.named_buffers() if places.get(name) != buffer.data_ptr()]
    require(not replaced, f"replaces the buffer `{', '.join(replaced)}` in `schedule`", remedy)
    learnt = [name for name in changed(actor, values) if name in parameters]
    require(not learnt, f"changes the parameter `{', '.join(learnt)}` in `schedule`", remedy)
    actor.schedule(0.0)
    require(not changed(actor, values), "does not come back when `schedule` comes back", "Compute from the progress alone.")


@rule("actor")
def starts_what_it_carries(actor: Actor) -> None:
    """`initial_state` holds exactly the carried keys, for as many rows as asked, and is zero, as at `is_first`."""
    state = actor.initial_state(3)
    problem = f"carries {sorted(map(keys.name, actor.carried))} and starts {sorted(map(keys.name, state))}"
    require(set(state) == set(actor.carried), problem, "Give `initial_state` a tensor for every carried key, and no other.")
    for key, value in state.items():
        require(len(value) == 3, f"starts `{keys.name(key)}` for {len(value)} rows, not 3", "Give it the batch size asked for.")
        require(not value.any(), f"does not start `{keys.name(key)}` from zero", "Start from zeros.")
    if actor.carried:
        require(actor.sequence_length is not None, "carries a state, but has no `sequence_length`", "Set it in the constructor.")


def _played_in_steps(actor: Actor, sequences: TensorDict) -> TensorDict:
    """Sequences ``[M, L]`` played step by step, what is carried handed on."""
    state, steps = actor.initial_state(sequences.batch_size[0]), []
    for step in range(sequences.batch_size[1]):
        batch = sequences[:, step].clone()
        for key, value in state.items():
            batch.set(key, value)
        played = actor(batch)
        state = {key: played[keys.following(key)].detach() for key in actor.carried}
        steps.append(played.detach())
    return torch.stack(steps, 1)


@rule("actor")
def sees_sequences_as_it_played_them(actor: Actor) -> None:
    """A recurrent actor's distribution on sequences `[M, L]` is that of the steps played, which start anew at `is_first`."""
    if not actor.carried:
        return
    sequences = batch_for(actor, (3, 5))
    if keys.IS_FIRST in actor.reads:
        first = torch.zeros(3, 5, 1, dtype=torch.bool)
        first[:, 0] = first[1, 2] = first[2, 4] = True
        sequences.set(keys.IS_FIRST, first)
    with torch.no_grad():
        played = _played_in_steps(actor, sequences)
        found = _parameters(actor.distribution(played.clone()))
        remedy = "Start every sequence from `hidden[:, 0]`, and from zero where `is_first` holds."
        for key, value in found.items():
            problem = f"has another `{keys.name(key)}` of a sequence than it played step by step"
            require(close(played[key], value), problem, remedy)
        later = played.clone()
        for key in actor.carried:
            later[key][:, 1:] += 1.0
        for key, value in _parameters(actor.distribution(later)).items():
            require(close(found[key], value), "reads the carried state of a sequence beyond its first step", remedy)
        begun = batch_for(actor, (4,)).set(keys.IS_FIRST, torch.ones(4, 1, dtype=torch.bool))
        fresh = begun.clone()
        for key in actor.carried:
            fresh[key] = torch.zeros_like(fresh[key])
        first_, second = (_parameters(actor.distribution(rows)) for rows in (begun, fresh))
        for key, value in first_.items():
            require(close(second[key], value), "remembers an episode that is over", remedy)
