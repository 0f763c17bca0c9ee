"""Testing one component alone: batches without an environment, and the rules that every component is held to.

A user's own component is held to the same rules as marlkit's, which `docs/traits_and_keys.md` lists::

    from marlkit.testing import check_component, spec_examples

    @pytest.mark.parametrize("spec", spec_examples())
    def test_contract(spec):
        check_component(MyCritic(spec, hidden=[8]))
"""

from __future__ import annotations

import importlib

from marlkit.component import Component, Environment
from marlkit.testing.batches import FREE_SIZES, fake_batch, key_shape, spec_examples
from marlkit.testing.environments import check_environment
from marlkit.testing.rules import RULES, Rule, rules_for

FILES = ("every_kind", "tensor_kinds", "actors", "opponents", "critics", "targets", "data", "estimators", "updates", "optimizers")
for _module in FILES:
    # Their functions register themselves, the fundamental rules first.
    importlib.import_module(f"marlkit.testing.{_module}")

__all__ = [
    "FREE_SIZES",
    "RULES",
    "Rule",
    "broken_rules",
    "check_component",
    "check_environment",
    "fake_batch",
    "key_shape",
    "spec_examples",
]


def check_component(component: Component) -> None:
    """Hold a component of any kind to the rules of its kind and to those of its traits.

    It is run on small batches of random tensors, beside the simplest of marlkit's components that have what it needs. Component
    and random generators stay as they are. Where the team lacks what the component needs of an environment, it is not run.

    Raises:
        AssertionError: it breaks a rule; names the class and the rule, and says what to do.
    """
    for rule in rules_for(component):
        rule.hold(component)
    if isinstance(component, Environment):
        check_environment(lambda runtime: type(component)(runtime, **component.options))


def broken_rules(component: Component) -> dict[str, str]:
    """The messages of all rules that a component breaks, by name; one fault may break several."""
    found = {}
    for rule in rules_for(component):
        try:
            rule.hold(component)
        except AssertionError as error:
            found[rule.name] = str(error)
    return found
