"""Rules for data. They are tried in a short form (:meth:`marlkit.component.Data.brief`) on two scripted environments."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys, rng
from marlkit.component import Actor, Data
from marlkit.contract import Contract, When
from marlkit.errors import OptionError
from marlkit.keys import Key
from marlkit.nn.distributions import CategoricalTeam, NormalTeam, TeamDistribution, behaviour_distribution
from marlkit.spec import TeamSpec
from marlkit.testing.batches import leaves
from marlkit.testing.rules import close, require, rule
from marlkit.testing.scripted import ScriptedEnvironment, random_script

STEPS = 4
ROUNDS = 3
PAST = 2


class CountingActor(Actor):
    """Plays at random and carries how many steps of the episode it has seen, counted by each agent.

    Args:
        spec: the team.
    """

    contract = Contract(
        reads=(keys.OBSERVATION, keys.IS_FIRST, keys.HIDDEN),
        writes=(
            keys.ACTION,
            keys.LOG_PROB,
            When("discrete", (keys.LOGITS,)),
            When("continuous", (keys.LOC, keys.SCALE)),
            keys.following(keys.HIDDEN),
        ),
        traits=("independent_agents",),
    )

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.sequence_length = None

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        """Another for every observation, batch ``[*]``."""
        available = self.available(batch, agents)
        seen = batch[keys.OBSERVATION][..., slice(None) if agents is None else list(agents), :1]
        outputs = 0.3 * seen * torch.arange(1.0, 1 + available.shape[-1])
        return CategoricalTeam(outputs, available) if self.spec.discrete else NormalTeam(outputs, outputs.sigmoid(), available)

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        """Play, and count this step; batch ``[*]``."""
        policy = self.distribution(batch)
        seen = batch[keys.HIDDEN].masked_fill(batch[keys.IS_FIRST].unsqueeze(-1), 0.0)
        self.write_choice(batch, policy, policy.mode() if deterministic else policy.sample())
        return batch.set(keys.following(keys.HIDDEN), seen + 1)

    def initial_state(self, batch_size: int) -> dict[Key, Tensor]:
        """No step seen, ``[B, N, 1]``."""
        return {keys.HIDDEN: torch.zeros(batch_size, self.spec.n_agents, 1)}


class Trial:
    """Data in its short form, played for some rounds, with what happened in the environment."""

    def __init__(self, data: Data, past: int = 0) -> None:
        brief = {name: value for name, value in data.brief(STEPS).items() if name in data.options}
        self.data = type(data)(data.spec, **{**data.options, **brief})
        self.data.history = past
        self.env = ScriptedEnvironment(data.spec, random_script(data.spec, envs=2, steps=50))
        self.resets = 0
        self.actor = CountingActor(data.spec)
        self.seen: list[TensorDict] = []
        self.arrived: list[TensorDict] = []
        self._watch()

    def _watch(self) -> None:
        reset, step = self.env.reset, self.env.step

        def watched_reset() -> TensorDict:
            self.resets += 1
            self.seen.append(reset().clone())
            return self.seen[-1].clone()

        def watched_step(action: Tensor) -> tuple[TensorDict, TensorDict]:
            arrived, current = step(action.clone())
            self.arrived.append(arrived.clone())
            self.seen.append(current.clone())
            return arrived, current

        self.env.reset, self.env.step = watched_reset, watched_step  # type: ignore[method-assign]

    def collect(self) -> TensorDict:
        """The steps of one round, ``[B, T]``; a copy, because the next round may overwrite it."""
        return self.data.collect(self.env, self.actor).clone()

    def happened(self, first: int, steps: int) -> Any:
        """What was seen, done and arrived at in these steps, ``[B, T]``."""
        now: Any = torch.stack(self.seen[first : first + steps], 1)
        now.set(keys.ACTION, torch.stack(self.env.taken[first : first + steps], 1))
        return now.set("next", torch.stack(self.arrived[first : first + steps], 1))


def _joined(batches: list[TensorDict], axis: int) -> Any:
    return torch.cat(batches, axis)


@rule("data")
def goes_on_where_it_stopped(data: Data) -> None:
    """Environments are started once and played on over iterations: episodes are longer than a rollout."""
    trial = Trial(data)
    for _ in range(ROUNDS):
        trial.collect()
    require(
        trial.resets == 1, f"starts its environments {trial.resets} times in {ROUNDS} rounds", "Reset before the first step only."
    )


@rule("data")
def stores_what_happened(data: Data) -> None:
    """`collect` gives `[B, T]`: what was seen, done and arrived at in every step, before any reset, with what the actor wrote."""
    trial = Trial(data)
    first = 0
    for _ in range(ROUNDS):
        batch = trial.collect()
        require(batch.batch_dims == 2 and batch.batch_size[0] == 2, f"collects a batch {list(batch.batch_size)}", "Give [B, T].")
        wanted = trial.happened(first, batch.batch_size[1])
        for key in leaves(wanted):
            same = key in leaves(batch) and close(batch[key], wanted[key])
            remedy = "Store `env.step`'s `arrived` under `next`, and go on from its `current`."
            require(same, f"stores another `{keys.name(key)}` than there was", remedy)
        missing = set(trial.actor.writes) - leaves(batch)
        require(not missing, f"loses {sorted(map(keys.name, missing))}, which the actor wrote", "Keep all that it writes.")
        first += batch.batch_size[1]
    require(first == len(trial.env.taken), f"stores {first} of {len(trial.env.taken)} steps", "Store every step that was played.")


@rule("data")
def carries_what_the_actor_remembers(data: Data) -> None:
    """What the actor carries is handed from step to step and over iterations, and stands in the batch before each step."""
    trial = Trial(data)
    rounds = [trial.collect() for _ in range(ROUNDS)]
    batch = _joined(rounds, 1)
    counted = torch.zeros(2, data.spec.n_agents, 1)
    for step in range(batch.batch_size[1]):
        same = close(batch[keys.HIDDEN][:, step], counted)
        remedy = "Start with `actor.initial_state`, and hand on `next` of every carried key."
        require(same, f"hands the actor another state at step {step} than it wrote before", remedy)
        started = batch[keys.IS_FIRST][:, step].unsqueeze(-1)
        counted = torch.where(started, torch.zeros_like(counted), counted) + 1
        same = close(batch[keys.following(keys.HIDDEN)][:, step], counted)
        require(same, "loses what the actor carries to the next step", remedy)


@rule("data")
def gives_batches_of_what_was_played(data: Data) -> None:
    """Batches `[*, T]` hold steps that were played, each with its own next state, and no gradient."""
    trial = Trial(data)
    played = [trial.collect() for _ in range(ROUNDS)]
    known = _joined(played, 1).reshape(-1)
    batches = [batch.clone() for batch in trial.data.batches(played[-1], trial.actor)]
    require(bool(batches), "gives no batch to learn from in its short form", "See `Data.brief`, and `Data.batches`.")
    for batch in batches:
        require(batch.batch_dims == 2, f"gives a batch {list(batch.batch_size)}", "Give [*, T], [*, 1] for single steps.")
        rows = batch.reshape(-1)
        distance = (rows[keys.OBSERVATION].unsqueeze(1) - known[keys.OBSERVATION].unsqueeze(0)).abs().flatten(2).amax(-1)
        require(bool((distance.amin(1) < 1e-6).all()), "gives observations that were never seen", "Draw stored steps only.")
        places = distance.argmin(1)
        few = len(rows) > 1 and len(places.unique()) == 1
        require(not few, f"gives one step {len(rows)} times in a batch", "Draw each row by itself.")
        source = known[places]
        for key in (keys.ACTION, keys.LOG_PROB, keys.REWARD, keys.TERMINATED, keys.following(keys.OBSERVATION)):
            same = key in leaves(rows) and close(rows[key], source[key])
            require(same, f"gives another `{keys.name(key)}` than belongs to the step", "Keep the parts of a step together.")
        gradient = [key for key in leaves(batch) if batch[key].requires_grad]
        require(not gradient, f"gives {gradient} with gradient", "Play under `torch.no_grad()`.")


@rule("data", trait="on_policy")
def gives_what_was_just_played(data: Data) -> None:
    """With `on_policy`, the steps of the batches of an iteration are those just played, in order, each once."""
    trial = Trial(data)
    for _ in range(ROUNDS):
        played = trial.data.collect(trial.env, trial.actor)
        wanted = played.clone()
        batches = [batch.clone() for batch in trial.data.batches(played, trial.actor)]
        joined = _joined(batches, 0 if batches[0].batch_size[1] == wanted.batch_size[1] else 1) if batches else wanted[:0]
        same = joined.batch_size == wanted.batch_size and all(
            close(joined[key], wanted[key]) for key in (keys.OBSERVATION, keys.ACTION, keys.REWARD)
        )
        require(same, "gives other steps than were just played", "Yield what was played, or remove the trait `on_policy`.")


@rule("data")
def shows_the_recent_past(data: Data) -> None:
    """Data that writes `recent.*` shows the `history` steps before, and zeros that are not valid beyond the episode."""
    if not {keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID} <= set(data.writes):
        return
    trial = Trial(data, past=PAST)
    played = [trial.collect() for _ in range(ROUNDS)]
    known = _joined(played, 1)
    batch = next(iter(trial.data.batches(played[-1], trial.actor)))
    rows = batch.reshape(-1)
    flat = known.reshape(-1)
    distance = (rows[keys.OBSERVATION].unsqueeze(1) - flat[keys.OBSERVATION].unsqueeze(0)).abs().flatten(2).amax(-1)
    length = known.batch_size[1]
    for row, place in enumerate(distance.argmin(1).tolist()):
        env, step = divmod(place, length)
        shown: dict[Key, Tensor] = {
            key: rows[key][row] for key in (keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID)
        }
        _require_past(shown, known[env], step)


def _require_past(shown: dict[Key, Tensor], steps: TensorDict, now: int) -> None:
    remedy = "See marlkit/data/_recent_past.py: `write_recent` does it."
    running = True
    for back in range(1, PAST + 1):
        running = running and not bool(steps[keys.IS_FIRST][now - back + 1])
        valid = bool(shown[keys.RECENT_VALID][PAST - back])
        # What is older than all that is still stored cannot be shown.
        require(running or not valid, "shows steps of another episode as the recent past", remedy)
        for key, source in ((keys.RECENT_OBSERVATION, keys.OBSERVATION), (keys.RECENT_ACTION, keys.ACTION)):
            found = shown[key][PAST - back]
            wanted = steps[source][now - back] if valid else torch.zeros_like(found)
            require(close(found, wanted), f"shows another `{keys.name(key)}` than there was {back} steps before", remedy)


@rule("data")
def shows_what_was_played_from(data: Data) -> None:
    """Data that writes `behaviour.*` shows the parameters of the distributions that gave the actions their log-probabilities."""
    shown = [key for key in keys.BEHAVIOUR.values() if key in data.writes]
    if not shown:
        return
    trial = Trial(data)
    played = [trial.collect() for _ in range(ROUNDS)]
    for batch in trial.data.batches(played[-1], trial.actor):
        missing = [keys.name(key) for key in shown if key not in leaves(batch)]
        remedy = "Keep what the actor wrote of the policy that plays, under the keys of `keys.BEHAVIOUR`."
        require(not missing, f"does not write {', '.join(missing)}", remedy)
        rows = batch.reshape(-1)
        then = behaviour_distribution(trial.actor.distribution(rows), rows)
        same = close(then.log_prob(rows[keys.ACTION]), rows[keys.LOG_PROB])
        require(same, "shows parameters of another distribution than the one that played", remedy)


@rule("data")
def plays_on_from_its_state(data: Data) -> None:
    """`state_dict` is plain data and tensors and decides what comes next: what loads it gives the same steps and batches."""
    one, other = Trial(data, past=PAST), Trial(data, past=PAST)
    one.collect()
    state = copy.deepcopy(one.data.state_dict())
    _require_plain(state)
    other.env.now = one.env.now
    other.data.load_state_dict(state)
    found: list[list[TensorDict]] = []
    for trial in (one, other):
        with rng.isolated(4):
            played = trial.data.collect(trial.env, trial.actor)
            found.append([played.clone(), *(batch.clone() for batch in trial.data.batches(played, trial.actor))])
    remedy = "Save the state in which the next rollout starts, and what is stored."
    require(len(found[0]) == len(found[1]), "gives another number of batches after its state was loaded", remedy)
    for first, second in zip(*found, strict=True):
        same = leaves(first) == leaves(second) and all(close(first[key], second[key]) for key in leaves(first))
        require(same, "plays on otherwise after its state was loaded into a new one", remedy)


def _require_plain(value: Any) -> None:
    if isinstance(value, dict):
        for inner in value.values():
            _require_plain(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _require_plain(inner)
    else:
        plain = value is None or isinstance(value, (Tensor, bool, int, float, str))
        problem = f"has a {type(value).__name__} in its state, which a checkpoint does not load"
        require(plain, problem, "Save plain data and tensors: `steps.to_dict()` of a TensorDict.")


@rule("data")
def refuses_by_naming_an_option(data: Data) -> None:
    """`refuse_unfit` accepts the short form, and refuses by an `OptionError` that names an own option or `sequence_length`."""
    short = Trial(data).data
    short.refuse_unfit(2, 1_000_000, None)
    try:
        data.refuse_unfit(10**6, 1, 10**6)
    except OptionError as error:
        known = {*data.options, "sequence_length"}
        problem = f"refuses `{error.option}`, which is none of its options"
        require(error.option in known, problem, "Name an own option, or `sequence_length` of the actor.")
