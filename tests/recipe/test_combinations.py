"""Every combination of marlkit's components either trains and resumes exactly, or is refused before any tensor is made."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import ScriptedEnvironment, random_script

from marlkit import rng
from marlkit.recipe import combinations
from marlkit.recipe.catalogue import Entry, components, load_class
from marlkit.recipe.combinations import Combination
from marlkit.recipe.fit import check_fit, fits
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.training.learner import Learner

STEPS = 4
SPECS = {
    "discrete": TeamSpec(2, 3, Discrete(3), team_reward=True),
    "continuous": TeamSpec(2, 3, Continuous(2), team_reward=True),
}
TINY: dict[str, Any] = {
    "hidden": [4], "steps": STEPS, "batch_size": 6, "capacity": 40, "warm_up": 0, "epochs": 1, "samples": 2, "embedding": 4,
    "heads": 2, "characters": 2, "character_length": 3, "memory": 2, "recent": 8, "fit_rows": 8,
}  # fmt: skip
"""Options that keep a component small, where it has them."""


EVERY = combinations.decided()
REFUSED = [found for found in EVERY if not fits(found)]


def component(found: Combination, path: str, spec: TeamSpec) -> Any:
    """The component at ``path``, small, with its parts."""
    entry: Entry = found.entries[path]
    parts = {inside.rpartition(".")[2]: inside for inside in found.entries if inside.rpartition(".")[0] == path}
    options = {name: value for name, value in TINY.items() if name in entry.options}
    options.update(found.settings.get(path, {}))
    options.update({name: component(found, inside, spec) for name, inside in parts.items()})
    return load_class(entry)(spec, **options)


def learner_of(found: Combination, seed: int) -> Learner:
    """A learner outside Lightning, with the attributes of the trainer that it uses."""
    torch.manual_seed(seed)
    spec = SPECS[found.actions]
    env = ScriptedEnvironment(spec, random_script(spec, envs=3, steps=3 * STEPS))
    sections = {"env", "trainer"}
    parts = {path: component(found, path, spec) for path in found.entries if "." not in path and path not in sections}
    learner = Learner(env=env, iterations=4, **parts)
    optimizer = learner.configure_optimizers()

    def optimizers(use_pl_optimizer: bool = True) -> torch.optim.Optimizer:
        return optimizer

    trainer = SimpleNamespace(callback_metrics={}, loggers=[], ckpt_path="last.ckpt")
    harness = {"optimizers": optimizers, "manual_backward": torch.Tensor.backward, "_trainer": trainer}
    for name, function in harness.items():
        object.__setattr__(learner, name, function)
    return learner


def checkpoint(learner: Learner) -> dict[str, Any]:
    """What Lightning would save."""
    optimizer = learner.optimizers()
    saved: dict[str, Any] = {"state_dict": learner.state_dict(), "optimizer_states": [optimizer.state_dict()]}  # type: ignore[union-attr]
    learner.on_save_checkpoint(saved)
    return copy.deepcopy(saved)


def restored(found: Combination, saved: dict[str, Any]) -> Learner:
    learner = learner_of(found, seed=99)
    learner.on_load_checkpoint(copy.deepcopy(saved))
    learner.load_state_dict(saved["state_dict"])
    learner.optimizers().load_state_dict(saved["optimizer_states"][0])  # type: ignore[union-attr]
    learner.on_train_start()
    return learner


def leaves(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(state, dict):
        for name, value in state.items():
            yield from leaves(value, f"{path}/{name}")
    elif isinstance(state, (list, tuple)):
        for index, value in enumerate(state):
            yield from leaves(value, f"{path}/{index}")
    else:
        yield path, state


def different(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Paths at which two checkpoints differ."""
    a, b = dict(leaves(first)), dict(leaves(second))
    same = {
        path for path in a.keys() & b.keys()
        if (torch.equal(a[path], b[path]) if isinstance(a[path], torch.Tensor) else a[path] == b[path])
    }  # fmt: skip
    return sorted((a.keys() | b.keys()) - same)


def set_otherwise() -> list[Any]:
    """Options that decide what a critic regresses, in the first combination that fits for each kind of actions and estimator."""
    found: dict[tuple[str, str], Combination] = {}
    for each in combinations.accepted():
        if each.entries["critic"].name == "marginalised" and each.entries["opponents"].name == "theory_of_mind":
            found.setdefault((each.actions, each.entries["estimator"].name), each)
    sampled = [each.with_settings([("critic", "current", "sampled")]) for each in found.values()]
    return [pytest.param(each, id=f"{each.name}-sampled") for each in sampled]


def tried() -> list[Any]:
    """All that are said to be trained; two of three by `make exhaustive` only."""
    exhaustive = {number: [pytest.mark.exhaustive] for number in (1, 2)}
    found = enumerate(combinations.tried())
    return [pytest.param(each, id=each.name, marks=exhaustive.get(number % 3, [])) for number, each in found]


@pytest.mark.parametrize("found", [*tried(), *combinations.deeper(), *set_otherwise()], ids=lambda found: found.name)
def test_accepted_combinations_train_and_resume_exactly(found: Combination) -> None:
    with rng.isolated(0):
        learner = learner_of(found, seed=1)
        before = copy.deepcopy(learner.state_dict())
        learner.training_step()
        saved = checkpoint(learner)
        learner.training_step()
        after = checkpoint(learner)
        resumed = restored(found, saved)
        resumed.training_step()
        assert different(checkpoint(resumed), after) == []
    for section in ("actor", "critic"):
        names = [name for name, _ in getattr(learner, section).named_parameters(prefix=section)]
        moved = [name for name in names if not torch.equal(before[name], after["state_dict"][name])]
        assert moved or not names, f"no parameter of the {section} has moved"
    tensors = [value for _, value in leaves(after["state_dict"]) if isinstance(value, torch.Tensor)]
    assert all(torch.isfinite(value).all() for value in tensors)


@pytest.mark.parametrize("actions", sorted(SPECS))
def test_refused_combinations_have_messages_with_a_remedy(actions: str) -> None:
    refused = [found for found in REFUSED if found.actions == actions]
    for found in random.Random(0).sample(refused, 15):
        for problem in check_fit(found):
            named = {entry.name for entry in found.entries.values()} & set(problem.message.replace("`", " ").split())
            assert named, problem
            assert problem.remedy, problem


def test_a_component_is_left_out_only_for_an_option_that_must_be_given() -> None:
    for section in combinations.CHOSEN:
        tried = {found.entries[section].name for found in EVERY}
        for name, entry in components(section).items():
            unknown = [option for option in entry.options.values() if option.required and option.part is None]
            assert (name in tried) == (not unknown), name


def test_any_three_choices_that_fit_together_are_tried() -> None:
    def triples(found: Combination) -> set[Any]:
        names = [found.actions, *map(found.name_of, combinations.CHOSEN)]
        if combinations._unread(found):
            names[names.index(found.name_of("opponents"))] = "true_policy"  # a model that nothing reads does not run
        return set(itertools.combinations(enumerate(names), 3))

    wanted = set().union(*map(triples, combinations.accepted()))
    assert set().union(*map(triples, combinations.tried())) == wanted
    assert len(combinations.tried()) < len(combinations.accepted()) / 3


def test_the_page_lists_the_accepted_combinations() -> None:
    page = Path(__file__).parents[2] / "docs" / "combinations.md"
    assert page.read_text(encoding="utf-8") == combinations.document(), "run `make combinations`"
