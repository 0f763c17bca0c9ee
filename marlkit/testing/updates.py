"""Rules for updates. They are tried with the simplest of marlkit's components that have what they need."""

from __future__ import annotations

import copy
import re

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys, rng
from marlkit.component import Update, least
from marlkit.learning import Metrics
from marlkit.testing.batches import leaves
from marlkit.testing.partners import Team, partner
from marlkit.testing.rules import BrokenRule, changed, close, needs_of, require, rule, tensors_of, with_parts

METRIC = re.compile(r"[a-z_]+/[a-z0-9_]+")


def _only_read(team: Team, update: Update) -> TensorDict:
    """A batch of what the update declares, what actor, critic and opponents read, and what the critic predicts."""
    batch = team.batch()
    wanted = {*update.reads, *team.actor.reads, *team.critic.reads, *team.opponents.reads, team.critic.predicts}
    return batch.select(*wanted)


def _updated(update: Update, times: int = 1) -> tuple[Team, Metrics]:
    """A team after some updates on the same batch, and the metrics of the last."""
    team = Team(update).prepare()
    batch = _only_read(team, update)
    metrics: Metrics = {}
    for _ in range(times):
        metrics = update.update(batch.clone(), team.learning())
        team.note_changes()
    return team, metrics


@rule("update")
def updates_from_what_it_declares(update: Update) -> None:
    """An update takes a step on a batch of what it reads, and of what the components that it works on read."""
    try:
        _updated(update)
    except KeyError as error:
        text = " ".join(str(error).split())
        require(False, f"reads a key that its contract does not declare: {text}", "Add it to `reads`, or do without.")


@rule("update")
def changes_actor_and_critic(update: Update) -> None:
    """An update changes parameters of the actor and of the critic; delayed ones within four updates."""
    team = Team(update).prepare()
    before = {name: tensors_of(module) for name, module in team.modules().items()}
    batch = _only_read(team, update)
    for _ in range(4):
        update.update(batch.clone(), team.learning())
    for name in ("actor", "critic"):
        parameters = {n for n, _ in team.modules()[name].named_parameters()}
        moved = parameters & set(changed(team.modules()[name], before[name]))
        require(
            bool(moved) or not parameters,
            f"changes no parameter of the {name}",
            "Is the loss detached, or computed without its parameters?",
        )
        finite = all(bool(p.isfinite().all()) for p in team.modules()[name].parameters())
        require(finite, f"leaves parameters of the {name} that are NaN or infinite", "Look for a division or logarithm of zero.")


@rule("update")
def says_what_it_changes(update: Update) -> None:
    """Parameters change in `learning.minimise`, or `learning.moved` is told of it, so that targets follow."""
    team, _ = _updated(update, times=2)
    names = ", ".join(dict.fromkeys(team.outside))
    remedy = "Take steps by `learning.minimise`, or call `learning.moved` after changing parameters."
    require(not names, f"changes parameters of {names} by itself", remedy)


@rule("update", trait="by_gradient")
def changes_by_gradient_only(update: Update) -> None:
    """With `by_gradient`, parameters change only in `learning.minimise`."""
    team, _ = _updated(update, times=2)
    names = ", ".join(dict.fromkeys(team.moved))
    require(not names, f"changes parameters of {names} without a gradient", "Remove the trait `by_gradient`.")


@rule("update")
def returns_metrics_to_log(update: Update) -> None:
    """An update returns its metrics: finite scalars, detached, named `component/quantity`."""
    _, metrics = _updated(update)
    require(isinstance(metrics, dict) and bool(metrics), "returns no metrics", "Return a dictionary of what is worth a look.")
    for name, value in metrics.items():
        named = METRIC.fullmatch(name) is not None and not name.startswith(("time/", "optimizer/"))
        require(named, f"calls a metric `{name}`", "Call it by component and quantity, such as `actor/loss`.")
        scalar = isinstance(value, Tensor) and value.dim() == 0
        require(scalar, f"returns {value!r} as `{name}`, no tensor without dimensions", "Leave reading it to the learner.")
        require(not value.requires_grad, f"returns `{name}` with gradient", "Detach it.")
        require(value.isfinite(), f"returns {value.item()} as `{name}`", "Look for a division or logarithm of zero.")


