"""Rules for opponent models."""

from __future__ import annotations

import copy

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys, rng
from marlkit.component import Opponents
from marlkit.keys import Key
from marlkit.testing.batches import batch_for, fake_batch, leaves, own_actions
from marlkit.testing.partners import Team
from marlkit.testing.rules import changed, close, require, rule, tensors_of

BELIEFS = (keys.OPPONENT_LOGITS, keys.OPPONENT_LOC, keys.OPPONENT_SCALE)
RECENT = {keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID}


def _steps(opponents: Opponents, size: tuple[int, int] = (3, 4), seed: int = 0) -> TensorDict:
    """Played steps ``[B, T]`` with all that an opponent model may be trained on."""
    batch = batch_for(opponents, size, seed)
    played: list[Key] = [keys.OBSERVATION, keys.ALIVE, keys.IS_FIRST, keys.TERMINATED, keys.TRUNCATED, keys.DONE]
    also = [key for key in played if key not in leaves(batch)]
    return batch.update(fake_batch(opponents.spec, size, also, seed))


@rule("opponents")
def keeps_the_own_action(opponents: Opponents) -> None:
    """In its own view an agent's action is the one that it chose; where actions were played, so are the others'."""
    if keys.JOINT_ACTION not in opponents.writes:
        return
    for played in (True, False):
        batch = opponents(batch_for(opponents, (6,)), played=played)
        joint, own = batch[keys.JOINT_ACTION], batch[keys.ACTION]
        one_view = joint.shape[1] == 1
        for agent in range(opponents.spec.n_agents):
            seen = joint[:, 0 if one_view else agent, agent]
            problem = f"loses agent {agent}'s own action from `opponents.action`" + ("" if played else " (played=False)")
            require(close(seen, own[:, agent]), problem, "Put each agent's `agents.action` into its entry of its own view.")
        if played:
            expected = own.unsqueeze(1).expand_as(joint)
            require(
                close(joint, expected), "believes other actions than were played", "With `played=True`, copy `agents.action`."
            )


@rule("opponents")
def imagines_available_actions(opponents: Opponents) -> None:
    """Actions that agents are believed to choose are ones that they have."""
    if keys.JOINT_ACTION not in opponents.writes or not opponents.spec.discrete:
        return
    joint = opponents(batch_for(opponents, (64,)), played=False)[keys.JOINT_ACTION]
    sizes = torch.tensor(opponents.spec.own_action_sizes)
    require(bool(((joint >= 0) & (joint < sizes)).all()), "believes in actions that agents do not have", "Mask the beliefs.")


@rule("opponents")
def writes_beliefs_without_gradient(opponents: Opponents) -> None:
    """Beliefs carry no gradient: no return can bend them."""
    for played in (True, False):
        batch = batch_for(opponents, (4,))
        for key in leaves(batch):
            if batch[key].is_floating_point():
                batch[key].requires_grad_()
        with torch.enable_grad():
            opponents(batch, played=played)
        for key in opponents.writes:
            kept = not batch[key].requires_grad
            require(kept, f"writes `{keys.name(key)}` with gradient", "Decorate `forward` with `@torch.no_grad()`, or detach.")


@rule("opponents")
def seeds_samples_with_whole_numbers(opponents: Opponents) -> None:
    """`opponents.sample_seed` is another non-negative whole number for every row."""
    if keys.SAMPLE_SEED not in opponents.writes:
        return
    seed = opponents(batch_for(opponents, (64,)))[keys.SAMPLE_SEED]
    fresh = bool((seed >= 0).all()) and seed.unique().numel() > 60
    require(fresh, "seeds rows alike, or with negative numbers", "Draw `torch.randint(2**62, (*batch.batch_size, 1))`.")


@rule("opponents")
def believes_rows_the_same_in_any_batch(opponents: Opponents) -> None:
    """A row is believed the same in a batch `[R]`, in `[B, T]` and alone in `[]`."""
    rows = batch_for(opponents, (6,))
    wanted = opponents(rows.clone())
    for shape, batch in {"[B, T]": rows.reshape(2, 3), "[]": rows[1]}.items():
        found = opponents(batch.clone())
        for key in set(opponents.writes) - {keys.SAMPLE_SEED}:
            same = wanted[key][1] if shape == "[]" else wanted[key].unflatten(0, (2, 3))
            problem = f"writes another `{keys.name(key)}` in a batch {shape} than in [R]"
            require(close(found[key], same), problem, "Count agents and features from the last axes, and mix no rows.")


@rule("opponents")
def writes_what_is_wanted_from_what_it_asks_for(opponents: Opponents) -> None:
    """Where only some keys are `wanted`, they are written from `reads_for` of them alone; for none it reads nothing."""
    require(not opponents.reads_for(()), "reads keys although none of its own is wanted", "Give `()` for no beliefs.")
    for key in opponents.writes:
        opponents.wanted = frozenset({key})
        needed = opponents.reads_for([key])
        batch = opponents(batch_for(opponents, (4,)).select(*needed))
        written = leaves(batch) - set(needed)
        require(key in written, f"does not write `{keys.name(key)}` although it is wanted", "Heed `wanted`.")
        undeclared = written - set(opponents.writes)
        require(not undeclared, f"writes {sorted(map(keys.name, undeclared))}, which it does not declare", "Let both agree.")


