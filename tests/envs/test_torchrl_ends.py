"""Ends of episodes and of agents: for every combination of the flags that a TorchRL environment may have, by a script of ends."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scripted import learner_of
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

pytest.importorskip("torchrl")

from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Runtime
from marlkit.critics.local import LocalCritic
from marlkit.data.replay import ReplayData
from marlkit.data.rollout import RolloutData
from marlkit.envs.torchrl import TorchrlEnvironment
from marlkit.estimators.gae import GaeEstimator
from marlkit.estimators.n_step import NStepEstimator
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.estimators.td_lambda import TdLambdaEstimator
from marlkit.spec import TeamSpec
from marlkit.testing import check_environment

RUNTIME = Runtime(torch.device("cpu"), seed=0)
NEVER = (99, "never")
SCRIPT = [
    ((2, "true"), (3, "cut"), NEVER),
    ((1, "cut"), (3, "true"), NEVER),
    ((2, "true"), (2, "true"), NEVER),
    ((2, "cut"), (2, "cut"), NEVER),
    (NEVER, NEVER, (2, "true")),
    ((1, "true"), NEVER, (3, "cut")),
    (NEVER, (2, "cut"), (3, "true")),
]
"""For each environment the step at which, and the way in which, its first agent, its second agent and the whole end."""
ALL = ("done", "terminated", "truncated")
FLAGS: list[tuple[str, ...]] = [(), ("done",), ("terminated",), ("truncated",), ALL[:2], ALL[1:], ALL]


class Scripted(EnvBase):
    """Two agents that see the number of the step; every agent is paid its own number, 1 or 2, in every step.

    Args:
        root: the flags that it has at its root.
        own: the flags that every agent has.
        mask: whether it says who is alive itself.
    """

    def __init__(self, root: list[str], own: list[str], mask: bool = False, team: bool = False) -> None:
        batch = len(SCRIPT)
        super().__init__(batch_size=(batch,))
        self.root, self.own, self.mask = root, own, mask
        self.now = torch.zeros(batch, dtype=torch.int64)
        agents = Composite(observation=Unbounded((batch, 2, 1)), shape=(batch, 2))
        if mask:
            agents["mask"] = Binary(shape=(batch, 2), dtype=torch.bool)
        self.observation_spec = Composite(agents=agents, shape=(batch,))
        bounded = Bounded(-1.0, 1.0, shape=(batch, 2, 1))
        self.action_spec = Composite(agents=Composite(action=bounded, shape=(batch, 2)), shape=(batch,))
        paid = Composite(reward=Unbounded((batch, 2, 1)), shape=(batch, 2))
        self.team = team
        self.reward_spec = Unbounded((batch, 1)) if team else Composite(agents=paid, shape=(batch,))
        done = Composite({name: Binary(shape=(batch, 1), dtype=torch.bool) for name in root}, shape=(batch,))
        if own:
            done["agents"] = Composite({name: Binary(shape=(batch, 2, 1), dtype=torch.bool) for name in own}, shape=(batch, 2))
        self.done_spec = done

    def _flags(self, names: list[str], who: list[int]) -> dict[str, Tensor]:
        """Flags ``[B, K, 1]``, raised from the end on."""
        ended = torch.tensor([[SCRIPT[b][i][0] <= self.now[b] for i in who] for b in range(len(SCRIPT))])
        truly = torch.tensor([[SCRIPT[b][i][1] == "true" for i in who] for b in range(len(SCRIPT))])
        found = {"done": ended, "terminated": ended & truly, "truncated": ended & ~truly}
        return {name: found[name].unsqueeze(-1) for name in names}

    def _now(self) -> TensorDict:
        seen = TensorDict({"agents": {"observation": self.now.view(-1, 1, 1).expand(-1, 2, -1).float()}}, self.batch_size)
        for name, flags in self._flags(self.own, [0, 1]).items():
            seen["agents", name] = flags
        for name, flags in self._flags(self.root, [2]).items():
            seen[name] = flags.squeeze(1)
        if self.mask:
            seen["agents", "mask"] = torch.ones(len(SCRIPT), 2, dtype=torch.bool)
        return seen

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        resets = [tensordict[key] for key in self.reset_keys if tensordict is not None and key in tensordict.keys(True)]
        chosen = resets[0].flatten(1).any(1) if resets else torch.ones(self.batch_size, dtype=torch.bool)
        self.now = self.now.masked_fill(chosen, 0)
        return self._now()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.now = self.now + 1
        now = self._now()
        if self.team:
            return now.set("reward", torch.ones(len(SCRIPT), 1))
        now["agents", "reward"] = torch.tensor([[1.0], [2.0]]).expand(len(SCRIPT), -1, -1)
        return now

    def _set_seed(self, seed: int | None) -> None:
        pass


def create(root: tuple[str, ...], own: tuple[str, ...], max_steps: int | None = None, **options: Any) -> TorchrlEnvironment:
    chosen = {"root": list(root), "own": list(own), **options}
    factory = f"{__name__}.Scripted"
    return TorchrlEnvironment(
        RUNTIME, factory=factory, options=chosen, num_envs=len(SCRIPT), actions="continuous", max_steps=max_steps
    )


def shown(event: tuple[int, str], flags: tuple[str, ...]) -> tuple[int, str]:
    """An end as far as these flags show it: what is only done has terminated."""
    step, way = event
    if way == "true" and not {"done", "terminated"} & set(flags):
        return NEVER
    if way == "cut" and flags == ("done",):
        return step, "true"
    return NEVER if way == "cut" and not {"done", "truncated"} & set(flags) else event


def expected(root: tuple[str, ...], own: tuple[str, ...], env: int) -> list[tuple[bool, bool, list[bool], list[bool]]]:
    """Terminated, truncated, whose episode truly ended and whose ended, at each step of the first episode, by hand."""
    agents, whole = [shown(event, own) for event in SCRIPT[env][:2]], shown(SCRIPT[env][2], root)
    found = []
    for now in range(1, 5):
        ended = [step <= now for step, _ in agents]
        truly = [step <= now and way == "true" for step, way in agents]
        over = all(ended) or whole[0] <= now
        terminated = all(truly) or (whole[0] <= now and whole[1] == "true")
        found.append((terminated, over and not terminated, [one or terminated for one in truly], [one or over for one in ended]))
        if over:
            break
    return found


@pytest.mark.parametrize("root", FLAGS, ids="+".join)
@pytest.mark.parametrize("own", FLAGS, ids="+".join)
def test_every_combination_of_flags(root: tuple[str, ...], own: tuple[str, ...]) -> None:
    if not root and not own:
        pytest.skip("TorchRL gives such an environment flags at the root")
    env = create(root, own)
    current = env.reset()
    assert current[keys.ALIVE].all()
    expectations = [expected(root, own, b) for b in range(len(SCRIPT))]
    for now in range(4):
        arrived, current = env.step(torch.zeros(len(SCRIPT), 2, 1))
        for b, of_steps in enumerate(expectations):
            if now >= len(of_steps):
                continue
            terminated, truncated, truly, ended = of_steps[now]
            assert (arrived["terminated"][b].item(), arrived["truncated"][b].item()) == (terminated, truncated), (b, now)
            assert arrived["done"][b].item() == (terminated or truncated)
            own_ends = [event[0] <= now + 1 for event in (shown(event, own) for event in SCRIPT[b][:2])]
            assert arrived[keys.ALIVE][b].flatten().tolist() == [not one for one in own_ends]
            assert (keys.AGENT_DONE[1:] in arrived.keys(True)) == bool(own)
            if own:
                assert arrived[keys.AGENT_TERMINATED[1:]][b].flatten().tolist() == truly
                assert arrived[keys.AGENT_DONE[1:]][b].flatten().tolist() == ended
            over = terminated or truncated
            assert current["is_first"][b].item() == over
            assert current[keys.ALIVE][b].flatten().tolist() == [over or not one for one in own_ends]
            assert current[keys.OBSERVATION][b].flatten().tolist() == [0.0 if over else now + 1.0] * 2


def test_one_agent_terminates_and_the_other_is_cut_and_nothing_is_said_of_the_whole() -> None:
    env = create((), ("terminated", "truncated"))
    env.reset()
    steps = [env.step(torch.zeros(len(SCRIPT), 2, 1))[0] for _ in range(3)]
    assert [step["done"][0].item() for step in steps] == [False, False, True]
    assert (steps[2]["terminated"][0].item(), steps[2]["truncated"][0].item()) == (False, True)


def test_the_time_limit_cuts_whoever_goes_on() -> None:
    env = create(ALL, ("terminated", "truncated"), max_steps=2)
    env.reset()
    arrived = [env.step(torch.zeros(len(SCRIPT), 2, 1))[0] for _ in range(2)][1]
    assert arrived["truncated"].flatten().tolist() == [True, True, False, True, False, True, True]
    assert arrived[keys.AGENT_TERMINATED[1:]][0].flatten().tolist() == [True, False]
    assert arrived[keys.AGENT_DONE[1:]].all()


def test_who_is_paid_with_the_team_goes_on_with_the_team() -> None:
    env = create((), ("terminated", "truncated"), team=True)
    assert env.spec.team_reward
    env.reset()
    arrived, _ = env.step(torch.zeros(len(SCRIPT), 2, 1))
    assert keys.AGENT_DONE[1:] not in arrived.keys(True)


@pytest.mark.parametrize("mask", [False, True])
def test_it_keeps_the_rules_of_every_environment(mask: bool) -> None:
    check_environment(lambda runtime: create(ALL, ("terminated", "truncated"), mask=mask), resumable=False)


# --- what is learnt from it --------------------------------------------------------------------------------------------------

GAMMA = 0.5


class StepCritic(LocalCritic):
    """The value of a state is ten times what is observed there: the number of the step."""

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__(spec, hidden=[2], value_norm=False)

    def outputs(self, batch: TensorDictBase) -> Tensor:
        seen: Tensor = 10 * batch[keys.OBSERVATION]
        return seen.unsqueeze(0)


def return_by_hand(env: int, agent: int, step: int, lmbda: float) -> float:
    """TD(lambda) return of an agent at a step, 0-based, of the first episode, from its own end; only agents have flags."""
    last, way = SCRIPT[env][agent]
    value = 0.0 if step + 1 == last and way == "true" else 10.0 * (step + 1)
    reward = agent + 1.0
    if step + 1 == last:
        return reward + GAMMA * value
    return reward + GAMMA * ((1 - lmbda) * value + lmbda * return_by_hand(env, agent, step + 1, lmbda))


@pytest.mark.parametrize("lmbda", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", ["gae", "td_lambda", "n_step", "one_step"])
def test_the_return_of_an_agent_ends_with_the_agent(name: str, lmbda: float) -> None:
    env = create((), ("terminated", "truncated"))
    spec, gamma = env.spec, GAMMA
    made: dict[str, Any] = {
        "gae": lambda: GaeEstimator(spec, gamma=gamma, lmbda=lmbda),
        "td_lambda": lambda: TdLambdaEstimator(spec, gamma=gamma, lmbda=lmbda),
        "n_step": lambda: NStepEstimator(spec, gamma=gamma, n=4),
        "one_step": lambda: OneStepEstimator(spec, gamma=gamma),
    }
    fixed = {"n_step": 1.0, "one_step": 0.0}.get(name, lmbda)
    learner = learner_of(
        env, StochasticActor(spec, hidden=[2]), critic=StepCritic(spec), estimator=made[name](), data=RolloutData(spec, steps=4)
    )
    batch = learner.collect()
    learner.annotate(batch)
    learner.estimate(batch)
    compared = 0
    for b, agent in itertools.product(range(4), range(2)):  # where every agent ends by itself
        for step in range(SCRIPT[b][agent][0]):
            found = batch[keys.VALUE_TARGET][b, step, agent].item()
            assert found == pytest.approx(return_by_hand(b, agent, step, fixed)), (b, agent, step)
            compared += 1
    assert compared == 17


def test_a_replay_keeps_the_ends_of_agents() -> None:
    torch.manual_seed(0)
    env = create((), ("terminated", "truncated"))
    spec = env.spec
    data = ReplayData(spec, steps=3, capacity=3 * len(SCRIPT), batch_size=400, warm_up=0)
    estimator = OneStepEstimator(spec, gamma=GAMMA)
    learner = learner_of(env, StochasticActor(spec, hidden=[2]), critic=StepCritic(spec), estimator=estimator, data=data)
    (batch,) = data.batches(learner.collect(), learner.actor)
    learner.annotate(batch)
    learner.estimate(batch)
    following = 10 * batch[keys.following(keys.OBSERVATION)]
    target = batch[keys.REWARD] + GAMMA * following.masked_fill(batch[keys.AGENT_TERMINATED], 0.0)
    assert torch.equal(batch[keys.VALUE_TARGET], target)
    assert 0 < batch[keys.AGENT_TERMINATED].float().mean() < 1