@rule("update")
def leaves_the_batch_as_it_is(update: Update) -> None:
    """What the batch holds stays what it was: the opponent model learns from it afterwards."""
    team = Team(update).prepare()
    batch = _only_read(team, update)
    before = batch.clone()
    update.update(batch, team.learning())
    for key in leaves(before):
        remedy = "Work on `batch.select(…)` or `batch.copy()`, not in place."
        require(torch.equal(batch[key], before[key]), f"changes `{keys.name(key)}` of the batch", remedy)


@rule("update")
def fits_the_critic_to_the_value_target(update: Update) -> None:
    """The critic comes nearer to `value_target` on a batch that it is fitted to again and again."""
    if keys.VALUE_TARGET not in {key for member in with_parts(update) for key in member.reads}:
        return
    team = Team(update).prepare()
    batch = _only_read(team, update)
    update.update(batch.clone(), team.learning())  # its statistics of the targets

    def error() -> float:
        rows = batch.reshape(-1).clone()
        goal = team.critic.normaliser.normalise(rows[keys.VALUE_TARGET])
        with torch.no_grad():
            if keys.WITH_GRADIENT & set(team.critic.reads) & set(team.actor.writes):
                team.actor.distribution(rows)
            return (least(team.critic.predictions(rows)) - goal).square().mean().item()

    first = error()
    reached = first
    for _ in range(25):
        if reached < 0.98 * first:
            return
        update.update(batch.clone(), team.learning())
        reached = error()
    remedy = "Minimise the distance of `critic.predictions` to the normalised target."
    raise BrokenRule(f"does not bring the critic nearer to its target: from {first:.3g} to {reached:.3g}", remedy)


@rule("update")
def makes_likelier_what_has_an_advantage(update: Update) -> None:
    """Each agent's actions become likelier where its own advantage is positive, and less likely where it is negative."""
    if keys.ADVANTAGE not in {key for member in with_parts(update) for key in member.reads}:
        return
    team = Team(update)
    # Where agents share parameters, one may lose by what another gains.
    needs = needs_of(update).get("actor", set()) | needs_of(team.critic).get("actor", set())
    team.actor = partner("actor", update.spec, {*needs, "separate_parameters"})
    batch = _only_read(team.prepare(), update)
    # The first agent's advantages are the others' with the opposite sign.
    signs = torch.ones(update.spec.n_agents, 1)
    signs[0] = -1.0
    batch[keys.ADVANTAGE] = batch[keys.ADVANTAGE].roll(1, 0)[..., :1, :] * signs

    def log_prob() -> Tensor:
        rows = batch.reshape(-1).clone()
        with torch.no_grad():
            return team.actor.distribution(rows).log_prob(rows[keys.ACTION])

    def weighed(log_probs: Tensor) -> Tensor:
        advantages = batch[keys.ADVANTAGE].reshape(log_probs.shape)
        return ((advantages - advantages.mean(0)) * log_probs).mean(0)

    if keys.LOG_PROB in leaves(batch):
        batch[keys.LOG_PROB] = log_prob().reshape(batch[keys.LOG_PROB].shape)
    first = gained = weighed(log_prob())
    for _ in range(25):
        update.update(batch.clone(), team.learning())
        gained = weighed(log_prob()) - first
        if bool((gained > 0).all()):
            return
    agents = ", ".join(str(agent) for agent in range(update.spec.n_agents) if gained[agent] <= 0)
    remedy = "Ascend each agent's own advantage times the gradient of its own log-probability."
    raise BrokenRule(f"makes actions of agent {agents} less likely where their advantage is positive", remedy)


@rule("update")
def gives_dead_agents_no_say_in_the_policy(update: Update) -> None:
    """What advantage and log-probability of an agent that is not `alive` are does not change the policy; none need be alive."""
    if keys.ALIVE not in update.reads:
        return
    found = []
    for value in (0.0, 1e6):
        with rng.isolated(3):
            own = copy.deepcopy(update)
            team = Team(own).prepare()
            batch = _only_read(team, own)
            batch[keys.ALIVE][:2, :, -1] = False
            for key in {keys.ADVANTAGE, keys.LOG_PROB} & leaves(batch):
                batch[key][:2, :, -1] = value
            own.update(batch, team.learning())
            found.append(tensors_of(team.actor))
            batch[keys.ALIVE].zero_()
            own.update(batch, team.learning())
            finite = all(bool(parameter.isfinite().all()) for parameter in team.actor.parameters())
            require(finite, "leaves NaN in the policy where no agent is alive", "Reduce by `masked_mean`.")
    different = [name for name in found[0] if not close(found[0][name], found[1][name])]
    remedy = "Weigh the policy's loss, and the statistics of advantages, by `alive` (`masked_mean`, `standardise`)."
    require(not different, f"lets agents that are not alive into `{', '.join(different)}` of the policy", remedy)


