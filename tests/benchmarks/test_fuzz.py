"""A short run of the fuzzer, and what it counts as a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fuzz
from marlkit.errors import MarlkitError
from marlkit.recipe import load_recipe


def test_changed_recipes_are_refused_in_words_or_built() -> None:
    result = fuzz.fuzz(range(150), seed=7, build_share=0.3, runs=False)
    assert result["failures"] == []
    assert result["counts"]["recipe: refused"] > 40
    assert result["counts"]["recipe: built"] > 0


def test_an_input_depends_on_its_number_alone() -> None:
    both, one = (fuzz.fuzz(numbers, seed=3, build_share=0.0, runs=False)["counts"] for numbers in (range(8, 10), [9]))
    assert all(both[outcome] >= count for outcome, count in one.items())


@pytest.mark.parametrize(
    ("error", "outcome"), [(KeyError("x"), "failed"), (fuzz._TooSlowError(), "too slow"), (MarlkitError("no"), "refused")]
)
def test_what_counts_as_a_failure(error: BaseException, outcome: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> str:
        raise error

    monkeypatch.setattr(fuzz, "try_recipe", broken)
    result = fuzz.fuzz(range(2), seed=0, runs=False)
    assert result["counts"] == {f"recipe: {outcome}": 2}
    assert len(result["failures"]) == (0 if outcome == "refused" else 2)


def test_an_accepted_recipe_that_cannot_be_built_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(*_: object, **__: object) -> None:
        raise MarlkitError("`LocalCritic` cannot be built: TypeError")

    monkeypatch.setattr(fuzz, "build_learner", crash)
    small = ["env={type: matrix_game, game: climbing}", "update.minibatch_size=null"]
    with pytest.raises(RuntimeError, match="passed the check"):
        fuzz.build(load_recipe("mappo", small))


def test_code_of_others_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(fuzz, "build_environment", lambda *_, **__: pytest.fail("it was built"))
    env = "{type: torchrl, factory: os.system, actions: continuous, options: {command: 'true'}}"
    assert fuzz.build(load_recipe("mappo", [f"env={env}"])) == "accepted, names code that is not run here"
    (tmp_path / "team.yaml").write_text(f"extends: mappo\nenv: {env}\n", encoding="utf-8")
    recipe = load_recipe(tmp_path / "team.yaml")
    assert fuzz.build(recipe) == "refused without trust"
    monkeypatch.setattr(fuzz, "require_trust", lambda _: None)
    with pytest.raises(RuntimeError, match="without trust"):
        fuzz.build(recipe)


def test_the_counts_that_are_kept_are_of_a_whole_run_without_failures() -> None:
    found = json.loads((Path(fuzz.__file__).parent / "results" / "fuzz.json").read_text())
    assert found["inputs"] == sum(found["counts"].values()) >= 10_000
    assert found["failures"] == []
