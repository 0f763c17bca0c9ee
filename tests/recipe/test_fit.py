"""Whether components fit together: known misfits are found, and the message names both sides and a remedy."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest
from recipe_texts import DATA, TEAM, problem, problems, read

from marlkit import keys
from marlkit.errors import Problem, RecipeError
from marlkit.recipe import load_recipe, shipped
from marlkit.recipe.catalogue import components
from marlkit.recipe.fit import advice, check_fit
from marlkit.recipe.wiring import WiringRow, dimensions, mermaid, shape, wiring

HAPPO = ["actor.share=none", "env.pooled=true", "update=sequential", "update.step=ppo_clip"]


def _rows(recipe_rows: list[WiringRow]) -> dict[str, WiringRow]:
    return {row.path: row for row in recipe_rows}


def _swap(line: str, new: str) -> str:
    assert line in TEAM
    return TEAM.replace(line, new)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_fit(name: str) -> None:
    assert check_fit(load_recipe(name, fit=False)) == []


@pytest.mark.parametrize("critic", ["local", "centralised", "marginalised", "example_team.PlainCritic"])
@pytest.mark.parametrize("update", [[], HAPPO])
@pytest.mark.parametrize("continuous", ["true", "false"])
def test_every_state_value_critic_fits_every_on_policy_update(
    tmp_path: Path, critic: str, update: list[str], continuous: str
) -> None:
    recipe = read(tmp_path, overrides=[*update, f"critic={critic}", f"env.continuous_actions={continuous}"])
    assert check_fit(recipe) == []


def test_critic_that_does_not_fit_the_estimator(tmp_path: Path) -> None:
    found = problems(tmp_path, _swap("critic: centralised", "critic: example_team.ActionValueCritic"))
    assert [(p.where, p.line) for p in found] == [("estimator", 5), ("estimator", 5)]
    for p, key in zip(found, ("agents.state_value", "next.agents.state_value"), strict=True):
        assert f"`gae` reads {key}" in p.message
        assert f"critic `example_team.ActionValueCritic` ({tmp_path / 'team.yaml'}:3) writes agents.action_value" in p.message
        assert "these write it: centralised, local, marginalised" in p.remedy


def test_estimator_that_does_not_fit_the_update(tmp_path: Path) -> None:
    found = problem(tmp_path, _swap("estimator: {type: gae, gamma: 0.9}", "estimator: example_team.ValueEstimator"))
    assert (found.where, found.line) == ("update", 6)
    assert "`ppo_clip` reads agents.advantage" in found.message
    assert "estimator `example_team.ValueEstimator`" in found.message
    assert "gae, n_step" in found.remedy


def test_keys_that_a_missing_part_may_write_are_not_reported_too(tmp_path: Path) -> None:
    critic = _swap("critic: centralised", "critic: joint")
    for estimator in ("estimator: counterfactual", "estimator: {type: counterfactual, target: nonsense}"):
        text = critic.replace("estimator: {type: gae, gamma: 0.9}", estimator)
        absent, unwritten = problems(tmp_path, text)
        assert absent.where.removesuffix(".type") == "estimator.target"
        assert unwritten.where == "estimator"
        assert "reads agents.state_value" in unwritten.message, "no estimator would write it"


def test_critic_that_is_never_regressed(tmp_path: Path) -> None:
    found = problem(tmp_path, _swap("critic: centralised", "critic: example_team.SilentCritic"))
    assert (found.where, found.line) == ("critic", 3)
    assert "predicts nothing" in found.message


def test_sequential_with_shared_parameters(tmp_path: Path) -> None:
    """They are allowed, after one warning that names the reason."""
    recipe = read(tmp_path, overrides=[text for text in HAPPO if not text.startswith("actor")])
    assert check_fit(recipe) == []
    (found,) = advice(recipe)
    assert (found.where, found.source) == ("update", "override `update=sequential`")
    assert f"`separate_parameters`, which actor `stochastic` ({tmp_path / 'team.yaml'}:2) lacks: the turn of" in found.message
    assert found.remedy == "Set actor.share=none."
    assert advice(read(tmp_path, overrides=HAPPO)) == []


def test_a_preferred_trait_that_no_option_gives_is_told_of_too(tmp_path: Path) -> None:
    (tmp_path / "wishing.py").write_text(
        "from marlkit import keys\nfrom marlkit.contract import Contract\nfrom marlkit.optim.ppo_clip import PpoClipUpdate\n"
        "class WishingUpdate(PpoClipUpdate):\n"
        "    contract = Contract(reads=(keys.ADVANTAGE,), traits=('on_policy',), prefers={'critic': {'wise': 'it errs'}})\n"
    )
    (found,) = advice(read(tmp_path, _swap("type: ppo_clip", "type: wishing.WishingUpdate")))
    assert "expects the trait `wise`, which critic `centralised`" in found.message
    assert found.message.endswith("lacks: it errs.")
    assert found.remedy == "Nothing that was tried gives it."


def test_condition_on_the_environment_is_traced_to_its_option(tmp_path: Path) -> None:
    overrides = [text for text in HAPPO if not text.startswith("env")]
    found = problem(tmp_path, overrides=overrides)
    assert "`team_reward`" in found.message
    assert found.remedy == "Set env.pooled=true."


def test_part_without_the_trait_that_its_holder_needs(tmp_path: Path) -> None:
    overrides = [*HAPPO[:-1], "update.step=example_team.WholeTeamUpdate"]
    found = problem(tmp_path, overrides=overrides)
    assert found.where == "update"
    assert "needs the trait `per_agent`, which update.step `example_team.WholeTeamUpdate`" in found.message
    assert "policy_gradient, ppo_clip, trust_region (`update.step=policy_gradient`)" in found.remedy


def test_discrete_only_critic_on_continuous_actions(tmp_path: Path) -> None:
    text = _swap("critic: centralised", "critic: example_team.DiscreteCritic")
    found: tuple[Problem, ...] = problems(tmp_path, text)
    assert {p.where for p in found} == {"critic"}
    assert any("reads agents.logits" in p.message and "actor `stochastic`" in p.message for p in found)
    assert any("needs the trait `discrete`, which env" in p.message for p in found)
    assert all("Set env.continuous_actions=false." in p.remedy for p in found)
    assert check_fit(read(tmp_path, text, ["env.continuous_actions=false"])) == []


def test_key_that_only_a_condition_of_a_present_component_writes(tmp_path: Path) -> None:
    (tmp_path / "optional.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Critic\nfrom marlkit.contract import Contract, When\n"
        "class OptionalCritic(Critic):\n"
        "    contract = Contract(writes=(When('valued=true', (keys.STATE_VALUE,)),), predicts=keys.STATE_VALUE)\n"
        "    def __init__(self, spec, *, valued: bool = False): ...\n"
    )
    text = _swap("critic: centralised", "critic: optional.OptionalCritic")
    assert all("Set critic.valued=true." in p.remedy for p in problems(tmp_path, text))
    assert read(tmp_path, text, ["critic.valued=true"]).config.critic.valued is True


def test_key_that_nothing_writes(tmp_path: Path) -> None:
    (tmp_path / "strange.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Critic\nfrom marlkit.contract import Contract\n"
        "class StrangeCritic(Critic):\n"
        "    contract = Contract(reads=('weather',), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)\n"
    )
    found = problem(tmp_path, _swap("critic: centralised", "critic: strange.StrangeCritic"))
    assert "reads weather, which nothing before it writes" in found.message
    assert "these do not read it: centralised, " in found.remedy


def test_keys_written_later_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "early.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Critic\nfrom marlkit.contract import Contract\n"
        "class EarlyCritic(Critic):\n"
        "    contract = Contract(reads=(keys.ADVANTAGE,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)\n"
    )
    text = _swap("critic: centralised", "critic: early.EarlyCritic")
    found = problem(tmp_path, text)
    assert "agents.advantage" in found.message
    # Nor do those that a part which is missing would write later.
    messages = [p.message for p in problems(tmp_path, text.replace("type: gae, gamma: 0.9", "type: counterfactual"))]
    assert any("`early.EarlyCritic` reads agents.advantage" in message for message in messages)


def test_own_keys_do_not_count_but_for_an_actor(tmp_path: Path) -> None:
    (tmp_path / "selfish.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Critic\nfrom marlkit.contract import Contract\n"
        "class SelfishCritic(Critic):\n"
        "    contract = Contract(reads=(keys.STATE_VALUE,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)\n"
    )
    assert problem(tmp_path, _swap("critic: centralised", "critic: selfish.SelfishCritic")).where == "critic"
    recipe = read(tmp_path, _swap("actor: stochastic", "actor: example_team.RecurrentActor"))
    assert _rows(wiring(recipe))["actor"].reads[keys.HIDDEN] == "actor"
    assert "| actor\n" in mermaid(recipe)
    assert "actor -->|" in mermaid(recipe)
    assert "agents.hidden" not in mermaid(recipe), "an arrow from the actor to itself carries no information"


def test_what_the_estimator_writes_does_not_exist_at_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "ahead.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Update\nfrom marlkit.contract import Contract\n"
        "class AheadUpdate(Update):\n    contract = Contract(reads=(keys.following(keys.ADVANTAGE),))\n"
    )
    head, _, _ = TEAM.partition("update:")
    assert "next.agents.advantage" in problem(tmp_path, f"{head}update: ahead.AheadUpdate\n").message


@pytest.mark.parametrize(
    ("key", "fits"), [("keys.LOG_PROB", True), ("keys.following(keys.LOG_PROB)", False), ("keys.following(keys.STATE)", False)]
)
def test_a_critic_runs_on_the_next_step_too_and_cannot_look_beyond_it(tmp_path: Path, key: str, fits: bool) -> None:
    name = f"nexts{sum(map(ord, key))}"
    (tmp_path / f"{name}.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Critic\nfrom marlkit.contract import Contract\n"
        "class NextCritic(Critic):\n"
        f"    contract = Contract(reads=({key},), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)\n"
    )
    text = _swap("critic: centralised", f"critic: {name}.NextCritic")
    if fits:
        assert check_fit(read(tmp_path, text)) == []
    else:
        assert "has no access to the next" in problem(tmp_path, text).message


def test_undeclared_traits_of_an_environment_are_assumed_favourable(tmp_path: Path) -> None:
    text = _swap("example_team.TinyEnvironment", "example_team.UntoldEnvironment")
    assert check_fit(read(tmp_path, text, [text for text in HAPPO if not text.startswith("env")])) == []
    assert check_fit(read(tmp_path, text, ["critic=example_team.DiscreteCritic"])) == []
    found = problems(tmp_path, text, ["critic=example_team.ActionValueCritic"])
    assert {p.where for p in found} == {"estimator"}


def test_wiring(tmp_path: Path) -> None:
    rows = _rows(wiring(read(tmp_path, overrides=["critic=marginalised", *HAPPO])))
    assert list(rows) == [
        "env",
        "data",
        "actor",
        "opponents",
        "critic",
        "targets",
        "estimator",
        "update",
        "update.step",
        "optimizer",
        "trainer",
    ]
    assert rows["critic"].reads[keys.OPPONENT_LOC] == "opponents"
    assert rows["opponents"].reads == {keys.ACTION: "actor", keys.LOC: "actor", keys.SCALE: "actor"}
    assert rows["estimator"].reads[keys.following(keys.STATE_VALUE)] == "critic"
    assert rows["update.step"].reads[keys.ADVANTAGE] == "estimator"
    assert rows["update"].component == "sequential"
    assert keys.LOGITS not in rows["actor"].writes


def test_opponent_model_whose_keys_are_not_read_does_not_run(tmp_path: Path) -> None:
    assert not _rows(wiring(read(tmp_path)))["opponents"].runs
    assert _rows(wiring(read(tmp_path, overrides=["critic=marginalised"])))["opponents"].runs


def test_wiring_of_a_misfit_shows_the_gap(tmp_path: Path) -> None:
    recipe = read(tmp_path, _swap("critic: centralised", "critic: example_team.ActionValueCritic"), fit=False)
    assert _rows(wiring(recipe))["estimator"].reads[keys.STATE_VALUE] is None
    assert 'missing -->|"agents.state_value<br/>next.agents.state_value"| estimator' in mermaid(recipe)


def test_mermaid(tmp_path: Path) -> None:
    lines = mermaid(read(tmp_path, overrides=HAPPO)).splitlines()
    assert lines[0] == "flowchart LR"
    assert '    update_step["<b>update.step</b><br/>ppo_clip"]' in lines
    assert '    env -->|"state"| critic' in lines
    assert not any("opponents" in line for line in lines)


def test_of_two_writers_the_later_one_counts(tmp_path: Path) -> None:
    (tmp_path / "second.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Estimator\nfrom marlkit.contract import Contract\n"
        "class SecondEstimator(Estimator):\n"
        "    contract = Contract(writes=(keys.ALIVE, keys.ADVANTAGE, keys.VALUE_TARGET))\n"
    )
    text = _swap("estimator: {type: gae, gamma: 0.9}", "estimator: second.SecondEstimator")
    assert _rows(wiring(read(tmp_path, text)))["update"].reads[keys.ALIVE] == "estimator"


def test_shapes(tmp_path: Path) -> None:
    assert shape(keys.ACTION, discrete=True) == "[N]"
    assert shape(keys.ACTION, discrete=False) == "[N, D]"
    assert shape(keys.following(keys.STATE_VALUE), discrete=True, sizes={"N": 3}) == "[3, 1]"
    assert shape("weather", discrete=True) == "[?]"
    assert dimensions(read(tmp_path)) == ["N", "O", "S", "D", "V"]


# --- what a message suggests passes -------------------------------------------------------------------------------------

_LISTED = re.compile(r"For ([\w.]+), these [a-z ]+: ((?:\w+, )*\w+) \(")
_TYPED = re.compile(r"`([a-z][\w.]*=[^`]*)`")
_SET = re.compile(r"Set ([^`]*?)\.(?= |$)")


def suggestions(remedy: str) -> list[list[str]]:
    """Every set of overrides that a remedy names."""
    found = [[f"{path}={name}"] for path, names in _LISTED.findall(remedy) for name in names.split(", ")]
    found += [shlex.split(typed) for typed in _TYPED.findall(remedy)]
    return found + [set_.split(" and ") for sets in _SET.findall(remedy) for set_ in sets.split(" or ")]


def assert_suggestions_pass(name: str | Path, overrides: Sequence[str]) -> int:
    """Apply every suggestion for a refused recipe; returns how many there were."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides, folders=[DATA])
    found = {tuple(changes) for p in caught.value.problems for changes in suggestions(p.remedy)}
    for changes in found:
        load_recipe(name, [*overrides, *changes], folders=[DATA])
    return len(found)


