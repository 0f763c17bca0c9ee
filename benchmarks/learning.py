"""Learning evidence: every shipped recipe on two VMAS tasks, five seeds, as small CSV files and one plot per task.

    python -m benchmarks.learning            # all; hours on two cores
    python -m benchmarks.learning --tasks corners --recipes coma hatrpo … --seeds 3 --iterations 0
    python -m benchmarks.learning --plot     # only draw the committed files again

Each recipe runs as shipped, with only the task and the seed set. Existing results are not trained again: delete a file to
recreate it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.random_play import random_return
from marlkit.recipe import shipped
from marlkit.run.curve import draw_comparison
from marlkit.run.metrics_file import EVALUATION_RETURN, ITERATION, read_metrics
from marlkit.run.statistics import bootstrap_interval, interquartile_mean
from marlkit.run.versions import versions

RESULTS = Path(__file__).parent / "results" / "learning"
TASKS: dict[str, list[str]] = {
    "balance": ["env.scenario=balance", "env.scenario_options={n_agents: 3}"],
    "navigation": ["env.scenario=navigation", "env.scenario_options={}"],
    "main_job": [],
    "corners": [],
}
"""`main_job` is the training of `make train`, `corners` are recipes on the tasks that they are shipped with. `balance` ends early
when the package falls or arrives; `navigation` almost always by its time limit."""
COLUMNS = (ITERATION, "frames", EVALUATION_RETURN)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save the evaluations, draw, summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=sorted(shipped()))
    parser.add_argument("--tasks", nargs="+", default=["balance", "navigation"], choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=25, help="0: as many as each recipe sets")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="trainings side by side, one thread each")
    parser.add_argument("--plot", action="store_true", help="draw and summarise the existing results, without training")
    options = parser.parse_args(arguments)
    if not options.plot:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        work = [(t, r, s, options.iterations) for s in seeds for t in options.tasks for r in options.recipes]
        with ThreadPoolExecutor(options.jobs) as pool:
            trained = {job[0] for job, new in zip(work, pool.map(_train, work), strict=True) if new}
        _note_versions(trained, sys.argv[1:] if arguments is None else list(arguments), options.iterations)
    summary = {task: _summarise(task) for task in TASKS if list(RESULTS.glob(f"{task}/*.csv"))}
    (RESULTS / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


def _note_versions(tasks: Collection[str], arguments: Sequence[str], iterations: int) -> None:
    """Save the versions and the command of the figures of each task."""
    made = versions() | {"iterations": iterations, "command": " ".join(["python -m benchmarks.learning", *arguments])}
    for task in tasks:
        (RESULTS / task / "versions.json").write_text(json.dumps(made, indent=2) + "\n")


def _train(job: tuple[str, str, int, int]) -> bool:
    """Train a job whose result does not exist; whether it was trained."""
    task, recipe, seed, iterations = job
    kept = RESULTS / task / f"{recipe}-seed{seed}.csv"
    if kept.exists():
        return False
    overrides = [*TASKS[task], f"seed={seed}", "trainer.threads=1", "trainer.video=false"]
    overrides += [f"trainer.iterations={iterations}"] if iterations else []
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "marlkit", "train", recipe, *overrides, "--root", root]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        metrics = read_metrics(next(Path(root).glob("*/*/metrics.csv")))
    kept.parent.mkdir(parents=True, exist_ok=True)
    rows = zip(*(metrics[column] for column in COLUMNS), strict=True)
    evaluated = [row for row in rows if row[2] == row[2]]
    lines = [",".join(COLUMNS), *(f"{int(i)},{int(frames)},{value:.4f}" for i, frames, value in evaluated)]
    kept.write_text("\n".join(lines) + "\n")
    print(f"{task} {recipe} seed {seed}: {evaluated[-1][2]:.2f}", flush=True)
    return True


def _summarise(task: str) -> dict[str, dict[str, object]]:
    """Interquartile mean over the seeds of the last evaluation and its 95 % bootstrap interval; the first one for comparison."""
    files = {recipe: sorted((RESULTS / task).glob(f"{recipe}-seed*.csv")) for recipe in sorted(shipped())}
    files = {recipe: found for recipe, found in files.items() if found}
    draw_comparison(files, RESULTS / f"{task}.png", title=f"{task}, {len(next(iter(files.values())))} seeds")
    summary: dict[str, dict[str, object]] = {}
    for recipe, found in files.items():
        curves = [read_metrics(file)[EVALUATION_RETURN] for file in found]
        last = [[curve[-1]] for curve in curves]
        low, high = bootstrap_interval(last)
        summary[recipe] = {
            "seeds": len(found),
            "first": round(float(interquartile_mean([[curve[0]] for curve in curves])[0]), 2),
            "last": round(float(interquartile_mean(last)[0]), 2),
            "interval": [round(float(low[0]), 2), round(float(high[0]), 2)],
            "random": round(random_return(recipe, TASKS[task]), 2),
        }
    return summary


if __name__ == "__main__":
    main()
