"""The register of claims and the page that is written from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from evidence.experiment import HERE, Experiment, load
from evidence.register import DOCUMENT, README, TABLE_OF_SYSTEMS, document, load_claims, results_of, with_evidence
from marlkit.errors import MarlkitError
from marlkit.recipe import load_recipe, shipped

CLAIMS = load_claims()
EXPERIMENTS = sorted(path.stem for path in HERE.glob("*.yaml"))
ENTRY = {"name": "a", "source": "PERLA", "where": "b", "claim": "c", "verdict": "not tested", "finding": "d"}


def test_the_page_says_what_the_register_and_the_results_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(CLAIMS.values()), "run `python -m evidence --document`"


def test_the_readme_shows_each_recipe_with_its_evidence() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_evidence(text, CLAIMS.values()), "run `python -m evidence --document`"
    table = text.partition(TABLE_OF_SYSTEMS)[2].partition("\n\n")[0]
    assert sorted(line.split("`")[1] for line in table.split("\n")) == sorted(shipped())


def test_a_verdict_rests_on_something() -> None:
    for claim in CLAIMS.values():
        if claim.verdict != "not tested":
            assert results_of(claim) or claim.tests, claim.name
        for test in claim.tests:
            assert Path(test.partition("::")[0]).exists(), test
        for name in claim.experiments:
            assert name in EXPERIMENTS, name
        assert set(claim.recipes) <= set(shipped())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"verdict": "true"}, "none of reproduced, partly"),
        ({"source": "me"}, "none of PERLA"),
        ({"verdict": "partly"}, "names no experiment"),
        ({"colour": "red"}, "unknown entries colour"),
        ({"finding": None}, "missing"),
    ],
)
def test_an_entry_that_is_wrong_is_named(change: dict[str, str | None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    entry = {key: value for key, value in {**ENTRY, **change}.items() if value is not None}
    path.write_text(yaml.safe_dump([entry]))
    with pytest.raises(MarlkitError, match=words):
        load_claims(path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_recipe_that_fits_and_has_the_budget_of_the_others(name: str) -> None:
    experiment = load(name)
    for task in experiment.tasks:
        budgets = {arm: _frames(experiment, task, arm) for arm in experiment.arms}
        assert max(budgets.values()) <= experiment.frames
        assert min(budgets.values()) > 0.95 * experiment.frames, budgets


def _frames(experiment: Experiment, task: str, arm: str) -> int:
    recipe = load_recipe(experiment.arms[arm][0], experiment.overrides(task, arm))
    config = recipe.config
    return int(config.trainer.iterations * config.env.num_envs * config.data.steps)
