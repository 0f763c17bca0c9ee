"""The recent past of every step, against a walk back through the log of all played steps."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from scripted import Script, ScriptedEnvironment, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Data
from marlkit.data.replay import ReplayData
from marlkit.data.rollout import RolloutData
from marlkit.recipe.catalogue import Entry, components, load_class
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.testing import FREE_SIZES, key_shape

B, N, K = 3, 2, 60
DISCRETE = TeamSpec(N, 4, Discrete(3))
CONTINUOUS = TeamSpec(N, 4, Continuous(2))
SPECS = [pytest.param(DISCRETE, id="discrete"), pytest.param(CONTINUOUS, id="continuous")]
RECENT = (keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID)


LOGGED = (keys.OBSERVATION, keys.ACTION, keys.IS_FIRST)


def numbered(spec: TeamSpec, envs: int) -> Script:
    """A random script whose reward identifies the step: ``100 env + time``."""
    script = random_script(spec, envs, K, ends=0.2)
    number = torch.arange(K).view(K, 1) + 100 * torch.arange(envs)
    script.reward = number.view(K, envs, 1, 1).expand(K, envs, spec.n_agents, 1).float()
    return script


class Play:
    """Plays with a data component and logs all steps."""

    def __init__(self, spec: TeamSpec, data: Data, history: int, body: Any = "mlp", envs: int = B) -> None:
        self.spec, self.data = spec, data
        data.history = history
        self.actor = StochasticActor(spec, hidden=[6], body=body, sequence_length=4, output_gain=1.0)
        self.env = ScriptedEnvironment(spec, numbered(spec, envs))
        self.log: list[TensorDict] = []

    def iterate(self) -> list[TensorDict]:
        played = self.data.collect(self.env, self.actor)
        self.log.append(played.clone())
        return list(self.data.batches(played, self.actor))

    def joined(self, *selected: keys.Key) -> TensorDict:
        """All played steps, ``[B, steps so far]``."""
        log: TensorDict = torch.cat([batch.select(*selected) for batch in self.log], 1)
        return log

    def past(self, env: int, last: int, oldest: int) -> tuple[Tensor, Tensor, Tensor]:
        """The steps of the running episode up to ``last``, walking back from it; observations, actions and which exist."""
        length, log = self.data.history, self.joined(*LOGGED)
        observation = torch.zeros(length, N, self.spec.observation)
        action = torch.zeros_like(log[keys.ACTION][0, :1]).expand(length, *[-1] * (log[keys.ACTION].dim() - 2)).clone()
        valid = torch.zeros(length, dtype=torch.bool)
        for back in range(length):
            if last - back < oldest:
                break
            observation[-1 - back] = log[keys.OBSERVATION][env, last - back]
            action[-1 - back] = log[keys.ACTION][env, last - back]
            valid[-1 - back] = True
            if log[keys.IS_FIRST][env, last - back]:
                break
        return observation, action, valid

    def check(self, batch: TensorDictBase, oldest: int = 0) -> int:
        """Compare every row of a batch; return the number of valid past steps."""
        rows = batch.flatten()
        for row in rows:
            number = int(row[keys.REWARD][0, 0])
            env, time = number // 100, number % 100
            begins = bool(row[keys.IS_FIRST])
            before = self.past(env, -1 if begins else time - 1, oldest)
            after = self.past(env, time, oldest)
            for key, wanted, following in zip(RECENT, before, after, strict=True):
                assert torch.equal(row[key], wanted), (key, env, time)
                assert torch.equal(row[keys.following(key)], following), (key, env, time)
        return int(rows[keys.RECENT_VALID].sum())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("steps", "history"), [(6, 3), (6, 1), (2, 5), (1, 3), (12, 12)])
def test_rollouts_have_the_past_across_their_borders(spec: TeamSpec, steps: int, history: int) -> None:
    torch.manual_seed(0)
    play = Play(spec, RolloutData(spec, steps=steps), history)
    shown = sum(play.check(batch) for _ in range(K // steps - 1) for batch in play.iterate())
    assert shown > 50
    log = play.joined(*RECENT, keys.TRUNCATED, keys.following(keys.RECENT_VALID))
    borders = log[keys.RECENT_VALID][:, steps::steps, -1]
    assert borders.any(), "some step that a rollout begins with is shown the rollout before"
    ended = log[keys.TRUNCATED][:, :, 0] & (log[keys.RECENT_VALID].sum(-1) > 0)
    assert log[keys.following(keys.RECENT_VALID)][ended][:, -1].all(), "a state that is cut is shown its own episode"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("body", ["mlp", "gru"])
@pytest.mark.parametrize("history", [1, 3, 20])
def test_replay_has_the_past_as_far_as_it_is_stored(spec: TeamSpec, body: Any, history: int) -> None:
    """Also where the ring has been overwritten, and where the history is longer than the ring."""
    torch.manual_seed(0)
    data = ReplayData(spec, steps=4, capacity=10 * B, batch_size=60, updates=2, warm_up=0)
    play = Play(spec, data, history, body)
    shown = 0
    for iteration in range(1, 8):
        for batch in play.iterate():
            shown += play.check(batch, oldest=max(0, 4 * iteration - 10))
    assert shown > 300


def test_slots_that_were_never_written_are_not_valid() -> None:
    data = ReplayData(DISCRETE, steps=2, capacity=20 * B, batch_size=60, updates=1, warm_up=0)
    play = Play(DISCRETE, data, 5)
    play.iterate()
    assert data._storage is not None
    data._storage[2:].apply_(lambda tensor: tensor.fill_(float("nan") if tensor.is_floating_point() else True))
    (batch,) = data.batches(play.log[-1], play.actor)
    play.check(batch)
    assert torch.isfinite(batch[keys.RECENT_OBSERVATION]).all()


def test_the_past_goes_on_after_a_resume() -> None:
    torch.manual_seed(0)
    whole = Play(DISCRETE, RolloutData(DISCRETE, steps=2), 5)
    for _ in range(2):
        whole.iterate()
    file, state = io.BytesIO(), whole.data.state_dict()
    seen = state["past"]["agents"]["observation"]
    assert seen.untyped_storage().nbytes() == 4 * seen.numel() == 4 * 5 * B * N * 4, "what is saved is no view of more"
    torch.save(state, file)
    generator, now = torch.get_rng_state(), whole.env.now
    expected = [batch.clone() for _ in range(4) for batch in whole.iterate()]
    cut = Play(DISCRETE, RolloutData(DISCRETE, steps=2), 5)
    cut.actor.load_state_dict(whole.actor.state_dict())
    file.seek(0)
    cut.data.load_state_dict(torch.load(file, weights_only=True))
    cut.env.now = now
    torch.set_rng_state(generator)
    for wanted in expected:
        (found,) = cut.iterate()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted.keys(True, True))
    assert any(wanted[keys.RECENT_VALID][:, 0, :3].any() for wanted in expected[:1]), "steps from before the resume are shown"


# --- the contract of data -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", components("data").values(), ids=components("data"))
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("body", ["mlp", "gru"])
@pytest.mark.parametrize("history", [0, FREE_SIZES["M"]])
def test_data_write_the_keys_that_a_component_reads_and_no_others(entry: Entry, spec: TeamSpec, body: Any, history: int) -> None:
    cls: Any = load_class(entry)
    play = Play(spec, cls(spec, **cls.brief(8)), history, body, envs=2)
    own = {*play.actor.writes, *play.env.writes, keys.HIDDEN}
    play.data.shown = None if history else frozenset({*own, *map(keys.following, own)})
    (batch,) = play.iterate()
    written = {key for key in batch.keys(True, True) if key not in own and keys.current(key) not in own}
    declared = {*play.data.writes, *map(keys.following, RECENT)}
    assert written == (declared if history else set())
    for key in written:
        assert batch[key].shape == (*batch.batch_size, *key_shape(spec, key))
        floating = key[-1] == "action" and not spec.discrete
        assert batch[key].dtype == (torch.float32 if floating else getattr(torch, keys.describe(key).dtype))
    assert set(play.env.writes) <= set(batch.keys(True, True)), "what the environment said is all there"
    assert {keys.ACTION, keys.LOG_PROB} <= set(batch.keys(True, True))