@rule("opponents", trait="true_policies")
def believes_what_the_policies_are(opponents: Opponents) -> None:
    """With `true_policies`, beliefs are the parameters that the actor wrote, in every view."""
    batch = opponents(batch_for(opponents, (4,)))
    sources: dict[Key, Key] = dict(zip(BELIEFS, (keys.LOGITS, keys.LOC, keys.SCALE), strict=True))
    for belief in set(BELIEFS) & set(opponents.writes):
        source = sources[belief]
        same = source in leaves(batch) and close(batch[belief], batch[source].unsqueeze(1).expand_as(batch[belief]))
        remedy = f"Copy `{keys.name(source)}`, or remove the trait `true_policies`."
        require(same, f"writes a `{keys.name(belief)}` that is not the policies'", remedy)


@rule("opponents")
def asks_for_the_past_that_it_reads(opponents: Opponents) -> None:
    """An opponent model that reads `recent.*` says by `history` how many steps before each."""
    reads = bool(RECENT & set(opponents.reads))
    problem = f"reads the recent past, but has a history of {opponents.history}"
    require(not reads or opponents.history > 0, problem, "Set `self.history` to the number of steps.")


@rule("opponents")
def trains_itself_alone(opponents: Opponents) -> None:
    """`fit` changes the opponent model's own parameters only, leaves the batch as it is, and returns finite scalars."""
    team = Team(opponents).prepare()
    batch = _fitted_batch(opponents, team)
    before, kept = {name: tensors_of(module) for name, module in team.modules().items()}, batch.clone()
    opponents.observe(batch)
    metrics = opponents.fit(batch, team.learning())
    for name in ("actor", "critic"):
        require(not changed(team.modules()[name], before[name]), f"changes the {name} in `fit`", "Minimise a loss of its own.")
    if any(parameter.requires_grad for parameter in opponents.parameters()) and opponents.spec.n_agents > 1:
        learnt = set(changed(opponents, before["opponents"])) & {name for name, _ in opponents.named_parameters()}
        require(bool(learnt), "has parameters that `fit` does not train", "Minimise a loss of its own in `fit`.")
    for key in leaves(kept):
        require(torch.equal(batch[key], kept[key]), f"changes `{keys.name(key)}` in `observe` or `fit`", "Work on a copy.")
    for name, value in metrics.items():
        scalar = isinstance(value, Tensor) and value.dim() == 0 and bool(value.isfinite()) and not value.requires_grad
        require(scalar, f"returns {value!r} as `{name}`, no finite scalar without gradient", "Detach it, and reduce it.")


def _fitted_batch(opponents: Opponents, team: Team) -> TensorDict:
    batch = _steps(opponents)
    parameters = {key for key in (keys.LOGITS, keys.LOC, keys.SCALE) if key in team.actor.writes}
    for key in parameters - leaves(batch):
        batch.set(key, fake_batch(opponents.spec, batch.batch_size, [key])[key])
    return batch


@rule("opponents")
def learns_nothing_from_dead_agents(opponents: Opponents) -> None:
    """What an agent that is not `alive` did does not change what the others believe of anyone."""
    if keys.ALIVE not in opponents.reads or opponents.spec.n_agents == 1:
        return
    found = []
    for move in (0, 1):
        with rng.isolated(3):
            team = Team(copy.deepcopy(opponents)).prepare()
            batch = _fitted_batch(team.opponents, team)
            team.opponents.observe(batch)
            batch[keys.ALIVE][:, :, -1] = False
            action = batch[keys.ACTION][:, :, -1]
            own = own_actions(opponents.spec)[-1]
            action.copy_((action + move) % int(own.sum()) if opponents.spec.discrete else action + 0.1 * move * own)
            team.opponents.fit(batch, team.learning())
            found.append(tensors_of(team.opponents))
    different = [name for name in found[0] if not close(found[0][name], found[1][name])]
    require(not different, f"learns `{', '.join(different)}` from agents that are not alive", "Weigh its loss by `alive`.")


@rule("opponents")
def believes_on_from_its_state(opponents: Opponents) -> None:
    """What an opponent model has learnt is in `state_dict`: what loads it believes the same."""
    fresh = copy.deepcopy(opponents)
    team = Team(opponents).prepare()
    batch = _fitted_batch(opponents, team)
    opponents.observe(batch)
    opponents.fit(batch, team.learning())
    fresh.load_state_dict(opponents.state_dict())
    found = []
    for own in (opponents, fresh):
        with rng.isolated(1):
            found.append(own(batch_for(own, (4,))))
    for key in opponents.writes:
        problem = f"writes another `{keys.name(key)}` after its state was loaded into a new one"
        require(torch.equal(found[0][key], found[1][key]), problem, "Keep what changes in parameters and persistent buffers.")
