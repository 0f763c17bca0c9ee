"""`extends` and overrides: changes, kept options, and options dropped with a note."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_texts import DATA, TEAM, problem, problems, read

from marlkit.errors import RecipeError
from marlkit.recipe import Recipe, load_recipe
from marlkit.recipe.catalogue import find


def _write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _load(file: Path, *overrides: str) -> Recipe:
    return load_recipe(file, overrides, folders=[DATA])


def test_change_of_type_keeps_the_options_of_the_new_one_and_notes_the_dropped_ones(tmp_path: Path) -> None:
    text = TEAM.replace("critic: centralised", "critic: {type: marginalised, samples: 7, hidden: [9], share: none}")
    recipe = read(tmp_path, text, ["critic=local"])
    assert recipe.config.critic.type == "local"
    assert recipe.config.critic.hidden == [9]
    assert recipe.config.critic.share == "none"
    assert recipe.config.critic.activation == find("critic", "local").options["activation"].default
    assert recipe.notes == ("critic: `marginalised` became `local`, which does not take `samples`: dropped.",)


def test_same_type_again_keeps_everything(tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=["update=ppo_clip", "update.epochs=2"])
    assert recipe.config["update"].clip_epsilon == 0.3
    assert recipe.config["update"].epochs == 2
    assert recipe.notes == ()


def test_option_of_the_same_name_that_does_not_fit_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "worded.py").write_text(
        "from typing import Literal\nfrom marlkit import keys\nfrom marlkit.component import Critic\n"
        "from marlkit.contract import Contract\n"
        "class WordedCritic(Critic):\n    contract = Contract(writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)\n"
        "    def __init__(self, spec, *, hidden: Literal['small', 'large'] = 'small', share: str = 'all'): ...\n"
    )
    text = TEAM.replace("critic: centralised", "critic: {type: local, hidden: [9], share: none}")
    recipe = read(tmp_path, text, ["critic=worded.WordedCritic"])
    assert recipe.options("critic") == {"hidden": "small", "share": "none"}
    assert "`hidden`" in recipe.notes[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["critic=marginalised", "critic.samples=100"],
        ["critic.samples=100", "critic=marginalised"],
        ["critic={type: marginalised, samples: 100}"],
        ["critic.type=marginalised", "critic={samples: 100}"],
    ],
)
def test_ways_to_swap_a_component(tmp_path: Path, overrides: list[str]) -> None:
    recipe = read(tmp_path, overrides=overrides)
    assert (recipe.config.critic.type, recipe.config.critic.samples) == ("marginalised", 100)
    assert recipe.overrides == tuple(overrides)
    assert recipe.notes == ()


def test_overrides_reach_into_components_and_mappings(tmp_path: Path) -> None:
    text = TEAM.replace("num_envs: 8", "extras: {a: 1, b: {c: 2, d: 3}}")
    recipe = read(
        tmp_path,
        text,
        [
            *(
                "actor.share=none",
                "env.pooled=true",
                "update=sequential",
                "update.step=ppo_clip",
                "update.step.clip_epsilon=1e-1",
            ),
            *("env.extras.b.c=5", "env.extras.e=[1, x]", "seed=3", "name=mine"),
        ],
    )
    assert recipe.config["update"].step.clip_epsilon == 0.1
    assert recipe.options("env")["extras"] == {"a": 1, "b": {"c": 5, "d": 3}, "e": [1, "x"]}
    assert (recipe.seed, recipe.name) == (3, "mine")


def test_override_replaces_a_whole_mapping_and_the_last_one_counts(tmp_path: Path) -> None:
    text = TEAM.replace("num_envs: 8", "extras: {a: 1}")
    assert read(tmp_path, text, ["env.extras={b: 2}"]).options("env")["extras"] == {"b": 2}
    assert read(tmp_path, text, ["seed=1", "seed=2"]).seed == 2


def test_part_of_a_component_is_swapped_by_the_same_rule(tmp_path: Path) -> None:
    head, _, _ = TEAM.partition("update:")
    text = f"{head}update: {{type: example_team.WholeTeamUpdate, inner: {{type: ppo_clip, epochs: 2}}}}\n"
    recipe = read(tmp_path, text, ["update.inner=example_team.WholeTeamUpdate"])
    assert recipe.config["update"].inner == {"type": "example_team.WholeTeamUpdate", "inner": None}
    assert recipe.notes == (
        "update.inner: `ppo_clip` became `example_team.WholeTeamUpdate`, which does not take `epochs`: dropped.",
    )


@pytest.mark.parametrize(
    ("override", "where", "parts"),
    [
        ("critic.hiden=[3]", "critic.hiden", ["no such option", "Did you mean `hidden`?"]),
        ("critic=centralized", "critic.type", ["Did you mean `centralised`?"]),
        ("critc=local", "critc", ["Did you mean `critic`?"]),
        ("critic.hidden=0", "critic.hidden", ["a list of whole numbers"]),
        ("env.num_envs.x=0", "env.num_envs", ["whole number"]),
        ("env.num_envs=0", "env.num_envs", ["at least 1, got 0"]),
        ("optimizer.lr=-1", "optimizer.lr", ["above 0, got -1"]),
        ("update.minibatch_size=1000", "update.minibatch_size", ["= 80, got 1000"]),
        ("critic", "", ["has no value", "section=component"]),
        ("critic=", "critic", ["has no value"]),
        ("=local", "", ["has no value"]),
        ("critic..x=1", "", ["has no value"]),
        ("critic=[1", "critic", ["not YAML"]),
        ("critic=${oops", "critic", ["interpolation that cannot be read"]),
        ("extends=mappo", "extends", ["only be given in a file"]),
        ("critic=null", "critic", ["must name a component, got None"]),
    ],
)
def test_wrong_overrides_are_named_themselves(tmp_path: Path, override: str, where: str, parts: list[str]) -> None:
    found = problem(tmp_path, overrides=[override])
    assert (found.source, found.line, found.where) == (f"override `{override}`", None, where)
    assert all(part in str(found) for part in parts), str(found)


def test_extends_changes_one_line(tmp_path: Path) -> None:
    _write(tmp_path, base=f"name: base\nseed: 4\n{TEAM}", variant="extends: base.yaml\ncritic: {type: local, hidden: [5]}\n")
    recipe = _load(tmp_path / "variant.yaml", "update.epochs=9")
    assert (recipe.name, recipe.seed) == ("variant", 4)
    assert (recipe.config.critic.type, recipe.config.critic.hidden) == ("local", [5])
    assert (recipe.config["update"].clip_epsilon, recipe.config["update"].epochs) == (0.3, 9)
    assert "extends" not in recipe.to_yaml()
    assert str(recipe.place("critic.hidden")) == f"{tmp_path / 'variant.yaml'}:2"
    assert str(recipe.place("update.clip_epsilon")) == f"{tmp_path / 'base.yaml'}:10"


def test_extends_by_name_and_in_a_chain(tmp_path: Path) -> None:
    _write(tmp_path, first="extends: mappo\nseed: 1\n", second="extends: first.yaml\ncritic: marginalised\n")
    assert load_recipe(tmp_path / "first.yaml").config.critic == load_recipe("mappo").config.critic
    recipe = load_recipe(tmp_path / "second.yaml")
    assert (recipe.seed, recipe.config.critic.type) == (1, "marginalised")
    assert recipe.config.critic.hidden == load_recipe("mappo").config.critic.hidden


def test_extends_finds_components_beside_either_file(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"mine_{name}.py").write_text(
            "from marlkit.critics.local import LocalCritic\nclass MyCritic(LocalCritic): ...\n"
        )
    text = TEAM.replace("centralised", "mine_one.MyCritic")
    _write(tmp_path / "one", base=text)
    _write(
        tmp_path / "two", variant="extends: ../one/base.yaml\n", other="extends: ../one/base.yaml\ncritic: mine_two.MyCritic\n"
    )
    assert _load(tmp_path / "two" / "variant.yaml").entries["critic"].dotted == "mine_one.MyCritic"
    assert _load(tmp_path / "two" / "other.yaml").entries["critic"].dotted == "mine_two.MyCritic"


def test_shipped_recipe_takes_a_component_from_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    recipe = load_recipe("mappo", "critic=example_team.PlainCritic")
    assert recipe.entries["critic"].file == DATA / "example_team.py"
    assert recipe.folders == (DATA,)


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("extends: nowhere.yaml\n", 1, ["there is no file", "nowhere.yaml"]),
        ("seed: 1\nextends: mapo\n", 2, ["no recipe called `mapo`", "Did you mean `mappo`?"]),
        ("extends: [mappo]\n", 1, ["one recipe, got ['mappo']"]),
        ("extends: variant.yaml\n", 1, ["circle: variant.yaml -> variant.yaml"]),
        ("extends: back.yaml\n", 1, ["circle: variant.yaml -> back.yaml -> variant.yaml"]),
        ("extends: empty.yaml\n", None, ["empty.yaml: is empty"]),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, line: int | None, parts: list[str]) -> None:
    _write(tmp_path, variant=text, back="extends: variant.yaml\n", empty="")
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path / "variant.yaml")
    (found,) = caught.value.problems
    assert found.line == line
    assert all(part in str(found) for part in parts), str(found)


def test_problems_of_base_and_variant_are_reported_in_their_files(tmp_path: Path) -> None:
    _write(
        tmp_path,
        base=TEAM.replace("gamma: 0.9", "gamma: 2"),
        variant="extends: base.yaml\nactor: {hiden: [3]}\nactor: stochastic\n",
    )
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path / "variant.yaml", "seed=-1")
    found = [(Path(p.source).name, p.line, p.where) for p in caught.value.problems]
    assert found == [
        ("base.yaml", 5, "estimator.gamma"),
        ("variant.yaml", 2, "actor.hiden"),
        ("variant.yaml", 3, ""),
        ("override `seed=-1`", None, "seed"),
    ]


def test_every_wrong_override_is_reported(tmp_path: Path) -> None:
    assert len(problems(tmp_path, overrides=["critic", "seed=x", "actor.shar=1"])) == 3
