"""The shipped recipes: flat, complete, commented, related as described, and running after every swap that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from marlkit import run
from marlkit.errors import RecipeError
from marlkit.recipe import Recipe, load_recipe, shipped
from marlkit.recipe.catalogue import components
from marlkit.recipe.fit import check_fit
from marlkit.run.checkpoint_io import load_checkpoint
from marlkit.run.checkpoints import LAST
from marlkit.run.metrics_file import read_metrics
from marlkit.training.dry_run import dry_run

RECIPES = sorted(shipped())
BALANCE = ["env.scenario=balance", "env.scenario_options={n_agents: 3}"]
UNEQUAL = ["env.scenario=simple_speaker_listener", "env.scenario_options={}"]


def sections(recipe: Recipe) -> dict[str, Any]:
    config = OmegaConf.to_container(recipe.config)
    assert isinstance(config, dict)
    return {str(name): value for name, value in config.items() if name != "name"}


def differing(first: str, second: str) -> set[str]:
    """Sections in which two completed recipes differ."""
    a, b = sections(load_recipe(first)), sections(load_recipe(second))
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("mappo", "perla_mappo_vmas"),
        ("ippo", "perla_ippo_vmas"),
        ("mappo", "ippo"),
        ("coma", "perla_coma"),
        ("perla_mappo", "perla_ippo"),
        ("maddpg", "perla_maddpg"),
        ("iql", "vdn"),
        ("vdn", "qmix"),
    ],
)
def test_only_the_critic_differs(first: str, second: str) -> None:
    assert differing(first, second) == {"critic"}


@pytest.mark.parametrize("name", ["perla_ippo", "perla_mappo"])
def test_perla_is_shipped_as_published(name: str) -> None:
    """Table 4 of Jafferjee et al. 2022."""
    config = load_recipe(name).config
    assert (list(config.actor.hidden), list(config.critic.hidden), config.critic.samples) == ([256, 256], [256, 256], 100)
    assert (config.targets.type, config.targets.tau) == ("soft", 0.01)
    assert (config.estimator.type, config.estimator.n) == ("n_step", 10)
    assert (config.optimizer.lr, config["update"].entropy_coef) == (5e-4, 1e-3)


def test_happo_differs_from_mappo_where_the_paper_does() -> None:
    assert differing("mappo", "happo") == {"env", "actor", "update"}
    assert load_recipe("happo").options("update.step") == load_recipe("mappo").options("update")


def test_the_a2c_family_differs_where_its_sources_do() -> None:
    assert differing("happo", "haa2c") == {"update"}
    assert differing("ippo", "ia2c") == {"env", "targets", "data", "estimator", "update", "trainer"}
    assert differing("ia2c", "maa2c") == {"critic", "update"}
    own, central = (load_recipe(name).options("update") for name in ("ia2c", "maa2c"))
    assert {name for name in own if own[name] != central[name]} == {"entropy_coef"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_flat_and_fits_on_a_screen(name: str) -> None:
    lines = shipped()[name].read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert len(lines) <= 50
    assert not any(line.startswith("extends") for line in lines)
    assert not load_recipe(name).notes


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("discrete", [False, True], ids=["continuous", "discrete"])
@pytest.mark.parametrize(
    "task", [["env.scenario=balance", "env.scenario_options={n_agents: 3}"], UNEQUAL], ids=["balance", "unequal"]
)
def test_recipe_runs_on_every_kind_of_team_that_its_critic_takes(name: str, discrete: bool, task: list[str]) -> None:
    overrides = ["env.type=vmas", f"env.continuous_actions={str(not discrete).lower()}", *task]
    if not discrete and "discrete" in needed_of_the_environment(name):
        with pytest.raises(RecipeError, match="needs the trait `discrete`"):
            load_recipe(name, overrides)
    else:
        dry_run(load_recipe(name, overrides))


def needed_of_the_environment(name: str) -> set[str]:
    recipe = load_recipe(name)
    needs = [entry.contract.needed(recipe.options(path), ()).get("env", ()) for path, entry in recipe.entries.items()]
    return {trait for wanted in needs for trait in wanted}


@pytest.mark.parametrize("body", ["mlp", "gru"])
@pytest.mark.parametrize("critic", ["local", "centralised", "marginalised", "counterfactual", "attention", "transformer"])
@pytest.mark.parametrize("name", ["mappo", "happo"])
def test_the_critic_is_one_line(name: str, critic: str, body: str) -> None:
    swap = [f"critic={critic}", f"actor.body={body}"]
    if "discrete" in components("critic")[critic].contract.needs.get("env", ()):
        with pytest.raises(RecipeError, match=r"needs the trait `discrete`[\s\S]*env.continuous_actions=false"):
            load_recipe(name, swap)
        swap.append("env.continuous_actions=false")
    dry_run(load_recipe(name, swap))


@pytest.mark.parametrize("estimator", ["gae", "n_step", "one_step", "td_lambda"])
@pytest.mark.parametrize("update", ["ppo_clip", "policy_gradient", "trust_region"])
def test_estimator_and_update_are_one_line(estimator: str, update: str) -> None:
    dry_run(load_recipe("mappo", [f"estimator={estimator}", f"update={update}"]))


@pytest.mark.parametrize("share", ["none", "[[0, 1], [2]]"])
@pytest.mark.parametrize("critic", sorted(name for name, entry in components("critic").items() if "share" in entry.options))
def test_any_sharing_runs(critic: str, share: str) -> None:
    recipe = load_recipe("mappo", [f"critic={critic}", f"critic.share={share}", f"actor.share={share}"], fit=False)
    if not check_fit(recipe):
        dry_run(recipe)


@pytest.mark.parametrize(
    ("name", "swap"),
    [
        ("happo", ["update.step=trust_region"]),
        ("happo", ["update.order=fixed"]),
        ("hatrpo", ["update.order=[2, 0, 1]"]),
        ("mat", ["update.team_advantage=false", "update.ratio=dimension"]),
        ("ia2c", ["estimator.standardise_reward=shift"]),
        ("f2a2_ddpg", ["opponents=true_policy"]),
        ("f2a2_ddpg", ["update.step.coupling=0"]),
        ("f2a2_ddpg", ["update.topology=none"]),
        ("f2a2_coma", ["update.step.coupling=0"]),
        ("perla_mappo_vmas", ["critic.current=executed"]),
        ("perla_ippo", ["critic.samples=10"]),
        ("perla_ippo", ["critic.style=q"]),
        ("perla_coma", ["critic.current=sampled"]),
        ("coma", ["critic.type=marginalised", "critic.style=q"]),
        ("mappo", ["critic=marginalised", "opponents=theory_of_mind"]),
        ("perla_mappo_vmas", ["critic.share=none", "update={type: pdhg, topology: ring, step: {type: ppo_clip}}"]),
    ],
)
def test_the_ablations_are_one_line(name: str, swap: list[str]) -> None:
    dry_run(load_recipe(name, swap))


@pytest.mark.parametrize(
    "overrides",
    [
        ["env={type: matrix_game, game: climbing, num_envs: 8}"],
        ["env={type: product_game, num_envs: 8}"],
        ["env={type: foraging, map: 5x5-2p-1f, num_envs: 8, max_steps: 8}"],
        ["env={type: torchrl, factory: torchrl.envs.libs.vmas.VmasEnv, actions: continuous, num_envs: 8,"
         " options: {scenario: balance, continuous_actions: true}, max_steps: 20}"],
        ["optimizer=rmsprop", "optimizer.momentum=0.9"],
        ["optimizer.lr_end=0", "optimizer.critic_lr=0.001", "update.entropy_coef_end=0.001"],
        ["actor.std=predicted", "actor.layer_norm=true", "critic.layer_norm=true", "actor.activation=relu"],
        ["critic.value_norm=false", "update.value_clip=null", "update.huber_delta=null", "update.max_grad_norm=null"],
        ["update.normalise_advantage=false", "env.reward=sum", "env.max_steps=null"],
    ],
    ids=["matrix", "product", "foraging", "torchrl", "rmsprop", "schedules", "networks", "plain-losses", "rewards"],
)  # fmt: skip
def test_variant_trains_and_changes_the_parameters(overrides: list[str], tmp_path: Path) -> None:
    tiny = ["data.steps=10", "update.minibatch_size=20", "update.epochs=2", "trainer.iterations=2", "trainer.video=false"]
    envs = [] if overrides[0].startswith("env=") else ["env.num_envs=6"]
    folder = run.train(
        load_recipe("mappo", [*overrides, *tiny, *envs, "trainer.evaluation_episodes=2", "trainer.evaluation_steps=20"]),
        tmp_path,
        progress=False,
    )
    metrics = read_metrics(folder / "metrics.csv")
    assert len(metrics["iteration"]) == 2
    assert metrics["actor/grad_norm"][0] > 0
    assert metrics["critic/grad_norm"][0] > 0
    assert (folder / "curve.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("maddpg", ["data.warm_up=99999", "trainer.iterations=3"], r"data\.warm_up: must be at most env.* = 960, got 99999"),
        (
            "maddpg",
            ["data.capacity=300", "data.warm_up=0"],
            r"data\.capacity: 300 joint steps are 9 of each .*=320 or more",
        ),
        (
            "mat",
            ["targets={type: soft, actor: false}"],
            r"targets\.actor: must be true, because the critic reads",
        ),
        ("happo", ["update.order=[0, 1]"], r"update\.order: must name each of the 3 agents \(0 to 2\) once, got \[0, 1\]"),
        ("f2a2_ddpg", ["update.topology=[[0, 9]]"], r"update\.topology: edge \[0, 9\] names an agent that is not there"),
        ("mappo", ["actor.uniform_share=0.1"], r"actor\.uniform_share: mixes in discrete actions"),
    ],
)
def test_options_that_would_train_nothing_or_something_else_are_refused(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        dry_run(load_recipe(name, overrides))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_foraging(name: str) -> None:
    dry_run(load_recipe(name, ["env=foraging", "env.map=8x8-2p-2f-coop"]))


def test_an_opponent_model_whose_keys_are_not_read_fits() -> None:
    dry_run(load_recipe("mappo", ["opponents=theory_of_mind"]))


def test_lagging_targets_keep_value_targets_in_bounds(tmp_path: Path) -> None:
    """GAE with a copy of the critic: an error accumulated along the recursion would grow a hundredfold in a few iterations."""
    tiny = ["env.num_envs=8", "update.minibatch_size=400", "trainer.iterations=4", "trainer.video=false"]
    overrides = ["targets={type: hard, interval: 200}", *tiny, "trainer.evaluation_episodes=2"]
    folder = run.train(load_recipe("mappo", overrides), tmp_path, progress=False)
    checkpoint = load_checkpoint(folder / "checkpoints" / LAST)
    mean, variance = (checkpoint["state_dict"][f"critic.normaliser.{name}"] for name in ("mean", "variance"))
    assert mean.square() + variance < 20**2