ODD = """\
from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.contract import Contract, When
from marlkit.critics.local import LocalCritic
from marlkit.component import Estimator, Update

class CentralActor(StochasticActor):
    contract = Contract(
        reads=(keys.STATE,), writes=(keys.ACTION, keys.LOG_PROB, keys.LOC, keys.SCALE),
        traits=("stochastic", "centralised_execution"),
    )

class EncodedCritic(LocalCritic):
    contract = Contract(reads=(keys.ENCODING,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

class ValueOnly(Estimator):
    contract = Contract(reads=(keys.REWARD, keys.following(keys.STATE_VALUE)), writes=(keys.VALUE_TARGET,))
    def __init__(self, spec, *, gamma: float = 0.9): ...

class Picky(Update):
    contract = Contract(
        reads=(keys.ADVANTAGE, keys.VALUE_TARGET), traits=("on_policy",),
        needs={
            "actor": ("separate_parameters", "independent_agents"), "critic": ("separate_parameters",), "env": ("team_reward",)
        },
    )
    def __init__(self, spec, *, scale: float = 1.0): ...
"""


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("happo", ["actor=odd.CentralActor"]),
        ("happo", ["actor=odd.CentralActor", "env.continuous_actions=false", "critic=attention"]),
        ("mappo", ["critic=odd.EncodedCritic"]),
        ("mappo", ["estimator=odd.ValueOnly"]),
        ("mappo", ["update=odd.Picky"]),
        ("maddpg", ["update=odd.Picky"]),
        ("coma", ["actor=odd.CentralActor"]),
        ("mat", ["actor=odd.CentralActor"]),
        ("f2a2_ddpg", ["actor=odd.CentralActor"]),
        ("mappo", ["update=pdhg", "update.share_actor=true"]),
        ("happo", ["update.step=ddpg"]),
        ("mappo", ["data=replay"]),
    ],
)
def test_what_is_suggested_passes(name: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.chdir(tmp_path)
    if "update=pdhg" in overrides:
        overrides = ["update={type: pdhg, step: ppo_clip, share_actor: true}"]
    assert assert_suggestions_pass(name, overrides)


def test_what_is_suggested_after_any_swap_passes() -> None:
    swaps = [
        (name, f"{section}={other}")
        for name in shipped()
        for section in ("actor", "critic", "estimator", "update", "data", "opponents")
        for other, entry in components(section).items()
        if not any(option.required for option in entry.options.values())
    ]
    drawn = random.Random(0).sample(swaps, 32)
    tried = [(name, swap) for name, swap in drawn if check_fit(load_recipe(name, [swap], fit=False))]
    assert len(tried) > 5
    assert all(assert_suggestions_pass(name, [swap]) for name, swap in tried)


def test_a_component_that_would_keep_a_wrong_value_is_not_suggested(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Update\nfrom marlkit.contract import Contract\n"
        "class LargeUpdate(Update):\n"
        "    contract = Contract(reads=('weather',), traits=('on_policy',))\n"
        "    def __init__(self, spec, *, minibatch_size: int = 40): ...\n"
    )
    text = _swap("type: ppo_clip\n  clip_epsilon: 0.3", "type: large.LargeUpdate")
    assert "policy_gradient, ppo_clip, trust_region" in problem(tmp_path, text).remedy
    remedy = problem(tmp_path, text.replace("minibatch_size: 40", "minibatch_size: 81")).remedy
    assert "update=" in remedy
    assert not {"update=ppo_clip", "ppo_clip, trust_region"} & set(remedy.replace("`", "'").split("'"))
    assert "these do not read it" not in remedy


def test_a_wrapper_is_no_part_of_itself() -> None:
    nested = "update={type: pdhg, step: {type: pdhg, step: ppo_clip}}"
    with pytest.raises(RecipeError, match="`pdhg` cannot be a part of itself"):
        load_recipe("mappo", [nested, "critic.share=none"])
    assert assert_suggestions_pass("mappo", [nested, "critic.share=none"])
    load_recipe("happo", ["critic.share=none", "update={type: pdhg, step: {type: sequential, step: ppo_clip}}"])


def test_one_sentence_where_nothing_fits(tmp_path: Path) -> None:
    (tmp_path / "never.py").write_text(
        "from marlkit import keys\nfrom marlkit.component import Environment\nfrom marlkit.contract import Contract\n"
        "class BareEnvironment(Environment):\n    contract = Contract(writes=('weather',), traits=('continuous',))\n"
    )
    found = problems(tmp_path, TEAM.replace("type: example_team.TinyEnvironment, num_envs: 8", "type: never.BareEnvironment"))
    assert all(p.remedy for p in found)
