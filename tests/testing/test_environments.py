"""Every rule that environments are held to, by an environment that breaks it and no other; marlkit's own keep them all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from meeting import DISCRETE, MEETING, environment, replaced
from small_scenarios import OPTIONS

from marlkit.component import Runtime
from marlkit.envs.foraging import ForagingEnvironment
from marlkit.envs.matrix_game import MatrixGameEnvironment
from marlkit.envs.product_game import ProductGameEnvironment
from marlkit.errors import RuleError
from marlkit.testing import check_environment


def checked(code: str) -> None:
    made = environment(code)
    check_environment(lambda runtime: made(runtime, num_envs=3, max_steps=6), steps=14)


RESTORE = 'self.places, self.steps = state["places"].to(self.device), state["steps"].to(self.device)'
REWARD = '("agents", "reward"), -apart'
BOTH = "torch.cat([self.places, self.places.mean(1, keepdim=True).expand_as(self.places)], -1)"
START = "        self._start(done)\n"
LAST = ", device=self.device)\n\n    def state"
REFUSED = '        self.refuse_unfit_action(action, "the meeting")\n'
SEEN = '        agents = {"observation": observation, '
RETURN = "        self._start(done)\n        return arrived, self._seen(done)\n"
OWN_GENERATOR = ("2 * torch.rand_like(self.places) - 1", "2 * torch.rand(self.places.shape, generator=self.own) - 1")
SAVED = ('"steps": self.steps.clone()}', '"steps": self.steps.clone(), "own": self.own.get_state()}')
LOADED = (
    '        self.places, self.steps = state["places"]',
    '        self.own.set_state(state["own"])\n        self.places, self.steps = state["places"]',
)
SEED = "\n    def seed(self, seed: int) -> None:\n        self.own.manual_seed(SEED)\n\n    def reset("


def own_generator(seed: str | None, made: str = "torch.Generator().manual_seed(runtime.seed)") -> list[tuple[str, str]]:
    """Changes that give it a generator of its own, and a `seed` that seeds it so."""
    changes = [
        ("        self.max_steps = max_steps\n", f"        self.max_steps = max_steps\n        self.own = {made}\n"),
        OWN_GENERATOR,
        SAVED,
        LOADED,
    ]
    return changes if seed is None else [*changes, ("\n    def reset(", SEED.replace("SEED", seed))]


MUTANTS: dict[str, tuple[str, list[tuple[str, str]], str]] = {
    "no observation": ("spec", [("observation=2", "observation=0")], "0 observation features"),
    "bounds of another team": ("spec", [("high=((1.0,),) * n_agents", "high=((1.0,),) * 2")], "bounds that are not 3 rows of 1"),
    "bounds the wrong way round": ("spec", [("low=((-1.0,),)", "low=((2.0,),)")], "lower bound above the upper"),
    "another kind of actions": (
        "spec",
        [('traits=("continuous",)', 'traits=("discrete",)')],
        "actions that are continuous and the trait `discrete`",
    ),
    "draws while it is built": (
        "construction",
        [("self.places = torch.zeros(num_envs", "self.places = torch.rand(num_envs")],
        "random generators of torch",
    ),
    "a key is missing": ("keys", [(', "is_first": is_first}', "}")], "has no `is_first` in what it gives as `reset`"),
    "a key too many": ("keys", [('"state": ', '"info": is_first, "state": ')], "has `info`, which its contract does not declare"),
    "a single result": ("keys", [("return arrived, self._seen(done)", "return arrived")], "returns a TensorDict from `step`"),
    "an observation of another size": (
        "shapes",
        [(SEEN, "        observation = observation[..., :1]\n" + SEEN)],
        "has `agents.observation` as [3, 1]",
    ),
    "an extra dimension": (
        "shapes",
        [(SEEN, "        observation = observation.unsqueeze(1)\n" + SEEN)],
        "has `agents.observation` as [1, 3, 2]",
    ),
    "rewards without their last dimension": (
        "shapes",
        [(REWARD, '("agents", "reward"), -apart.squeeze(-1)')],
        "has `next.agents.reward` as [3]",
    ),
    "another batch size": ("shapes", [("batch_size=[self.num_envs], ", "batch_size=[], ")], "has the batch size []"),
    "rewards of double precision": (
        "types",
        [(REWARD, '("agents", "reward"), -apart.double()')],
        "has `next.agents.reward` as float64",
    ),
    "flags that are numbers": (
        "types",
        [('"truncated", truncated', '"truncated", truncated.float()')],
        "has `next.truncated` as float32",
    ),
    "another device": (
        "device",
        [('"state": observation.flatten(1)', '"state": observation.flatten(1).to("meta")'), (LAST, ")\n\n    def state")],
        "has `state` on meta",
    ),
    "is_first never": (
        "first",
        [("return self._seen(everywhere)", "return self._seen(~everywhere)")],
        "`is_first` as false after `reset`",
    ),
    "is_first forgotten after an end": (
        "first",
        [("return arrived, self._seen(done)", "return arrived, self._seen(done & False)")],
        "is not the `done`",
    ),
    "no reset after the end": (
        "first",
        [(RETURN, "        return arrived, self._seen(torch.zeros_like(done))\n"), (" >= self.max", " == self.max")],
        "is not the `done`",
    ),
    "a reset that is only said": (
        "resets",
        [(START, "        self.steps = self.steps.masked_fill(done, 0)\n")],
        "the state in which it ended",
    ),
    "done without a cut": ("done", [("done = terminated | truncated", "done = terminated")], "not terminated | truncated"),
    "an end that is a cut too": (
        "done",
        [(" & ~terminated", ""), (">= self.max_steps", ">= 1"), ("apart < 0.1", "apart < 0.5")],
        "terminated and truncated at once",
    ),
    "no time limit": (
        "horizon",
        [("(self.steps >= self.max_steps) & ~terminated", "terminated & False"), ("apart < 0.1", "apart < 0.0")],
        "goes on after 6 steps",
    ),
    "places that are moved in place": (
        "kept",
        [("self.places = self.places + 0.2", "self.places += 0.2"), (BOTH, "self.places"), ("observation=2", "observation=1")],
        "writes to the `reset` that it gave before (`agents.observation`)",
    ),
    "an action that is clipped in place": (
        "kept",
        [("0.2 * action.clamp(-1, 1)", "0.2 * action.mul_(0.5).clamp_(-1, 1)")],
        "writes to the `action`",
    ),
    "a reward that is not finite": (
        "finite",
        [(REWARD, '("agents", "reward"), (-apart).sqrt()')],
        "`agents.reward` that is not finite",
    ),
    "an observation that is not finite": (
        "finite",
        [(SEEN, "        observation = observation / (observation > 0)\n" + SEEN)],
        "`agents.observation` that is not finite",
    ),
    "all that goes on is shown anew": (
        "continues",
        [(START, "        self._start(done)\n        self.places = self.places + 0.1\n")],
        "in `current` than in `arrived`",
    ),
    "actions beyond the bounds": ("clips", [("action.clamp(-1, 1)", "action")], "does not clip actions to its bounds"),
    "actions that are not looked at": (
        "refuses",
        [('        self.refuse_unfit_action(action, "the meeting")\n', "")],
        "does not refuse an action with an agent too many but fails",
    ),
    "actions that are converted": (
        "refuses",
        [('self.refuse_unfit_action(action, "the meeting")', 'self.refuse_unfit_action(action.float(), "the meeting")')],
        "does not refuse an action with another type but takes it",
    ),
    "an empty state": (
        "state",
        [('{"places": self.places.clone(), "steps": self.steps.clone()}', "{}"), (RESTORE, "pass")],
        "does not continue from its `state_dict`",
    ),
    "a forgotten counter": (
        "state",
        [(', "steps": self.steps.clone()}', "}"), (RESTORE, 'self.places = state["places"]')],
        "does not continue",
    ),
    "a state that goes on living": (
        "state",
        [
            ('"steps": self.steps.clone()}', '"steps": self.steps}'),
            ("self.steps = self.steps + 1", "self.steps += 1"),
            ("self.steps = self.steps.masked_fill(chosen, 0)", "self.steps.masked_fill_(chosen, 0)"),
        ],
        "does not continue",
    ),
    "a state that is no plain data": (
        "state",
        [('"steps": self.steps.clone()}', '"steps": self.steps.clone(), "me": type(self)}')],
        "more than plain data",
    ),
    "a generator that nobody seeds": ("seed", own_generator(None), "plays other episodes with equal seeds"),
    "a generator that starts at random": (
        "seed",
        own_generator(None, "torch.Generator()\n        self.own.seed()"),
        "plays other episodes with equal seeds",
    ),
    "a seed that is always the same": ("seed", own_generator("0"), "plays the same episodes with other seeds"),
    "a reward that is not the team's": (
        "team_reward",
        [('traits=("continuous",)', 'traits=("continuous", "team_reward")')],
        "pays its agents differently",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_environment_fails_the_rule_that_it_breaks(name: str) -> None:
    rule, changes, words = MUTANTS[name]
    with pytest.raises(RuleError, match=re.escape(words)) as caught:
        checked(replaced(MEETING, *changes))
    assert caught.value.rule == rule
    assert str(caught.value).startswith("env (MeetingEnvironment) ")
    assert f"Rule `{rule}`: " in str(caught.value)
    assert isinstance(caught.value, AssertionError)


MASKS: dict[str, tuple[list[tuple[str, str]], str]] = {
    "nothing is allowed": ([("everyone.expand(-1, -1, 3)", "everyone.expand(-1, -1, 3) & False")], "allows nothing"),
    "one agent may do nothing": (
        [("everyone.expand(-1, -1, 3)", "everyone.expand(-1, -1, 3) & (self.places > -0.5)")],
        "allows nothing to an agent that takes part",
    ),
    "padding is allowed": (
        [("horizon=max_steps)", "horizon=max_steps, action_sizes=(3, 2, 3))")],
        "allows what an agent does not have",
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    changes, words = MASKS[name]
    with pytest.raises(RuleError, match=words) as caught:
        checked(replaced(DISCRETE, *changes))
    assert caught.value.rule == "masks"


def test_an_agent_that_takes_no_part_needs_no_action() -> None:
    changes = [
        ("everyone.expand(-1, -1, 3)", "everyone.expand(-1, -1, 3) & (self.places > -0.5)"),
        ('"alive": everyone', '"alive": self.places > -0.5'),
    ]
    checked(replaced(DISCRETE, *changes))


@pytest.mark.parametrize(
    "code",
    [
        MEETING,
        DISCRETE,
        replaced(MEETING, *own_generator("seed")),
        replaced(MEETING, ("return arrived, self._seen(done)", "return arrived, self._seen(done).update(arrived.select())")),
    ],
    ids=["continuous", "discrete", "own generator", "shared"],
)
def test_a_sound_one_passes(code: str) -> None:
    checked(code)


def test_one_that_is_built_is_copied() -> None:
    runtime = Runtime(torch.device("cpu"), 0)
    check_environment(environment(MEETING)(runtime, num_envs=3, max_steps=6), steps=14)
    with pytest.raises(RuleError, match="goes on after 6 steps"):
        check_environment(environment(replaced(MEETING, *MUTANTS["no time limit"][1]))(runtime, max_steps=6))


# --- marlkit's own -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["cooperation", "climbing", "penalty", "xor"])
def test_matrix_games(game: Any) -> None:
    check_environment(lambda runtime: MatrixGameEnvironment(runtime, game=game, num_envs=3))


def test_the_product_game() -> None:
    check_environment(lambda runtime: ProductGameEnvironment(runtime, num_envs=3))


@pytest.mark.parametrize("reward", ["individual", "sum"])
@pytest.mark.parametrize("name", ["5x5-2p-2f", "Foraging-2s-6x9-3p-2f-coop-v3", "5x5-1p-1f"])
def test_foraging(name: str, reward: Any) -> None:
    check_environment(lambda runtime: ForagingEnvironment(runtime, map=name, reward=reward, num_envs=3, max_steps=12))


@pytest.mark.parametrize("continuous", [True, False], ids=["continuous", "discrete"])
@pytest.mark.parametrize("scenario", ["balance", "het_mass", "simple_speaker_listener"])
def test_vmas(scenario: str, continuous: bool) -> None:
    vmas = pytest.importorskip("marlkit.envs.vmas")
    options = {"scenario": scenario, "scenario_options": OPTIONS.get(scenario), "num_envs": 3, "max_steps": 4}
    build = vmas.VmasEnvironment
    check_environment(lambda runtime: build(runtime, continuous_actions=continuous, **options), steps=6)