@rule("update")
def goes_on_from_its_state(update: Update) -> None:
    """State that an update keeps is in `state_dict`: what loads it goes on as the one that saved it."""
    first, second = copy.deepcopy(update), copy.deepcopy(update)
    found = []
    with rng.isolated(5):
        team = Team(first).prepare()
        batch = _only_read(team, first)
        first.update(batch.clone(), team.learning())
        other = Team(second).prepare()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for name in ("actor", "critic"):
            other.modules()[name].load_state_dict(team.modules()[name].state_dict())
        assert team.optimizer is not None
        assert other.optimizer is not None
        other.optimizer.load_state_dict(copy.deepcopy(team.optimizer.state_dict()))
    for own, members in ((first, team), (second, other)):
        with rng.isolated(6):
            own.update(batch.clone(), members.learning())
            found.append({**tensors_of(members.actor), **tensors_of(members.critic)})
    different = [name for name in found[0] if not close(found[0][name], found[1][name])]
    remedy = "Keep what changes in buffers, or save it in `get_extra_state`."
    require(not different, "goes on otherwise after its state was loaded into a new one", remedy)


@rule("update")
def takes_several_epochs(update: Update) -> None:
    """An update with the option `epochs` takes that many passes over a batch, more steps than with one."""
    owner = next((member for member in with_parts(update) if "epochs" in member.options), None)
    if owner is not update:
        return
    counts = []
    for epochs in (1, 3):
        own = type(update)(update.spec, **{**update.options, "epochs": epochs})
        team, _ = _updated(own)
        counts.append(len(team.steps))
    require(
        counts[1] > counts[0], f"takes {counts[1]} steps in three epochs and {counts[0]} in one", "Pass over the batch again."
    )


@rule("update", trait="on_policy")
def needs_what_was_just_played(update: Update) -> None:
    """An update with `on_policy` needs that of the data, itself or by a part."""
    needed = "on_policy" in needs_of(update).get("data", ())
    require(needed, "has the trait `on_policy`, but does not need it of the data", 'Declare `needs={"data": ("on_policy",)}`.')


@rule("update", trait="per_agent")
def updates_one_agent_at_a_time(update: Update) -> None:
    """With `per_agent`, `fit_policy` changes the parameters of the agents named alone, and `fit_critic` those of the critic."""
    team = Team(update)
    needs = needs_of(update).get("actor", set()) | needs_of(team.critic).get("actor", set())
    team.actor = partner("actor", update.spec, {*needs, "separate_parameters"})
    team.prepare()
    batch = update.prepare(_only_read(team, update), team.learning())
    for agent in range(update.spec.n_agents):
        before = {name: tensors_of(module) for name, module in team.modules().items()}
        update.fit_policy(batch, team.learning(), [agent])
        own = {id(parameter) for parameter in team.actor.agent_parameters([agent])}
        names = dict(team.actor.named_parameters())
        moved = [names[n] for n in changed(team.actor, before["actor"]) if n in names]
        remedy = "Take the loss of `actor.distribution(rows, agents)` alone."
        require(all(id(p) in own for p in moved), f"changes other agents' policies when it updates agent {agent}", remedy)
        touched = [n for n in changed(team.critic, before["critic"]) if n in dict(team.critic.named_parameters())]
        require(not touched, "changes the critic when it updates a policy", remedy)
    before = {name: tensors_of(module) for name, module in team.modules().items()}
    update.fit_critic(batch, team.learning())
    require(bool(changed(team.critic, before["critic"])), "does not change the critic in `fit_critic`", "Regress it there.")
    require(not changed(team.actor, before["actor"]), "changes the policy in `fit_critic`", "Leave the actor out of that loss.")
