"""Learning evidence: every shipped recipe on each task, with one budget and five seeds, and what the README says of it.

    python -m benchmarks.learning                       # all that the present code has not trained yet; hours on two cores
    python -m benchmarks.learning --recipes coma --seeds 2
    python -m benchmarks.learning --draw                # only plots, summary and README again

Each recipe runs as shipped; only the task, the seed and the number of iterations are set, so that all of them see equally many
joint steps. Every result holds the commit that it was trained with, and is trained again once that code has changed; nothing is
trained with changes that are not committed. Interrupted, the command goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_play import random_return
from benchmarks.training import CODE, ROOT, draw, train, uncommitted
from marlkit import load_recipe
from marlkit.comparison.statistics import estimate, interquartile_mean
from marlkit.recipe import shipped
from marlkit.recipe.wiring import is_discrete
from marlkit.run.metrics_file import EVALUATION_RETURN, read_metrics

RESULTS = Path(__file__).parent / "results" / "learning"
README = ROOT / "README.md"
BEGIN, END = "<!-- results:begin -->\n", "<!-- results:end -->"
FRAMES_EACH = 240_000
"""Joint steps of every training."""

EVALUATIONS = 25
"""Points of a curve."""


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Attributes:
        overrides: what makes a recipe one on this task.
        discrete: whether its actions are.
        words: what it is, for the README.
    """

    overrides: tuple[str, ...]
    discrete: bool
    words: str


TASKS = {
    "balance": Task(
        ("env.scenario=balance", "env.scenario_options={n_agents: 3}", "env.max_steps=100"),
        False,
        "three agents carry a package on a line to a goal; an episode ends early when it falls",
    ),
    "navigation": Task(
        ("env.scenario=navigation", "env.scenario_options={n_agents: 3}", "env.max_steps=100"),
        False,
        "three agents each reach a goal of their own without touching the others",
    ),
    "navigation_discrete": Task(
        ("env.scenario=navigation", "env.scenario_options={n_agents: 3}", "env.max_steps=100", "env.continuous_actions=false"),
        True,
        "the same with nine discrete moves",
    ),
}
DISCRETE = ("coma", "ippo", "mappo", "happo")
"""The recipes of the discrete task: COMA, which has no other, and what it is compared with."""

NOT_MEASURED = ("matd3", "perla_maddpg")
"""Recipes with continuous actions of which there are no results yet."""


def recipes_of(task: str) -> list[str]:
    """The recipes that are trained on a task; where actions are continuous, those that are shipped with continuous ones."""
    if TASKS[task].discrete:
        return list(DISCRETE)
    return [name for name in sorted(set(shipped()) - set(NOT_MEASURED)) if not is_discrete(load_recipe(name))]


def overrides_of(task: str, recipe: str) -> list[str]:
    """What a recipe's training on a task sets, but for the seed."""
    config = load_recipe(recipe, TASKS[task].overrides).config
    iterations = FRAMES_EACH // (config.env.num_envs * config.data.steps)
    return [
        *TASKS[task].overrides,
        f"trainer.iterations={iterations}",
        f"trainer.evaluation_interval={iterations // EVALUATIONS}",
    ]


# --- training --------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, draw, summarise, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=sorted(shipped()), help="train only these")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), help="train only these")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings side by side, one thread each")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    if not options.draw:
        work = [
            (task, recipe, seed)
            for seed in range(options.seeds)
            for task in options.tasks
            for recipe in recipes_of(task)
            if recipe in options.recipes and not _is_present(task, recipe, seed)
        ]
        _refuse_uncommitted(work)
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(_train, work))
    summary = summarise()
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + section(summary) + END + rest.partition(END)[2], encoding="utf-8")


def _notes(task: str, recipe: str, seed: int) -> Path:
    return RESULTS / task / f"{recipe}-seed{seed}.json"


def _is_present(task: str, recipe: str, seed: int) -> bool:
    """Whether there is a result of the present code."""
    notes = _notes(task, recipe, seed)
    if not notes.exists():
        return False
    made = json.loads(notes.read_text())
    command = ["git", "-C", str(ROOT), "diff", "--quiet", made["commit"], "--", *CODE]
    same = subprocess.run(command, capture_output=True, check=False).returncode == 0
    return same and made["overrides"] == overrides_of(task, recipe)


def _refuse_uncommitted(work: Sequence[Any]) -> None:
    if work and uncommitted(*CODE, "benchmarks/learning.py"):
        sys.exit("There are changes that are not committed: their results could not be made again. Commit them first.")


