"""Runs that an earlier commit made can still be evaluated, used and resumed, and give the numbers that they gave then.

``old_runs/README.md`` says how they were made, and what ``noted.json`` of each of them holds.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import marlkit
from marlkit import load_recipe, run
from marlkit.errors import CheckpointError
from marlkit.run.contents import newer_options, run_recipe
from marlkit.run.folder import own_checkpoint

OLD_RUNS = Path(__file__).parent / "old_runs"
NAMES = ("coma", "f2a2_ddpg", "mappo")


def checkpoint_of(folder: Path) -> str:
    return "best" if (folder / "checkpoints" / "best.ckpt").exists() else "last"


def returns(folder: Path) -> dict[str, float]:
    """What an evaluation of a run tells."""
    return dict(run.evaluate(folder, episodes=3, checkpoint=checkpoint_of(folder)))


def actions(folder: Path) -> list[Any]:
    """What the policy of a run does where four teams see fixed things at three moments."""
    policy = marlkit.load_policy(folder, checkpoint_of(folder))
    shape = (3, 4, policy.spec.n_agents, policy.spec.observation)
    seen = torch.linspace(-2, 2, shape[0] * shape[1] * shape[2] * shape[3]).sin().reshape(shape)
    return [policy(moment).tolist() for moment in seen]


def resumed(folder: Path, scratch: Path) -> dict[str, list[float]]:
    """Sums of the magnitudes and of the squares of each component's tensors, after two more iterations of a copy of a run.

    The value normaliser's own are left out: it keeps other averages than it did then.
    """
    copy = scratch / folder.name
    shutil.copytree(folder, copy)
    text = (copy / "recipe.yaml").read_text(encoding="utf-8")
    (copy / "recipe.yaml").write_text(text.replace("  iterations: 3\n", "  iterations: 5\n"), encoding="utf-8")
    run.resume(copy, progress=False)
    saved = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["marlkit"]["iteration"] == 5
    parts: dict[str, list[torch.Tensor]] = {}
    for name, value in saved["state_dict"].items():
        if isinstance(value, torch.Tensor) and ".normaliser." not in name:
            parts.setdefault(name.partition(".")[0], []).append(value.double())
    return {part: [float(sum(power(v).sum() for v in own)) for power in (torch.abs, torch.square)] for part, own in parts.items()}


def noted(name: str) -> dict[str, Any]:
    found = json.loads((OLD_RUNS / name / "noted.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_an_old_run_evaluates(name: str) -> None:
    told, then = returns(OLD_RUNS / name), noted(name)["returns"]
    assert {metric: told[metric] for metric in then} == pytest.approx(then, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_of_an_old_run_acts_as_it_did(name: str) -> None:
    torch.testing.assert_close(torch.tensor(actions(OLD_RUNS / name)), torch.tensor(noted(name)["actions"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["coma", "mappo"])
def test_an_old_run_resumes_as_it_did(name: str, tmp_path: Path) -> None:
    expected, found = noted(name)["resumed"], resumed(OLD_RUNS / name, tmp_path)
    assert found.keys() == expected.keys()
    for part, sums in expected.items():
        assert found[part] == pytest.approx(sums, rel=1e-5, abs=1e-5), part


def test_an_old_run_that_stored_too_little_of_its_policies_is_not_resumed(tmp_path: Path) -> None:
    """F2A2's coupling now weighs resampled actions by how likely they were, which that replay cannot tell."""
    with pytest.raises(CheckpointError, match=r"no behaviour\.loc, behaviour\.scale, which a component reads.*train anew"):
        resumed(OLD_RUNS / "f2a2_ddpg", tmp_path)


def test_a_run_goes_on_as_it_began_where_the_default_of_a_newer_option_is_something_else(tmp_path: Path) -> None:
    """`marginalised` regressed sampled means before it had `current`, whose default is `executed`."""
    tiny = ["data.steps=4", "update.minibatch_size=null", "trainer.iterations=1", "critic.hidden=[4]", "critic.current=sampled"]
    game = "env={type: matrix_game, num_envs: 4}"
    folder = run.train(load_recipe("perla_mappo_vmas", [game, *tiny, "trainer.evaluation_episodes=2"]), tmp_path, progress=False)
    newer = ("  current: sampled\n", "  style: v\n")
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert all(text.count(line) == 1 for line in newer)
    (folder / "recipe.yaml").write_text(text.replace(newer[0], "").replace(newer[1], ""), encoding="utf-8")
    recipe = run_recipe(folder)
    assert (recipe.config.critic.current, recipe.config.critic.style) == ("sampled", "v")
    assert own_checkpoint(folder / "checkpoints" / "last.ckpt", recipe)["marlkit"]["iteration"] == 1
    saved = {"critic.type": "marginalised", "critic.samples": 10}
    assert newer_options(recipe, saved)["critic.current"] == "sampled"
