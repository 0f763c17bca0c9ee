"""Scenario classes of a user: their names, options, numbers and groups of agents are checked as those of VMAS are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vmas")

from marlkit import rng
from marlkit.component import Runtime
from marlkit.envs._vmas import scenarios
from marlkit.envs.vmas import VmasEnvironment
from marlkit.errors import OptionError

HEAD = """
import torch
from vmas.scenarios import balance, football
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import ScenarioUtils

SPEED = "speed"
DEFAULTS = {"speed": 1.0}

def taken_from(options):
    return options.get("speed", 1.0)

class Field(BaseScenario):
    def reset_world_at(self, env_index=None): ...
    def observation(self, agent): return agent.state.pos
    def reward(self, agent): return agent.state.pos[:, 0]
    def build(self, batch_dim, device, n=2, **marks):
        world = World(batch_dim, device)
        for i in range(n):
            world.add_agent(Agent(name=f"agent_{i}", **marks))
        return world
"""

READABLE = {
    "pop": """
        def make_world(self, batch_dim, device, **kwargs):
            self.speed = kwargs.pop("speed", 1.0)
            ScenarioUtils.check_kwargs_consumed(kwargs)
            return self.build(batch_dim, device)
    """,
    "get, another name, a constant": """
        def make_world(self, batch_dim, device, **options):
            self.speed = options.get(SPEED, 1.0)
            return self.build(batch_dim, device)
    """,
    "subscript": """
        def make_world(self, batch_dim, device, **kwargs):
            self.speed = kwargs["speed"] if "speed" in kwargs else 1.0
            return self.build(batch_dim, device)
    """,
    "argument": """
        def make_world(self, batch_dim, device, speed=1.0, **kwargs):
            if kwargs:
                raise TypeError(f"unknown: {kwargs}")
            return self.build(batch_dim, device)
    """,
    "only arguments": """
        def make_world(self, batch_dim, device, *, speed=1.0):
            return self.build(batch_dim, device)
    """,
    "helper method": """
        def take(self, device, **options):
            self.speed = options.pop("speed", 1.0)
        def make_world(self, batch_dim, device, **kwargs):
            self.take(device, **kwargs)
            return self.build(batch_dim, device)
    """,
    "helper function": """
        def make_world(self, batch_dim, device, **kwargs):
            self.speed = taken_from(kwargs)
            return self.build(batch_dim, device)
    """,
    "helper method that takes the dictionary": """
        def take(self, options):
            self.speed = options.pop("speed", 1.0)
        def make_world(self, batch_dim, device, **kwargs):
            self.take(kwargs)
            return self.build(batch_dim, device)
    """,
}
"""Bodies of ``make_world`` whose only option is `speed`, as their source tells."""

OPAQUE = {
    "a copy": """
        def make_world(self, batch_dim, device, **kwargs):
            options = dict(kwargs)
            self.speed = options.pop("speed", 1.0)
            return self.build(batch_dim, device)
    """,
    "kept for later": """
        def make_world(self, batch_dim, device, **kwargs):
            for name, value in kwargs.items():
                if hasattr(self, name):
                    setattr(self, name, value)
            return self.build(batch_dim, device)
        speed = 1.0
    """,
    "attributes of any name": """
        def make_world(self, batch_dim, device, **kwargs):
            for name, value in {"speed": 1.0, **kwargs}.items():
                setattr(self, name, value)
            return self.build(batch_dim, device)
        def post_step(self): self.moved = self.speed
    """,
    "settings beside defaults": """
        def make_world(self, batch_dim, device, **kwargs):
            self.settings = {**DEFAULTS, **kwargs}
            return self.build(batch_dim, device)
    """,
    "the dictionary itself, read when it is drawn": """
        def make_world(self, batch_dim, device, **kwargs):
            self.settings = kwargs
            return self.build(batch_dim, device)
        def extra_render(self, env_index=0): return [self.settings.get("speed", 1.0)]
    """,
    "names in a loop": """
        def make_world(self, batch_dim, device, **kwargs):
            for name, default in DEFAULTS.items():
                setattr(self, name, kwargs.pop(name, default))
            return self.build(batch_dim, device)
    """,
    "built by a function that was handed in": """
        def make_world(self, batch_dim, device, **kwargs):
            self.settings = type("Settings", (), {"__init__": lambda self, speed=1.0, **rest: None})(**kwargs)
            return self.build(batch_dim, device)
    """,
}
"""Bodies of ``make_world`` whose only option is `speed`, which only building tells."""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that writes a module of scenarios and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: list[str] = []

    def write(body: str, base: str = "Field") -> str:
        name = f"own_scenarios_{len(written)}"
        written.append(name)
        (tmp_path / f"{name}.py").write_text(f"{HEAD}\nclass Own({base}):\n{body}", encoding="utf-8")
        return f"{name}.Own"

    yield write
    for name in written:
        sys.modules.pop(name, None)


def build(scenario: str, **options: Any) -> VmasEnvironment:
    with rng.isolated(0):
        return VmasEnvironment(Runtime(torch.device("cpu"), seed=0), scenario=scenario, num_envs=2, **options)


def problems(scenario: str, **options: Any) -> list[tuple[str, str]]:
    return list(scenarios.check({"scenario": scenario, "scenario_options": options}))


@pytest.mark.parametrize("body", READABLE.values(), ids=READABLE)
def test_options_that_the_source_tells_are_checked_without_importing_it(body: str, module: Any) -> None:
    path = module(body)
    assert problems(path, speed=2.0) == []
    [(option, message)] = problems(path, sped=2.0)
    assert option == "scenario_options.sped"
    assert "no option `sped`. Did you mean `speed`? It has: speed" in message
    assert path.partition(".")[0] not in sys.modules, "it was imported"
    assert build(path, scenario_options={"speed": 2.0}).spec.n_agents == 2
    with pytest.raises(OptionError, match="no option `sped`"):
        build(path, scenario_options={"sped": 2.0})


@pytest.mark.parametrize("body", OPAQUE.values(), ids=OPAQUE)
def test_other_options_are_found_unread_when_it_is_built(body: str, module: Any) -> None:
    path = module(body)
    assert problems(path, sped=2.0) == [], "its source does not tell"
    assert build(path, scenario_options={"speed": 2.0}).spec.n_agents == 2
    with pytest.raises(OptionError, match=r"no option `sped`: it does not read it\. Did you mean `speed`\?"):
        build(path, scenario_options={"sped": 2.0})


SUM = " + ".join(["[1]"] * 300)
ENDLESS = {
    "options handed on twice by each of many": "\n".join(
        f"    def m{i}(self, **kwargs):\n        self.m{i + 1}(**kwargs)\n        self.m{i + 1}(**kwargs)" for i in range(60)
    )
    + "\n    def m60(self, **kwargs): ...\n    def make_world(self, batch_dim, device, **kwargs):\n        self.m0(**kwargs)\n",
    "many options that nothing looks at": "    def make_world(self, batch_dim, device, **kwargs):\n"
    + "".join(f"        x{i} = kwargs.pop('o{i}')\n" for i in range(5000)),
    "a long sum as a name": f"    def make_world(self, batch_dim, device, **kwargs):\n        kwargs.pop({SUM})\n",
}


@pytest.mark.parametrize("body", ENDLESS.values(), ids=ENDLESS)
def test_a_strangers_scenario_is_read_in_bounded_work(body: str, module: Any) -> None:
    name = module(body)
    assert problems(name, anything=1) == []
    assert name.partition(".")[0] not in sys.modules


def test_a_scenario_that_cannot_be_read_is_refused(module: Any) -> None:
    deep = "\n".join(f"class C{i}(C{i + 1}): ..." for i in range(3000)) + "\nclass C3000(Field): ...\n"
    large, many = "#" * 2_100_000, "\n".join(f"class A{i}: ..." for i in range(2000))
    cases = {
        ("    ...\n" + deep, "C0"): "recursion",
        ("    ...\nclass A(Own): ...", "A"): "inherits from itself in a circle",
        ("    ...\n" + large, "Field"): "is larger than 2000000 bytes",
    }
    for (body, base), words in cases.items():
        [(option, message)] = problems(module(body, base))
        assert option == "scenario"
        assert words in message
    [(_, message)] = problems(module("    ...\n" + many).replace(".Own", ".Owner"))
    assert len(message) < 1000


def test_looking_for_unread_options_draws_no_random_numbers(module: Any) -> None:
    path = module(OPAQUE["a copy"] + "    def reset_world_at(self, env_index=None): self.drawn = torch.rand(1)\n")
    first, second = (build(path, scenario_options=options) for options in ({"speed": 1.0}, None))
    assert torch.equal(first.simulation.scenario.drawn, second.simulation.scenario.drawn)


def test_options_of_the_scenario_above_are_known(module: Any) -> None:
    body = """
        def make_world(self, batch_dim, device, **kwargs):
            self.speed = kwargs.pop("speed", 1.0)
            return super().make_world(batch_dim, device, package_mass=4, **kwargs)
    """
    path = module(body, base="balance.Scenario")
    assert problems(path, speed=1.0, n_agents=3) == []
    assert "Did you mean `n_agents`?" in problems(path, n_agent=3)[0][1]
    assert "no option `package_mass`" in problems(path, package_mass=3)[0][1], "it is set by the class itself"
    assert build(path, scenario_options={"n_agents": 4}).spec.n_agents == 4


# --- what is no scenario -------------------------------------------------------------------------------------------------


def test_what_is_no_scenario_is_said_without_importing_it(module: Any, tmp_path: Path) -> None:
    path = module(READABLE["pop"])
    name = path.partition(".")[0]
    (tmp_path / "broken_scenarios.py").write_text("class Own(:\n", encoding="utf-8")
    (tmp_path / "other_things.py").write_text(
        "from collections import OrderedDict\nclass Thing: ...\nclass Table(OrderedDict): ...\nnumber = 3\n", encoding="utf-8"
    )
    expected = {
        f"{name}.Owner": f"`{name}` has no class `Owner`. Did you mean `Own`? It has: Field, Own",
        "missing_scenarios.Own": "there is no module `missing_scenarios`",
        f"{name}.deeper.Own": f"there is no module `{name}.deeper`",
        "broken_scenarios.Own": "broken_scenarios.py:1: is not valid Python",
        "other_things.Thing": "it must be a class that extends `vmas.simulator.scenario.BaseScenario`",
        "other_things.Table": "it must be a class that extends `vmas.simulator.scenario.BaseScenario`",
        "other_things.number": "it must be a class that extends `vmas.simulator.scenario.BaseScenario`",
    }
    for scenario, words in expected.items():
        [(option, message)] = problems(scenario)
        assert option == "scenario"
        assert f"`{scenario}` is no scenario: " in message
        assert words in message
    assert not {name, "broken_scenarios", "other_things"} & set(sys.modules)


def test_what_only_importing_tells_is_left_to_building(module: Any, tmp_path: Path) -> None:
    path = module(READABLE["pop"])
    name = path.partition(".")[0]
    (tmp_path / "made_scenarios.py").write_text(
        f"from {name} import *\nfrom {name} import Own as Alias\nMade = type('Made', (Own,), {{}})\n", encoding="utf-8"
    )
    for made in ("Own", "Made", "Alias"):
        assert problems(f"made_scenarios.{made}") == []
        assert build(f"made_scenarios.{made}", scenario_options={"speed": 1.0}).spec.n_agents == 2
    with pytest.raises(OptionError, match="cannot be imported"):
        build("made_scenarios.Missing")
    sys.modules.pop("made_scenarios")


# --- agents --------------------------------------------------------------------------------------------------------------


def test_another_number_of_agents_than_asked_for_is_refused(module: Any) -> None:
    path = module(
        """
        def make_world(self, batch_dim, device, **kwargs):
            for name in ("n_agents", "num_agents", "n_fast_agents"):
                setattr(self, name, kwargs.pop(name, 2))
            return self.build(batch_dim, device, n=2)
        """
    )
    for option in ("n_agents", "num_agents"):
        assert build(path, scenario_options={option: 2}).spec.n_agents == 2
        with pytest.raises(OptionError, match=rf"was given `{option}: 5` and has built 2 of them; leave `{option}` out"):
            build(path, scenario_options={option: 5})
    assert build(path, scenario_options={"n_fast_agents": 7}).spec.n_agents == 2, "nothing tells which they are"


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        ("simple_tag", {"num_good_agents": 2, "num_adversaries": 4}),
        ("simple_adversary", {"n_agents": 5, "n_adversaries": 2}),
        ("football", {"n_blue_agents": 2, "n_red_agents": 1}),
        ("football", {"n_blue_agents": 2, "n_red_agents": 3, "ai_red_agents": False}),
        ("flocking", {"n_agents": 2}),
        ("discovery", {"n_agents": 2, "n_lidar_rays_agents": 5, "agents_per_target": 1}),
    ],
)
def test_numbers_of_agents_of_vmas_own_scenarios_are_understood(scenario: str, options: dict[str, Any]) -> None:
    build(scenario, scenario_options=options)


def test_football_of_other_numbers_is_refused(module: Any) -> None:
    body = """
        def make_world(self, batch_dim, device, **kwargs):
            kwargs.update(n_red_agents=2)
            return super().make_world(batch_dim, device, **kwargs)
    """
    path = module(body, base="football.Scenario")
    build(path, scenario_options={"n_red_agents": 2})
    with pytest.raises(OptionError, match="was given `n_red_agents: 3` and has built 2"):
        build(path, scenario_options={"n_red_agents": 3})


OPPOSED = {
    "adversary": ("Field", "return self.build(batch_dim, device, adversary=True)", None),
    "some adversaries": (
        "Field",
        """world = self.build(batch_dim, device, n=1)
            world.add_agent(Agent(name="hunter", adversary=True))
            return world""",
        ("good_agents", "adversaries"),
    ),
    "scripted adversaries": (
        "Field",
        """world = self.build(batch_dim, device, n=2)
            world.add_agent(Agent(name="hunter", adversary=True, action_script=lambda agent, world: agent.action.u.zero_()))
            return world""",
        None,
    ),
    "own groups": (
        "Field",
        """return self.build(batch_dim, device, n=3)
        def agent_group(self, agent): return "even" if int(agent.name[-1]) % 2 == 0 else "odd" """,
        ("even", "odd", "even"),
    ),
    "football": (
        "football.Scenario",
        "return super().make_world(batch_dim, device, n_blue_agents=2, n_red_agents=2, ai_red_agents=False)",
        ("blue", "blue", "red", "red"),
    ),
    "football against scripts": (
        "football.Scenario",
        "return super().make_world(batch_dim, device, n_blue_agents=2, n_red_agents=2)",
        None,
    ),
}
"""Scenarios: the class above, the body of ``make_world``, the groups of the agents that policies control."""


@pytest.mark.parametrize(("base", "body", "groups"), OPPOSED.values(), ids=OPPOSED)
def test_groups_of_agents_and_no_pooling_over_them(base: str, body: str, groups: tuple[str, ...] | None, module: Any) -> None:
    path = module(f"        def make_world(self, batch_dim, device, **kwargs):\n            {body}\n", base=base)
    said = scenarios.traits({"scenario": path})
    env = build(path)
    assert env.spec.groups == groups
    assert ("opposing" in env.traits) == (groups is not None)
    assert said is None or ("opposing" in said) >= (groups is not None)
    for reward in ("mean", "sum"):
        if groups is None:
            assert build(path, reward=reward).spec.team_reward
        else:
            with pytest.raises(OptionError, match="opposed to each other") as caught:
                build(path, reward=reward)
            assert caught.value.option == "reward"


def test_a_group_is_a_name(module: Any) -> None:
    path = module(READABLE["pop"] + "    def agent_group(self, agent): return 3\n")
    with pytest.raises(OptionError, match="must return the name of a group, got 3"):
        build(path)
