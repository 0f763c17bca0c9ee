"""One training in a process of its own, of which a small curve and notes are kept."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from marlkit.comparison.figures import draw_curves, png, styles
from marlkit.comparison.statistics import Array, Estimate, align, curve
from marlkit.errors import MarlkitError
from marlkit.run.files import write_whole
from marlkit.run.metrics_file import EVALUATION_RETURN, FRAMES, ITERATION, read_metrics
from marlkit.run.versions import versions

ROOT = Path(__file__).parent.parent


CODE = ("marlkit", "recipes", "constraints.txt")
"""What decides a training, beside its overrides."""


def train(recipe: str, overrides: Sequence[str], seed: int, notes: Path, columns: Sequence[str] = ()) -> float:
    """Train on one thread and keep each evaluation: ``notes`` is a JSON of what was trained, beside a CSV of the same name.

    Args:
        recipe: name or path.
        overrides: as on the command line.
        seed: of the run.
        notes: the JSON file.
        columns: of ``metrics.csv``, beside iteration, frames and return.

    Returns:
        The return of the last evaluation.

    Raises:
        MarlkitError: the training fails; with its message.
    """
    made = versions(threads=1)
    if "commit" in made and not uncommitted(*CODE):  # what else has changed, such as the results before this one, does not matter
        made["commit"] = str(made["commit"]).removesuffix("-dirty")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "marlkit", "train", recipe, *overrides, f"seed={seed}"]
        command += ["trainer.threads=1", "trainer.video=false", "--no-progress", "--root", root]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if done.returncode != 0:
            raise MarlkitError(f"`marlkit {' '.join(command[3:])}` failed:\n{done.stderr}")
        metrics = read_metrics(next(Path(root).glob("*/*/metrics.csv")))
    kept = (ITERATION, FRAMES, EVALUATION_RETURN, *columns)
    rows = [row for row in zip(*(metrics[column] for column in kept), strict=True) if row[2] == row[2]]
    notes.parent.mkdir(parents=True, exist_ok=True)
    with notes.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(kept)
        writer.writerows((int(row[0]), int(row[1]), *(f"{value:.6g}" for value in row[2:])) for row in rows)
    told = {"recipe": recipe, "overrides": list(overrides), "seed": seed, "seconds": round(time.monotonic() - began), **made}
    notes.write_text(json.dumps(told, indent=2) + "\n")
    return float(rows[-1][2])


def uncommitted(*paths: str) -> bool:
    """Whether there are changes of these paths that are not committed, so that results could not be made again."""
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", *paths]
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())


def draw(files: Mapping[str, Sequence[Path]], path: Path, *, title: str, random: float) -> None:
    """Draw what was kept of trainings on one task: interquartile means over the seeds, and the return of random play.

    Args:
        files: the CSV files of each group.
        path: the picture.
        title: of it.
        random: the return.
    """
    curves = {group: curve_of(found) for group, found in files.items()}
    levels = {"random play": random}
    write_whole(path, png(draw_curves(curves, styles(curves), title=title, quantity=EVALUATION_RETURN, levels=levels)))


def curve_of(files: Sequence[Path]) -> tuple[Array, Estimate]:
    """Frames ``[P]``, and the interquartile mean of the evaluations over the runs of some CSV files."""
    runs = [read_metrics(file) for file in files]
    frames, values = align([(np.array(run[FRAMES]), np.array(run[EVALUATION_RETURN])) for run in runs])
    return frames, curve(values)