def _train(job: tuple[str, str, int]) -> None:
    task, recipe, seed = job
    found = train(recipe, overrides_of(task, recipe), seed, _notes(task, recipe, seed))
    print(f"{task} {recipe} seed {seed}: {found:.2f}", flush=True)


# --- what it shows -----------------------------------------------------------------------------------------------------------


def summarise() -> dict[str, Any]:
    """Draw each task's panel; figures by task: of random play, and of each recipe."""
    summary: dict[str, Any] = {}
    for task in TASKS:
        noted = {recipe: sorted((RESULTS / task).glob(f"{recipe}-seed*.json")) for recipe in recipes_of(task)}
        files = {recipe: [note.with_suffix(".csv") for note in found] for recipe, found in noted.items() if found}
        if files:
            random = round(random_return(next(iter(files)), TASKS[task].overrides), 2)
            draw(files, RESULTS / f"{task}.png", title=task, random=random)
            commits = sorted(
                {json.loads(f.with_suffix(".json").read_text())["commit"] for found in files.values() for f in found}
            )
            summary[task] = {"random": random, "commits": commits, "recipes": {name: figures(f) for name, f in files.items()}}
    return summary


def figures(curves: Sequence[Path]) -> dict[str, Any]:
    """Interquartile mean over the seeds of the last evaluation, and its 95 % bootstrap interval."""
    last = np.array([read_metrics(file)[EVALUATION_RETURN][-1] for file in curves])
    mean, low, high = (round(float(part), 2) for part in estimate([last], interquartile_mean))
    return {"seeds": len(curves), "mean": mean, "interval": [low, high]}


def section(summary: Mapping[str, Any]) -> str:
    """The README's text about a summary."""
    seeds = sorted({found["seeds"] for task in summary.values() for found in task["recipes"].values()})
    commits = sorted({commit[:10] for task in summary.values() for commit in task["commits"]})
    tasks = [name for name in TASKS if name in summary]
    lines = [
        f"Return of the last of {EVALUATIONS} evaluations, most likely actions: interquartile mean over "
        f"{' or '.join(map(str, seeds))} seeds and its 95 % bootstrap",
        f"interval. Every training has {FRAMES_EACH:,} joint steps and every recipe runs as shipped, but for the task.",
        "",
        f"| recipe | {' | '.join(f'`{task}`' for task in tasks)} |",
        f"|---|{'---|' * len(tasks)}",
        f"| random play | {' | '.join(str(summary[task]['random']) for task in tasks)} |",
    ]
    for recipe in sorted(shipped()):
        cells = [_cell(summary[task]["recipes"].get(recipe)) for task in tasks]
        if any(cells):
            lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    lines.append("")
    for task in tasks:
        described = f"learning curves of the recipes on {task}"
        lines += [f'<img src="benchmarks/results/learning/{task}.png" width="420" alt="{described}">']
    lines += ["", *(f"- `{task}`: {TASKS[task].words}." for task in tasks), "", *WHAT_IT_DOES_NOT_SHOW, ""]
    lines += [
        f"Made by `make learning` with commit {', '.join(commits)}; curves, versions and hardware stand in",
        "[benchmarks/results/learning](benchmarks/results/learning).",
    ]
    return "\n".join(lines) + "\n"


WHAT_IT_DOES_NOT_SHOW = (
    "What this does not show. Two scenarios and one budget rank no algorithms. The budget is half of what most recipes are",
    "shipped with (`mat` and `mat_dec` have only begun to rise on `balance`), and six times that of the off-policy ones",
    "(`maddpg`, `f2a2_ddpg`). The settings of a recipe were chosen on the task that it is shipped with (`balance` or",
    "`navigation`), not for the others. Intervals over five seeds are wide. And it is no comparison with other libraries:",
    "from the same initialisation the nearest one learns as fast (`balance`, two runs each: 51.8 and 49.5 with orthogonal",
    "weights, 43.4 and 44.9 with torch's default), so that what marlkit gains there is its initialisation",
    "(`actor.initialisation`, `critic.initialisation`).",
    "",
    f"Not measured yet: {', '.join(f'`{name}`' for name in NOT_MEASURED)}, and what else the table leaves out.",
    "The figures of `f2a2_ddpg` are older than the mending of its joint gradients (c' of the resampled action, the noise of the",
    "opponents' actions, the step of the duals): they say nothing of what it does now.",
)


def _cell(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['mean']} [{found['interval'][0]}, {found['interval'][1]}]"


if __name__ == "__main__":
    main()
