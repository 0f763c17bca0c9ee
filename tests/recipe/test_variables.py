"""Environment variables in a recipe: kept as written, text only, and no other function of OmegaConf."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from marlkit.errors import RecipeError
from marlkit.recipe import Recipe, load_recipe
from marlkit.recipe.trust import foreign

SECRET = "hunter2-and-more"


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", SECRET)
    monkeypatch.delenv("UNSET", raising=False)


def logging(options: str, tmp_path: Path) -> Recipe:
    file = tmp_path / "team.yaml"
    file.write_text(f"extends: mappo\ntrainer:\n  logger: wandb\n  logger_options: {options}\n")
    return load_recipe(file)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("'${oc.env:SECRET}'", SECRET),
        ("'a-${oc.env:SECRET}-b'", f"a-{SECRET}-b"),
        ("'${oc.env:SECRET,other}'", SECRET),
        ("'${oc.env:UNSET,other}'", "other"),
        ("'${ oc.env : SECRET }'", SECRET),
        ("[1, {deep: ['${oc.env:SECRET}']}]", [1, {"deep": [SECRET]}]),
        ("'${trainer.logger_options.other}'", SECRET),
        ("'${.other}+'", f"{SECRET}+"),
        ("'${trainer.logger_options.both}'", {"x": SECRET}),
    ],
)
def test_kept_as_written_and_read_for_the_constructor(written: str, read: object, tmp_path: Path) -> None:
    recipe = logging(f"{{project: {written}, other: '${{oc.env:SECRET}}', both: {{x: '${{oc.env:SECRET}}'}}}}", tmp_path)
    assert recipe.arguments("trainer")["logger_options"]["project"] == read
    assert SECRET not in recipe.to_yaml()
    assert SECRET not in str(OmegaConf.to_container(recipe.config))
    assert SECRET not in str(recipe.options("trainer"))
    assert SECRET not in str([*map(str, foreign(recipe))])
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert again.to_yaml() == recipe.to_yaml()
    assert again.arguments("trainer") == recipe.arguments("trainer")


def test_other_values_are_replaced_all_the_same(tmp_path: Path) -> None:
    recipe = logging("{project: '${oc.env:SECRET}', steps: '${data.steps}'}", tmp_path)
    assert OmegaConf.to_container(recipe.config)["trainer"]["logger_options"]["steps"] == 100  # type: ignore[index,call-overload]


def test_an_unset_variable_is_a_problem_only_of_who_reads_it(tmp_path: Path) -> None:
    recipe = logging("{project: '${oc.env:UNSET}'}", tmp_path)
    assert recipe.arguments("critic") == recipe.options("critic")
    with pytest.raises(RecipeError, match=r"team.yaml:4: trainer.logger_options.project: .*'UNSET' not found"):
        recipe.arguments("trainer")


@pytest.mark.parametrize(
    "call",
    ["${oc.decode:1}", "${oc.decode:${oc.env:SECRET}}", "${oc.create:[1]}", "${oc.select:seed}", "${oc.dict.keys:env}",
     "${oc.deprecated:seed}", "${mine:1}", "${oc.${name}:SECRET}", "a${oc.env:SECRET}${mine:}"],
)  # fmt: skip
def test_other_functions_are_refused(call: str, tmp_path: Path) -> None:
    OmegaConf.register_resolver("mine", lambda *_: pytest.fail("it ran"), replace=True)
    with pytest.raises(RecipeError, match=r"team.yaml:4: trainer.logger_options.project: cannot use the function"):
        logging(f"{{project: '{call}'}}", tmp_path)


@pytest.mark.parametrize("call", ["${oc.env:${name}}", "${oc.env:UNSET,${oc.env:SECRET}}", "${oc.env:}", "${oc.env:a b}"])
def test_variables_are_named_outright(call: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not name an environment variable"):
        logging(f"{{project: '{call}'}}", tmp_path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("name", "name: cannot come from an environment variable"),
        ("seed", "seed: cannot come from an environment variable"),
        ("optimizer.lr", "optimizer.lr: cannot come from an environment variable"),
        ("trainer.iterations", "trainer.iterations: cannot come from an environment variable"),
        ("trainer.accelerator", "trainer.accelerator: cannot come from an environment variable"),
        ("actor.hidden", "actor.hidden: cannot come from an environment variable"),
        ("env.scenario", "env.scenario: "),
        ("critic", "critic.type: "),
        ("critic.type", "critic.type: "),
    ],
)
def test_what_cannot_come_from_a_variable(path: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe("mappo", [f"{path}=${{oc.env:SECRET}}"])
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_reference_does_not_carry_one_where_it_cannot_be(tmp_path: Path) -> None:
    given = ["trainer.logger_options={x: '${oc.env:SECRET}'}", "optimizer.lr=${trainer.logger_options.x}"]
    with pytest.raises(RecipeError, match=r"optimizer\.lr: must be a number") as caught:
        load_recipe("mappo", given)
    assert SECRET not in str(caught.value)
    with pytest.raises(RecipeError, match="name: must be a word"):
        load_recipe("mappo", [given[0], "name=${trainer.logger_options.x}"])


def test_a_literal_is_no_variable(tmp_path: Path) -> None:
    recipe = logging(r"{project: '\${oc.env:SECRET}', own: ['\\\${oc.env:SECRET}'], other: '${oc.env:SECRET}'}", tmp_path)
    assert recipe.variables == {"trainer.logger_options.other": ("SECRET",)}
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    for found in (recipe, load_recipe(tmp_path / "again.yaml")):
        meant = {"project": "${oc.env:SECRET}", "own": ["\\${oc.env:SECRET}"]}
        assert found.arguments("trainer")["logger_options"] == meant | {"other": SECRET}
        assert found.options("trainer")["logger_options"] == meant | {"other": "${oc.env:SECRET}"}
