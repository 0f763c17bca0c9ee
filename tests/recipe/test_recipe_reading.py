"""Reading one recipe: defaults, refusals, and the place that a message names."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from recipe_texts import DATA, TEAM, problem, problems, read

from marlkit.contract import KINDS
from marlkit.errors import RecipeError
from marlkit.recipe import load_recipe, shipped
from marlkit.recipe.catalogue import find


def test_completed_recipe_has_every_section_and_every_option(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert [key for key in recipe.config if key not in ("name", "seed")] == list(KINDS)
    for section, entry in recipe.entries.items():
        given = OmegaConf.select(recipe.config, section)
        assert set(given) == {"type", *entry.options}
    assert recipe.config["update"].clip_epsilon == 0.3
    assert recipe.config.estimator.gamma == 0.9
    assert recipe.config.actor.share == find("actor", "stochastic").options["share"].default
    assert (recipe.config.opponents.type, recipe.config.trainer.type) == ("true_policy", "lightning")


def test_numbers_are_read_as_omegaconf_reads_them(tmp_path: Path) -> None:
    assert read(tmp_path).config.optimizer.lr == 3e-4


def test_name_and_seed(tmp_path: Path) -> None:
    assert (read(tmp_path).name, read(tmp_path).seed) == ("team", 0)
    recipe = read(tmp_path, f"name: my-team_2\nseed: 7\n{TEAM}")
    assert (recipe.name, recipe.seed) == ("my-team_2", 7)


def test_lines(tmp_path: Path) -> None:
    recipe = read(tmp_path, overrides=["actor.agent_id=false"])
    assert recipe.line("env") == 1
    assert recipe.line("env.num_envs") == 1
    assert recipe.line("update") == 6
    assert recipe.line("update.clip_epsilon") == 8
    assert recipe.line("update.epochs") == 6, "a default stands where its component does"
    assert recipe.line("actor.agent_id") is None
    assert str(recipe.place("actor.agent_id")) == "override `actor.agent_id=false`"


def test_interpolation(tmp_path: Path) -> None:
    recipe = read(tmp_path, TEAM.replace("steps: 10", "steps: '${env.num_envs}'"))
    assert recipe.config.data.steps == 8
    assert recipe.options("data") == {"steps": 8}
    assert "steps: 8" in recipe.to_yaml()


def test_written_recipe_reads_back_equal(tmp_path: Path) -> None:
    text = TEAM.replace("num_envs: 8", "extras: {word: '3e-4', other: 'yes', number: 1e-7, none: null, list: [1, [2.5, x]]}")
    recipe = read(tmp_path, text, ["seed=5", "critic=marginalised"])
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    reread = load_recipe(again, folders=[DATA])
    assert reread.config == recipe.config
    assert reread.config.env.extras.word == "3e-4"
    assert reread.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_flat_and_described(name: str) -> None:
    recipe = load_recipe(name)
    text = recipe.source.read_text(encoding="utf-8")
    assert recipe.name == name
    assert text.startswith("# ")
    assert "extends" not in OmegaConf.create(text)
    assert not recipe.notes


@pytest.mark.parametrize(
    ("old", "new", "line", "where", "parts"),
    [
        ("critic: centralised", "critc: centralised", 3, "critc", ["no section", "Did you mean `critic`?"]),
        ("critic: centralised", "critic: centralized", 3, "critic.type", ["no critic called", "Did you mean `centralised`?"]),
        ("clip_epsilon", "clip_epsilom", 8, "update.clip_epsilom", ["no such option", "Did you mean `clip_epsilon`?"]),
        ("critic: centralised", "critic: ppo_clip", 3, "critic.type", ["belongs in section `update`"]),
        ("actor: stochastic", "actor: example_team.PlainCritic", 2, "actor.type", ["for section `critic`, not for `actor`"]),
        ("critic: centralised", "critic: os.system", 3, "critic.type", ["`os.system` is no component"]),
        ("critic: centralised", "critic: no.such.Critic", 3, "critic.type", ["no module `no.such`"]),
        ("critic: centralised", "critic: 3", 3, "critic", ["must name a component, got 3", "`critic: component`"]),
        ("critic: centralised", "critic:", 3, "critic", ["must name a component, got None"]),
        ("critic: centralised", "critic: [centralised]", 3, "critic", ["must name a component"]),
        ("critic: centralised", "critic: {share: all}", 3, "critic", ["has no `type`"]),
        ("critic: centralised", "critic: {type: 1}", 3, "critic.type", ["must be the name of a component, got 1"]),
        ("critic: centralised\n", "", 1, "critic", ["is missing"]),
        ("num_envs: 8", "num_envs: 0", 1, "env.num_envs", ["at least 1, got 0"]),
        ("num_envs: 8", "num_envs: 4.0", 1, "env.num_envs", ["whole number", "got 4.0"]),
        ("num_envs: 8", "num_envs: true", 1, "env.num_envs", ["whole number", "got True"]),
        ("num_envs: 8", "num_envs: many", 1, "env.num_envs", ["whole number", "got 'many'"]),
        ("num_envs: 8", "extras: 1", 1, "env.extras", ["a mapping or null, got 1"]),
        ("lr: 3e-4", "lr: -3e-4", 10, "optimizer.lr", ["above 0, got -0.0003"]),
        ("lr: 3e-4", "lr: .nan", 10, "optimizer.lr", ["finite, got nan"]),
        ("gamma: 0.9", "gamma: 1.5", 5, "estimator.gamma", ["at most 1, got 1.5"]),
        ("minibatch_size: 40", "minibatch_size: 81", 9, "update.minibatch_size", ["(8) * data.steps (10) = 80, got 81"]),
        ("steps: 10", "steps: '${env.num_env}'", 4, "data.steps", ["cannot be resolved"]),
        ("actor: stochastic", "actor: {type: stochastic, hidden: [64, 0]}", 2, "actor.hidden", ["entry 1: must be at least 1"]),
        ("actor: stochastic", "actor: {type: stochastic, share: some}", 2, "actor.share", ["all or none or", "got 'some'"]),
        ("actor: stochastic", "actor: stochastic\nseed: x", 3, "seed", ["whole number", "got 'x'"]),
        ("actor: stochastic", "actor: stochastic\nseed: -1", 3, "seed", ["at least 0, got -1"]),
        ("actor: stochastic", "actor: stochastic\nname: ../up", 3, "name", ["name a folder", "'../up'"]),
    ],
)  # fmt: skip
def test_wrong_names_and_values(tmp_path: Path, old: str, new: str, line: int, where: str, parts: list[str]) -> None:
    assert old in TEAM
    found = problem(tmp_path, TEAM.replace(old, new))
    assert (found.where, found.line) == (where, line)
    assert str(found).startswith(f"{tmp_path / 'team.yaml'}:{line}: ")
    assert all(part in str(found) for part in parts), str(found)


def test_section_that_is_missing_is_missing_from_the_file(tmp_path: Path) -> None:
    found = problem(tmp_path, TEAM.replace("critic: centralised\n", ""), ["seed=1"])
    assert found.source == str(tmp_path / "team.yaml")


def test_option_that_must_be_given(tmp_path: Path) -> None:
    head, _, _ = TEAM.partition("update:")
    found = problems(tmp_path, f"{head}update: {{type: sequential}}\n")
    assert any(p.where == "update.step" and "needs this option" in p.message and "kind update" in p.remedy for p in found)


def test_component_inside_a_component(tmp_path: Path) -> None:
    text = TEAM.replace("type: ppo_clip", "type: example_team.WholeTeamUpdate\n  inner: {type: ppo_clip, epochs: 3}")
    recipe = read(tmp_path, text.replace("  clip_epsilon: 0.3\n  minibatch_size: 40\n", ""))
    assert recipe.config["update"].inner.epochs == 3
    assert recipe.config["update"].inner.clip_epsilon == find("update", "ppo_clip").options["clip_epsilon"].default
    assert recipe.entries["update.inner"].name == "ppo_clip"
    assert recipe.line("update.inner.epochs") == 8
    wrong = text.replace("epochs: 3", "epochs: 0, epoch: 2").replace("clip_epsilon: 0.3", "inne: 1")
    found = {p.where: str(p) for p in problems(tmp_path, wrong)}
    assert set(found) == {"update.inner.epochs", "update.inner.epoch", "update.inne", "update.minibatch_size"}
    assert "Did you mean `epochs`?" in found["update.inner.epoch"]


def test_part_may_be_none_where_the_component_allows_it(tmp_path: Path) -> None:
    head, _, _ = TEAM.partition("update:")
    assert read(tmp_path, f"{head}update: {{type: example_team.WholeTeamUpdate, inner: null}}\n").config["update"].inner is None
    found = problems(tmp_path, f"{head}update: {{type: sequential, step: null}}\n")
    assert any(p.where == "update.step" and "got None" in p.message for p in found)


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "seed: -1\n" + TEAM.replace("num_envs: 8", "num_envs: 0").replace("critic: centralised", "critic: centralized")
    text = text.replace("gamma: 0.9", "gamma: 2, lambda: 1").replace("clip_epsilon: 0.3", "clip_epsilon: -1")
    text += "critic: local\noptimiser: adam\n"
    found = problems(tmp_path, text)
    assert [(p.line, p.where) for p in found] == [
        (1, "seed"),
        (2, "env.num_envs"),
        (4, "critic.type"),
        (6, "estimator.lambda"),
        (6, "estimator.gamma"),
        (9, "update.clip_epsilon"),
        (12, ""),
        (13, "optimiser"),
    ]
    assert "duplicate key `critic`, which line 4 gives already" in found[6].message
    assert "`optimizer`" in found[7].remedy


def test_values_and_fit_are_reported_together(tmp_path: Path) -> None:
    text = TEAM.replace("gamma: 0.9", "gamma: 2").replace("critic: centralised", "critic: example_team.ActionValueCritic")
    assert {p.where for p in problems(tmp_path, text)} == {"estimator", "estimator.gamma"}


def test_duplicate_option(tmp_path: Path) -> None:
    found = problem(tmp_path, TEAM.replace("clip_epsilon: 0.3", "clip_epsilon: 0.3\n  clip_epsilon: 0.1"))
    assert found.line == 9
    assert "duplicate key `clip_epsilon`" in found.message


@pytest.mark.parametrize(
    ("old", "new", "line", "found"),
    [
        ("clip_epsilon: 0.3", "clip_epsilon:0.3", 8, "clip_epsilon:0.3"),
        ("type: ppo_clip", "type:ppo_clip\n\n  # a comment", 7, "type:ppo_clip"),
        ("type: ppo_clip", "# a comment\n  type:ppo_clip  # another", 8, "type:ppo_clip"),
        ("minibatch_size: 40", "minibatch_size:40\n\n  # the last", 9, "minibatch_size:40"),
        ("actor: stochastic", "actor:stochastic", 2, "actor:stochastic"),
        ("actor: stochastic", "actor:\n  hidden:[8, 8]\n  type: stochastic", 3, "hidden:[8, 8]"),
        ("lr: 3e-4", "lr:3e-4", 10, "lr:3e-4"),
        ("type: gae, gamma: 0.9", "type:gae, gamma: 0.9", 5, "type:gae"),
        (TEAM, "env:vmas", 1, "env:vmas"),
    ],
)
def test_missing_blank_after_a_colon(tmp_path: Path, old: str, new: str, line: int, found: str) -> None:
    only = problem(tmp_path, TEAM.replace(old, new))
    assert only.line == line
    assert only.message == f"`{found}` has no blank after its colon."
    assert only.remedy == f"Write `{found.replace(':', ': ')}`."


def test_values_after_a_missing_blank_are_checked_too(tmp_path: Path) -> None:
    blank, value = problems(tmp_path, TEAM.replace("lr: 3e-4", "lr:-1.5"))
    assert "`lr:-1.5` has no blank" in blank.message
    assert (value.where, value.line) == ("optimizer.lr", 10)
    assert "must be above 0, got -1.5" in value.message
    blank, twice = problems(tmp_path, TEAM.replace("lr: 3e-4", "lr: 3e-4, lr:1e-4"))
    assert "`lr:1e-4` has no blank" in blank.message
    assert twice.message == "duplicate key `lr`, which line 10 gives already."


@pytest.mark.parametrize(
    "colons", ['"a:b"', "a:b", "a::b", "{'a:b': 1}", '{"a:b"}', "{http://a.b}", '["x:1", y:2]', "http://a.b/c"]
)
def test_colons_without_a_blank_that_are_meant(tmp_path: Path, colons: str) -> None:
    (found,) = problems(tmp_path, TEAM.replace("lr: 3e-4", f"lr: {colons}"))
    assert (found.where, found.line) == ("optimizer.lr", 10)


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b"", None, "is empty"),
        (b"# nothing here\n", None, "is empty"),
        (b"env: [1,\n", 2, "is not YAML"),
        (b"env: {a: 1\nactor: b\n", 2, "is not YAML"),
        (b"env:\n\tx: 1\n", 2, "is not YAML"),
        (b"\x00\x01", 1, "is not YAML"),
        (b"\xff\xfe\x00", None, "is not a text file"),
        (b"just words\n", 1, "holds no sections"),
        (b"- env\n- actor\n", 1, "holds no sections"),
        (b"a: 1\n---\nb: 2\n", 2, "is not YAML"),
        (b"env: &x {a: *x}\n", 1, "recursive aliases"),
        (b"actor: a\nenv: ${oops\n", 2, "cannot be read"),
        (b"{a: " * 3000, 1, "nested deeper than 50 levels"),
        (b"[a]: 1\n", 1, "has a key that is no word"),
        (b"env: !!python/object/apply:os.getcwd []\n", 1, "has the tag `!!python/object/apply:os.getcwd`"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, content: bytes, line: int | None, part: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    (found,) = caught.value.problems
    assert (found.source, found.line) == (str(file), line)
    assert part in found.message


def test_missing_files(tmp_path: Path) -> None:
    (tmp_path / "team.yaml").write_text(TEAM)
    cases = {
        "mapo": ["no recipe called `mapo`", "Did you mean `mappo`?"],
        str(tmp_path / "teem.yaml"): ["there is no file", "Did you mean `team.yaml`?"],
        str(tmp_path / "nowhere" / "x.yaml"): ["there is no file", "no folder"],
        str(tmp_path): ["is a folder", "team.yaml"],
    }
    for name, parts in cases.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = TEAM.replace("gamma: 0.9", "<<: &common {lmbda: 0.5}, gamma: 0.9")
    assert read(tmp_path, text).config.estimator.lmbda == 0.5
    found = problem(tmp_path, text.replace("lmbda: 0.5", "lmbda: 5"))
    assert (found.where, found.line) == ("estimator.lmbda", 5)


def test_check_of_the_environment(tmp_path: Path) -> None:
    pytest.importorskip("vmas")
    text = TEAM.replace("type: example_team.TinyEnvironment", "type: vmas, scenario: balance")
    assert read(tmp_path, text).config.env.scenario == "balance"
    found = problem(tmp_path, text.replace("balance", "balanse"))
    assert (found.where, found.line) == ("env.scenario", 1)
    assert "`balance`" in str(found)
    found = problem(tmp_path, text, ["env.scenario_options.n_agnts=3"])
    assert "n_agents" in str(found)
