"""Trainings that are killed, interrupted and run out of disk at random moments, resumed, and compared with undisturbed ones.

    python -m benchmarks.torture --trials 100 --out benchmarks/results/torture.json

Every trial trains a shipped recipe with one or two ranks, at small sizes, strikes it once or twice, resumes it to the end and
checks: the last and the best checkpoint equal an undisturbed run's bit for bit; so do
``metrics.csv`` (but for ``time/*``) and ``episodes.csv``; a
signal ends all processes within 10 seconds, with the exit code of the signal; no output holds a traceback; no process and no
partial file is left.
What strikes, and when, follows from the seed and the number of the trial; how far a run has come by then does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from marlkit.recipe import load_recipe, shipped
from marlkit.run.checkpoint_io import load_checkpoint
from marlkit.run.metrics_file import read_metrics
from marlkit.run.versions import versions

LIMIT = 10.0
"""Seconds in which all processes have to end after a signal, or after one of them was killed."""
ITERATIONS = 12
SIZES = [
    "env.num_envs=4", "env.max_steps=8", "actor.hidden=[8]", "actor.embedding=8", "critic.hidden=[8]", "critic.embedding=8",
    "opponents.hidden=[8]", "opponents.memory=4", "opponents.every=2",
    "data.steps=10", "data.batch_size=20", "data.updates=2", "data.capacity=100", "data.warm_up=40",
    "update.epochs=2", "update.minibatch_size=20", "update.step.epochs=2", "update.step.minibatch_size=20",
    "update.interval_mean=3", f"trainer.iterations={ITERATIONS}", "trainer.evaluation_interval=3",
    "trainer.evaluation_episodes=2", "trainer.checkpoint_seconds=0.5", "trainer.video=false", "trainer.accelerator=cpu",
]  # fmt: skip
"""Overrides that make a recipe small; each recipe takes those that its components have."""
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "marlkit")


@dataclass(frozen=True)
class Blow:
    """What strikes a run.

    Attributes:
        signals: sent one after the other, half a second apart; none: the disk is full.
        all_ranks: whether every rank receives them, as from a terminal, or one only.
    """

    name: str
    signals: tuple[signal.Signals, ...] = ()
    all_ranks: bool = True


BLOWS = (
    Blow("kill all", (signal.SIGKILL,)),
    Blow("kill one", (signal.SIGKILL,), all_ranks=False),
    Blow("terminate all", (signal.SIGTERM,)),
    Blow("terminate one", (signal.SIGTERM,), all_ranks=False),
    Blow("interrupt all", (signal.SIGINT,)),
    Blow("interrupt one", (signal.SIGINT,), all_ranks=False),
    Blow("interrupt twice", (signal.SIGINT, signal.SIGINT)),
    Blow("hang up", (signal.SIGHUP,)),
    Blow("full disk"),
)


@dataclass
class Trial:
    """One run, what strikes it, and what was wrong.

    Attributes:
        moments: by blow, after how many rows of metrics of its process, and how many seconds later; -1 rows: from its start.
    """

    number: int
    recipe: str
    ranks: int
    blows: list[Blow]
    moments: list[tuple[int, float]]
    random: random.Random
    struck: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def trial(seed: int, number: int) -> Trial:
    """The trial of a number; all recipes come in turn."""
    draw = random.Random(f"{seed}-{number}")
    names = sorted(shipped())
    ranks = draw.choice((1, 1, 2))
    blows = draw.choices([blow for blow in BLOWS if ranks > 1 or blow.all_ranks], k=draw.choice((1, 1, 2)))
    moments = [
        (-1, draw.uniform(0.5, 5.0))
        if draw.random() < 0.15
        else (draw.randrange(ITERATIONS // len(blows)), draw.uniform(0.0, 0.3))
        for _ in blows
    ]
    return Trial(number, names[number % len(names)], ranks, blows, moments, draw)


def run_trial(made: Trial, folder: Path, whole: Path) -> None:
    """Strike a run and resume it to the end; what is wrong is noted.

    Args:
        made: the trial.
        folder: to train in.
        whole: the undisturbed run.
    """
    for blow, moment in zip(made.blows, made.moments, strict=True):
        struck = _strike(made, blow, moment, _next_command(made, folder), folder)
        made.struck += [blow.name] if struck else []
    command = _next_command(made, folder)
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    _note_output(made, done.stdout + done.stderr)
    run = _latest_run(folder)
    if done.returncode != 0 or run is None:
        made.wrong.append(f"{shlex.join(command)} ended with code {done.returncode}: {done.stderr.strip()}")
    else:
        made.wrong += [*_differences(run, whole), *_left_over(run)]


def _next_command(made: Trial, folder: Path) -> list[str]:
    """Resume the run that was struck, or train where nothing was saved yet."""
    command, run = [sys.executable, "-m", "marlkit"], _latest_run(folder)
    if run is not None and (run / "checkpoints" / "last.ckpt").exists():
        return [*command, "resume", str(run), "--no-progress"]
    options = [*known(made.recipe, SIZES), f"trainer.devices={made.ranks}"]
    return [*command, "train", made.recipe, *options, "--root", str(folder), "--no-progress"]


def _latest_run(folder: Path) -> Path | None:
    return max(folder.glob("*/*/"), default=None)


def known(name: str, overrides: Sequence[str]) -> list[str]:
    """Those of ``overrides`` that set an option of a component of the recipe."""
    entries = load_recipe(name).entries
    split = [(text, *text.partition("=")[0].rpartition(".")[::2]) for text in overrides]
    return [text for text, path, option in split if path in entries and option in entries[path].options]


def _strike(made: Trial, blow: Blow, moment: tuple[int, float], command: Sequence[str], folder: Path) -> bool:
    """Start a command and strike it; whether it still ran."""
    before = _latest_run(folder)
    with tempfile.TemporaryFile("w+") as output:
        main = subprocess.Popen(command, stdout=output, stderr=output, env=_environment(), start_new_session=True)
        _wait_for(main, folder, before if "resume" in command else None, moment)
        ranks = [main.pid, *_children(main.pid)]
        struck = main.poll() is None
        start = time.monotonic()
        ended = _send(made, blow, main, ranks) if blow.signals else _fill_the_disk(made, main, ranks)
        code = main.returncode
        left = [process for process in ranks if _runs(process)] if ended else ranks
        for process in left:
            os.kill(process, signal.SIGKILL)
        main.wait()
        output.seek(0)
        text = output.read()
    if struck and blow.signals:
        made.seconds.append(time.monotonic() - start)
    if left:
        made.wrong.append(f"{blow.name}: {len(left)} of {len(ranks)} processes still ran after {LIMIT:.0f} s: {text}")
    elif code not in _codes(blow, made.ranks):
        made.wrong.append(f"{blow.name}: ended with code {code}: {text}")
    _note_output(made, text)
    return struck


def _wait_for(main: subprocess.Popen[bytes], folder: Path, run: Path | None, moment: tuple[int, float]) -> None:
    """Wait until a process has written some rows of metrics and some time has passed, or has ended."""
    rows, seconds = moment
    target = 0 if rows < 0 else rows + 1 + (0 if run is None else _rows(run))
    known_runs = set(folder.glob("*/*/"))
    deadline = time.monotonic() + 300
    while target and main.poll() is None and time.monotonic() < deadline:
        new = run if run is not None else next(iter(set(folder.glob("*/*/")) - known_runs), None)
        if new is not None and _rows(new) >= target:
            break
        time.sleep(0.005)
    end = time.monotonic() + seconds
    while main.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def _rows(run: Path) -> int:
    try:
        return max(0, (run / "metrics.csv").read_text().count("\n") - 1)
    except OSError:
        return 0


def _send(made: Trial, blow: Blow, main: subprocess.Popen[bytes], ranks: Sequence[int]) -> bool:
    """Send the signals; whether all processes ended in time."""
    victims = ranks if blow.all_ranks else [made.random.choice(ranks)]
    for index, signum in enumerate(blow.signals):
        time.sleep(0.5 if index else 0)
        for process in victims:
            if main.poll() is None and _runs(process):
                os.kill(process, signum)
    return _all_end(main, ranks, LIMIT)


def _fill_the_disk(made: Trial, main: subprocess.Popen[bytes], ranks: Sequence[int]) -> bool:
    """Let files grow no further than some kilobytes; whether all processes ended, by an error or with the training."""
    size = made.random.randrange(200, 60_000)
    for process in ranks:
        try:
            resource.prlimit(process, resource.RLIMIT_FSIZE, (size, size))
        except ProcessLookupError:
            continue
    return _all_end(main, ranks, 300)


def _all_end(main: subprocess.Popen[bytes], ranks: Sequence[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if main.poll() is not None and not any(map(_runs, ranks)):
            return True
        time.sleep(0.01)
    return False


def _codes(blow: Blow, ranks: int) -> set[int]:
    """Exit codes of the first process: that of the blow, or 0 if the training was already over."""
    if not blow.signals:
        return {0, 1}
    signum = blow.signals[0]
    codes = {0, -signum if signum == signal.SIGKILL else 128 + signum}
    # Before a rank has joined the others, its end is an error for them.
    return codes if blow.all_ranks and ranks == 1 else codes | {2}


def _note_output(made: Trial, text: str) -> None:
    for word in ("Traceback", "Exception ignored"):
        if word in text:
            made.wrong.append(f"{word} in the output: {text}")


def _differences(run: Path, whole: Path) -> Iterator[str]:
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (load_checkpoint(each / "checkpoints" / name) for each in (run, whole))
        yield from (f"{name}: `{part}` differs" for part in PARTS if not same(ours.get(part), theirs.get(part)))
    for name in ("metrics.csv", "episodes.csv"):
        ours, theirs = (read_metrics(each / name) for each in (run, whole))
        if ours["iteration"] != (list(range(ITERATIONS)) if name == "metrics.csv" else theirs["iteration"]):
            yield f"{name}: holds the iterations {ours['iteration']}"
        kept = {column for column in {*ours, *theirs} if not column.startswith("time/")}
        yield from (f"{name}: `{column}` differs" for column in kept if repr(ours.get(column)) != repr(theirs.get(column)))


def _left_over(run: Path) -> Iterator[str]:
    yield from (f"{path.name} is left" for path in run.rglob("*.partial"))
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = status.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(run.parents[1]) in command and _runs(int(status.parent.name)):
            yield f"a process is left: {command}"


def same(a: Any, b: Any) -> bool:
    """Deep equality of checkpoints, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _children(process: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _runs(process: int) -> bool:
    """Whether a process still runs; a zombie may remain in the process table."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    return inherited | {"OMP_NUM_THREADS": "1"}


def undisturbed(made: Trial, folder: Path) -> Path:
    """The undisturbed run of a trial's recipe and number of ranks; trained once.

    Raises:
        SystemExit: it failed.
    """
    own = folder / f"{made.recipe}-{made.ranks}"
    if _latest_run(own) is None:
        done = subprocess.run(_next_command(made, own), capture_output=True, text=True, env=_environment(), check=False)
        if done.returncode != 0:
            sys.exit(f"{made.recipe} fails undisturbed:\n{done.stderr}")
    run = _latest_run(own)
    assert run is not None
    return run


def main() -> None:
    """Run the trials, print what was wrong, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="number of the first trial (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    options = parser.parse_args()
    # A shell that starts this in the background lets it, and what it starts, ignore control-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.first, options.first + options.trials):
            made = trial(options.seed, number)
            run_trial(made, Path(folder, str(number)), undisturbed(made, Path(folder, "whole")))
            trials.append(made)
            what = ", ".join(made.struck) or "over before the blow"
            print(f"{number}: {made.recipe}, {made.ranks} ranks, {what}: {'; '.join(made.wrong) or 'equal'}", flush=True)
    found = _summary(trials)
    print(json.dumps(found, indent=2))
    if options.out is not None:
        made_by = {"command": shlex.join(["python", "-m", "benchmarks.torture", *sys.argv[1:]])}
        options.out.write_text(json.dumps({**made_by, **versions(), **found}, indent=2) + "\n")
    sys.exit(bool(found["failures"]))


def _summary(trials: Sequence[Trial]) -> dict[str, Any]:
    blows = Counter((blow, f"{made.ranks} rank{'s' * (made.ranks > 1)}") for made in trials for blow in made.struck)
    return {
        "trials": len(trials),
        "trials_by_recipe": dict(sorted(Counter(made.recipe for made in trials).items())),
        "blows": {f"{blow}, {ranks}": count for (blow, ranks), count in sorted(blows.items())},
        "equal": sum(not made.wrong for made in trials),
        "longest_end_s": round(max((max(made.seconds) for made in trials if made.seconds), default=0.0), 2),
        "failures": [{"trial": made.number, "recipe": made.recipe, "wrong": made.wrong} for made in trials if made.wrong],
    }


if __name__ == "__main__":
    main()
