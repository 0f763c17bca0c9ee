"""Runs of one task, and of one group."""

from __future__ import annotations

from pathlib import Path

from synthetic_runs import write_run

from marlkit.comparison.grouping import By, Task, tasks_of
from marlkit.comparison.loading import load_runs

RETURNS = {2: 1.0}
NAVIGATION = "env.scenario=navigation"


def tasks(root: Path, by: By = "override") -> tuple[list[Task], list[str]]:
    return tasks_of(load_runs([root], "evaluation/return", frames=None, trust=False)[0], by)


def test_the_label_holds_what_runs_of_a_recipe_differ_in(tmp_path: Path) -> None:
    for overrides in (
        ["critic=local"],
        ["critic=marginalised", "critic.samples=20"],
        ["critic=marginalised", "critic.samples=100"],
        [],
    ):
        write_run(tmp_path, "mappo", overrides, returns=RETURNS)
    for seed in (0, 1):
        write_run(tmp_path, "happo", seed=seed, returns=RETURNS)
    ((task,), _) = tasks(tmp_path)
    assert list(task.groups) == [
        "happo",
        "mappo critic=centralised",
        "mappo critic=local",
        "mappo critic=marginalised critic.samples=20",
        "mappo critic=marginalised critic.samples=100",
    ]
    assert [run.seed for run in task.groups["happo"]] == [0, 1]


def test_by_recipe_pools_and_says_what(tmp_path: Path) -> None:
    for lr in ("1e-4", "1e-3"):
        write_run(tmp_path, "mappo", [f"optimizer.lr={lr}"], returns=RETURNS)
    ((task,), notes) = tasks(tmp_path, "recipe")
    assert {label: len(runs) for label, runs in task.groups.items()} == {"mappo": 2}
    assert notes == ["mappo: runs that differ in optimizer.lr are pooled, as --by recipe asks; --by override keeps them apart."]


def test_what_does_not_decide_the_learning_makes_no_group(tmp_path: Path) -> None:
    same = ["trainer.threads=1", "trainer.video=false", "trainer.checkpoint_seconds=5"]
    write_run(tmp_path, "mappo", same, seed=1, returns=RETURNS)
    write_run(tmp_path, "mappo", seed=0, returns=RETURNS)
    assert list(tasks(tmp_path)[0][0].groups) == ["mappo"]
    write_run(tmp_path, "mappo", ["trainer.precision=bfloat16"], seed=0, returns=RETURNS)
    assert list(tasks(tmp_path)[0][0].groups) == ["mappo trainer.precision=bfloat16", "mappo trainer.precision=float32"]


def test_each_environment_is_a_task_and_a_setting_that_goes_with_it_makes_no_group(tmp_path: Path) -> None:
    for overrides in ([], [NAVIGATION, "optimizer.lr=1e-3"], [NAVIGATION, "optimizer.lr=1e-3", "env.continuous_actions=false"]):
        for seed in (0, 1):
            write_run(tmp_path, "mappo", overrides, seed=seed, returns=RETURNS)
    found, notes = tasks(tmp_path)
    assert [task.name for task in found] == [
        "balance",
        "navigation continuous_actions=false",
        "navigation continuous_actions=true",
    ]
    assert {task.environment for task in found} == {"vmas"}
    assert [list(task.groups) for task in found] == [["mappo"]] * 3
    assert notes == []


def test_the_number_of_environments_and_a_mean_reward_leave_the_task(tmp_path: Path) -> None:
    write_run(tmp_path, "mappo", ["env.num_envs=32"], returns=RETURNS)
    write_run(tmp_path, "mappo", returns=RETURNS)
    write_run(tmp_path, "happo", returns=RETURNS)  # its agents share the mean of their rewards
    ((task,), _) = tasks(tmp_path)
    assert list(task.groups) == ["happo", "mappo env.num_envs=32", "mappo env.num_envs=96"]
    write_run(tmp_path, "mappo", ["env.reward=sum"], returns=RETURNS)
    assert [task.name for task in tasks(tmp_path)[0]] == ["balance", "balance reward=sum"]


def test_a_group_without_runs_on_a_task_and_other_commits_are_told(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, "mappo", seed=seed, returns=RETURNS)
        write_run(tmp_path, "ippo", [NAVIGATION], seed=seed, returns=RETURNS, commit="decade0123456-dirty")
    assert tasks(tmp_path)[1] == [
        "mappo has no run on navigation, so that it is left out of the figures over all tasks.",
        "ippo has no run on balance, so that it is left out of the figures over all tasks.",
        "the runs were trained with 2 commits of marlkit (c0ffee, decade0123-dirty), whose results may differ.",
    ]
