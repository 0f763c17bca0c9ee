"""What contracts say of components that hold others, of what is carried from step to step, and of actors that own values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from recipe_texts import TEAM, problem, read

from marlkit import keys
from marlkit.actors.deterministic import DeterministicActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.actors.transformer import TransformerActor
from marlkit.cli import main
from marlkit.component import Actor, Update
from marlkit.contract import KINDS, TRAITS, Contract, When, carried
from marlkit.critics.attention import AttentionCritic
from marlkit.critics.local import LocalCritic
from marlkit.optim.ddpg import DdpgUpdate
from marlkit.optim.pdhg import PdhgUpdate
from marlkit.optim.policy_gradient import PolicyGradientUpdate
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.optim.sequential import SequentialUpdate
from marlkit.optim.trust_region import TrustRegionUpdate
from marlkit.recipe import vocabulary
from marlkit.recipe.catalogue import Entry, components
from marlkit.recipe.fit import environments, members
from marlkit.spec import ENVIRONMENT_TRAITS, Continuous, Discrete, TeamSpec
from marlkit.testing import RULES, check_component, rules, spec_examples

SPEC = TeamSpec(3, 5, Discrete(4), team_reward=True)


# --- traits of wrappers ---------------------------------------------------------------------------------------------------

WRAPPERS: dict[str, tuple[Update, set[str]]] = {
    "sequential ppo_clip": (SequentialUpdate(SPEC, step=PpoClipUpdate(SPEC)), {"on_policy", "by_gradient"}),
    "sequential trust_region": (SequentialUpdate(SPEC, step=TrustRegionUpdate(SPEC)), {"on_policy"}),
    "pdhg policy_gradient": (PdhgUpdate(SPEC, step=PolicyGradientUpdate(SPEC)), {"on_policy", "by_gradient"}),
    "pdhg ddpg": (PdhgUpdate(SPEC, step=DdpgUpdate(SPEC)), {"by_gradient"}),
    "pdhg sequential ppo_clip": (
        PdhgUpdate(SPEC, step=SequentialUpdate(SPEC, step=PpoClipUpdate(SPEC))),
        {"on_policy", "by_gradient"},
    ),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_has_the_traits_of_what_it_wraps_less_those_that_it_does_not_pass_on(name: str) -> None:
    update, expected = WRAPPERS[name]
    assert update.traits == expected


def nested(names: Sequence[str]) -> str:
    """A component and the ones that it wraps, as a recipe writes them."""
    first, *inner = names
    return f"{{type: {first}, step: {nested(inner)}}}" if inner else f"{{type: {first}}}"


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_recipe_gives_a_wrapper_the_same_traits_as_the_built_one(name: str, tmp_path: Path) -> None:
    recipe = read(tmp_path, TEAM, [f"update={nested(name.split())}"], fit=False)
    (found,) = [m for m in members(recipe, environments(recipe)[0]) if m.path == "update"]
    assert found.traits == WRAPPERS[name][1]


def test_traits_of_several_parts_are_joined_and_own_ones_are_never_dropped() -> None:
    contract = Contract(inherits=("one", "two"), without=("b",))
    parts: dict[str, Any] = {"one": ("a", "b"), "two": ("c",), "three": ("d",)}
    assert contract.all_traits(("b", "e"), parts) == {"a", "b", "c", "e"}
    assert contract.all_traits((), {}) == frozenset()


# --- carried keys ---------------------------------------------------------------------------------------------------------


def test_a_key_that_is_read_and_written_for_the_next_step_is_carried() -> None:
    reads = (keys.OBSERVATION, keys.HIDDEN, keys.IS_FIRST)
    assert carried(reads, (keys.ACTION, keys.following(keys.HIDDEN))) == (keys.HIDDEN,)
    assert carried(reads, (keys.HIDDEN, keys.following(keys.ENCODING))) == ()


@pytest.mark.parametrize("spec", spec_examples())
def test_only_a_recurrent_actor_carries_a_hidden_state(spec: TeamSpec) -> None:
    recurrent = StochasticActor(spec, hidden=[6], body="gru")
    assert recurrent.carried == (keys.HIDDEN,)
    assert {key: tuple(value.shape) for key, value in recurrent.initial_state(7).items()} == {keys.HIDDEN: (7, spec.n_agents, 6)}
    assert keys.HIDDEN in recurrent.in_keys
    assert keys.following(keys.HIDDEN) in recurrent.out_keys
    without: list[Actor] = [StochasticActor(spec), DeterministicActor(spec), TransformerActor(spec)]
    for actor in without:
        assert actor.carried == ()
        assert actor.initial_state(7) == {}


def test_an_actor_that_reads_what_it_writes_at_the_same_step_is_refused(tmp_path: Path) -> None:
    (tmp_path / "circular.py").write_text(
        "from marlkit import keys\nfrom marlkit.actors.stochastic import StochasticActor\nfrom marlkit.contract import Contract\n"
        "class CircularActor(StochasticActor):\n"
        "    contract = Contract(reads=(keys.OBSERVATION, keys.LOG_PROB), writes=(keys.ACTION, keys.LOG_PROB, keys.LOC,\n"
        "        keys.SCALE), traits=('stochastic',))\n"
    )
    found = problem(tmp_path, TEAM.replace("actor: stochastic", "actor: circular.CircularActor"))
    assert "reads agents.log_prob" in found.message


# --- in_keys and out_keys -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", spec_examples())
def test_in_keys_and_out_keys_are_those_of_the_contract(spec: TeamSpec) -> None:
    critic = LocalCritic(spec)
    assert critic.in_keys == [keys.OBSERVATION]
    assert critic.out_keys == critic.out_keys_source == [keys.STATE_VALUE]
    actor = StochasticActor(spec)
    parameters = [keys.LOGITS] if spec.discrete else [keys.LOC, keys.SCALE]
    assert actor.in_keys == [keys.OBSERVATION, keys.ACTION_MASK if spec.discrete else keys.ACTION_DIMS]
    assert actor.out_keys == [keys.ACTION, keys.LOG_PROB, *parameters]


# --- action values --------------------------------------------------------------------------------------------------------


def test_action_values_are_a_trait_that_the_testing_kit_checks() -> None:
    class Other(AttentionCritic):
        """Says other values of its actions than it writes."""

        def action_values(self, batch: Any) -> Any:
            values = super().action_values(batch)
            self.calls = getattr(self, "calls", 0) + 1
            return values + self.calls

    class Flat(AttentionCritic):
        """Forgets the axis of its networks."""

        def action_values(self, batch: Any) -> Any:
            return super().action_values(batch)[0]

    spec = TeamSpec(3, 5, Discrete(4))
    assert "action_values" in AttentionCritic(spec).traits
    check_component(AttentionCritic(spec))
    with pytest.raises(AssertionError, match=r"writes another `agents.action_value"):
        check_component(Other(spec))
    with pytest.raises(AssertionError, match=r"Flat (failed with RuntimeError|has predictions of the shape)"):
        check_component(Flat(spec))


def test_a_critic_without_the_trait_refuses_to_value_every_own_action() -> None:
    critic = LocalCritic(TeamSpec(2, 3, Continuous(1)))
    assert "action_values" not in critic.traits
    with pytest.raises(NotImplementedError, match="LocalCritic does not value every own action"):
        critic.action_values(None)


# --- the lists of traits and keys -----------------------------------------------------------------------------------------


def entries() -> list[Entry]:
    return [entry for section in KINDS for entry in components(section).values()]


def held(items: Sequence[Any]) -> set[str]:
    """The traits among the entries of a contract, under any condition."""
    return {trait for item in items for trait in (item.then if isinstance(item, When) else (item,))}


def test_the_list_of_traits_is_what_components_have() -> None:
    had = {(entry.kind.section, trait) for entry in entries() for trait in held(entry.contract.traits)}
    had |= {("env", trait) for trait in ENVIRONMENT_TRAITS}
    assert had == {(section, trait) for trait, described in TRAITS.items() for section in described.sections}


def test_only_listed_traits_are_needed_or_named_by_conditions() -> None:
    for entry in entries():
        contract = entry.contract
        for wanted in contract.needs.values():
            assert held(wanted) <= set(TRAITS), entry.dotted
        for items in (contract.reads, contract.writes, contract.traits, *contract.needs.values()):
            named = {part.name for item in items if isinstance(item, When) for part in item.parts if part.value is None}
            assert named <= {trait for trait, described in TRAITS.items() if "env" in described.sections}, entry.dotted


def test_every_trait_has_a_rule_in_the_testing_kit() -> None:
    checked = {rule.trait or rule.without for rule in RULES}
    of_environments = {trait for trait, described in TRAITS.items() if described.sections == ("env",)}
    assert set(TRAITS) - of_environments == checked - {None}


def test_every_rule_is_a_sentence() -> None:
    assert [rule.name for rule in RULES if not rule.text.endswith(".")] == []


def test_the_page_lists_traits_keys_and_rules() -> None:
    page = Path(__file__).parents[1] / "docs" / "traits_and_keys.md"
    parts = (vocabulary.traits(), vocabulary.keys(), rules.document())
    assert page.read_text(encoding="utf-8") == "".join(part + "\n" for part in parts), "run `make vocabulary`"
    for key in keys.TABLE:
        assert f"| `{keys.name(key)}` |" in parts[1]


@pytest.mark.parametrize(("what", "first"), [("traits", "# Traits"), ("keys", "# Keys"), ("rules", "# Rules")])
def test_the_command_lists_them(what: str, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", what]) == 0
    assert capsys.readouterr().out.startswith(first + "\n")


MISSPELT = (
    "from marlkit import keys\nfrom marlkit.{kind}s.{base} import {cls}\nfrom marlkit.contract import Contract\n"
    "class Misspelt{suffix}({cls}):\n    contract = Contract({contract})\n"
)


def test_a_misspelt_trait_that_is_needed_is_refused_with_the_right_one(tmp_path: Path) -> None:
    contract = "reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE, needs={'actor': ('stocastic',)}"
    text = MISSPELT.format(kind="critic", base="local", cls="LocalCritic", suffix="Critic", contract=contract)
    (tmp_path / "misspelt_need.py").write_text(text)
    found = problem(tmp_path, TEAM.replace("critic: centralised", "critic: misspelt_need.MisspeltCritic"))
    assert "needs the trait `stocastic`" in found.message
    assert "Did you mean `stochastic`?" in found.remedy


def test_a_misspelt_trait_that_is_had_is_named_where_it_is_missing(tmp_path: Path) -> None:
    contract = (
        "reads=(keys.OBSERVATION, keys.ACTION_DIMS), writes=(keys.ACTION, keys.LOG_PROB, keys.LOC, keys.SCALE), "
        "traits=('stocastic',)"
    )
    text = MISSPELT.format(kind="actor", base="stochastic", cls="StochasticActor", suffix="Actor", contract=contract)
    (tmp_path / "misspelt_trait.py").write_text(text)
    found = problem(tmp_path, TEAM.replace("actor: stochastic", "actor: misspelt_trait.MisspeltActor"))
    assert "needs the trait `stochastic`" in found.message
    assert "has the trait `stocastic`, which marlkit does not know. Did you mean `stochastic`?" in found.remedy
