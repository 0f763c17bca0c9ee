"""Recipes, overrides and run folders that are wrong at random: each is refused in words, or builds.

    python -m benchmarks.fuzz --inputs 10000 --seed 0 --out benchmarks/results/fuzz.json

Shipped recipes are changed a few times each: keys dropped, doubled, renamed, moved; values of other types and extreme ones;
nested parts, interpolations, aliases, `extends`; single bytes. A failure is anything but an error of marlkit's, more than
five seconds of processor time, or a recipe that passes the check and whose components then cannot be made. An error of a
constructor that knows the team, such as groups of agents that are not there, is none. What names code outside of marlkit has
to be refused without trust, and is never built. Input `k` depends on the seed and on `k` alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import shutil
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

from marlkit import run
from marlkit.contract import KINDS
from marlkit.errors import MarlkitError, TrustError
from marlkit.recipe import Recipe, load_recipe, shipped
from marlkit.recipe.catalogue import components
from marlkit.recipe.trust import foreign, require_trust
from marlkit.run.versions import versions
from marlkit.training.assembly import build_environment, build_learner

SECONDS = 5.0
"""Of processor time, for one input."""
LARGEST_BUILT = 256
"""A recipe with a larger number is checked but not built here."""

EXTREME: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 10**6, 10**12, 2**63 - 1, 2**63, 10**400, -0.0, 0.5, 1.0, 1e-300, 1e300, float("inf"), float("nan"),
    True, False, None, "", " ", "a", "all", "none", "auto", "null", "no", "010", "1:30", "1e-4", "???", "a.b.C", "os.system",
    "x" * 300,
    "${seed}", "${env}", "${env.num_envs}", "${nowhere}", "${", "\\${x}", "${oc.env:HOME}", "${oc.env:NO_SUCH}",
    "${update.${name}}",
    "\0", "\ud800", "é", "\u2028", "../up", "~nobody/x", [], [0], [[0]], [[0], [1]], [[]], [None], ["a"], [1.5], [4, 4], {},
    {"type": "local"}, {"a": 1},
)  # fmt: skip
WORDS = (
    "010", "1:30", "0x1F", "1_0", "!!int x", "!!binary aGk=", "!!set {a}", "*a", "&a", "@", "`", "%", "<<: *a", "{", "[",
    "'", '"', "|", ">",
    "- ", "? ", ": ", "#", "---", "...", "\t", "\r", "\x85", "\x00", "\ufeff", "é", "${", "}", "9" * 400, "1e999", ".nan",
    "~", "???",
)  # fmt: skip


class _TooSlowError(BaseException):
    """An input took too long."""


@contextmanager
def bounded() -> Iterator[None]:
    """Stop what takes more than :data:`SECONDS` of processor time."""

    def stop(*_: Any) -> None:
        raise _TooSlowError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def changed_text(draw: random.Random) -> str:
    """A shipped recipe after some changes of its tree, and sometimes of its characters."""
    text = shipped()[draw.choice(sorted(shipped()))].read_text(encoding="utf-8")
    if draw.random() < 0.8:
        tree = yaml.safe_load(text)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            change_tree(draw, tree)
        if draw.random() < 0.05:
            tree["extends"] = draw.choice((*shipped(), *EXTREME[-12:]))
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw.random() < 0.5)
    for _ in range(draw.choice((0, 0, 0, 1, 3)) or int("env" not in text)):
        place = draw.randrange(len(text))
        cut = draw.choice((0, 0, 1, 5, 40))
        text = text[:place] + draw.choice((*WORDS, "")) + text[place + cut :]
    return text


def change_tree(draw: random.Random, tree: dict[str, Any]) -> None:
    """Change one entry of a recipe's tree."""
    holder, key = draw.choice(list(_entries(tree)))
    kind = draw.choice(("value", "value", "value", "type", "type", "drop", "rename", "move", "nest", "alias", "key"))
    if kind == "value":
        holder[key] = _nearby(draw, holder[key])
    elif kind == "type":
        section = draw.choice(sorted(KINDS))
        name = draw.choice(sorted(components(section)))
        if isinstance(tree.get(section), dict) and draw.random() < 0.7:
            tree[section]["type"] = name
        else:
            tree[section] = name
    elif kind == "drop":
        del holder[key]
    elif kind == "rename":
        holder[draw.choice((str(key)[:-1], f"{key}s", str(key).upper(), "type", "", 3, None, True))] = holder.pop(key)
    elif kind == "move":
        target, _ = draw.choice(list(_entries(tree)))
        target[key] = copy.deepcopy(holder[key])
    elif kind == "nest":
        inner = copy.deepcopy(tree.get("update"))
        tree["update"] = {"type": draw.choice(("pdhg", "sequential", "ppo_clip")), "step": inner}
    elif kind == "alias":
        target, name = draw.choice(list(_entries(tree)))
        target[name] = holder[key] if target is not holder[key] else 1
    else:
        options = components(draw.choice(sorted(KINDS)))
        entry = options[draw.choice(sorted(options))]
        holder[draw.choice([*entry.options, "type", "name"])] = draw.choice(EXTREME)


def _nearby(draw: random.Random, value: Any) -> Any:
    """Another value, of the same type as often as not."""
    if draw.random() < 0.5 and isinstance(value, (int, float)) and not isinstance(value, bool):
        whole = [int(value)] if math.isfinite(value) else []
        return draw.choice((value + 1, value - 1, -value, value * 10, value / 2, *whole, float(value)))
    return copy.deepcopy(draw.choice(EXTREME))


def _entries(tree: Any, depth: int = 6) -> Iterator[tuple[dict[Any, Any], Any]]:
    if isinstance(tree, dict) and depth:
        for key, value in tree.items():
            yield tree, key
            yield from _entries(value, depth - 1)


def changed_overrides(draw: random.Random) -> list[str]:
    """Overrides of a shipped recipe, most of them wrong."""
    found = []
    for _ in range(draw.choice((1, 1, 2, 4))):
        section = draw.choice(sorted(KINDS))
        entries = components(section)
        entry = entries[draw.choice(sorted(entries))]
        name = draw.choice(
            [section, *(f"{section}.{option}" for option in entry.options), "name", "seed", f"{section}.type", "update.step"]
        )
        value = draw.choice(
            (entry.name, *map(str, EXTREME), *WORDS, json.dumps(draw.choice(EXTREME[:30])), f"{{type: {entry.name}}}")
        )
        found.append(draw.choice((f"{name}={value}",) * 9 + (f"{name} {value}",)))
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"1{'0' * 400}" if value == 10**400 else str(value)


def build(recipe: Recipe) -> str:
    """Make the components of an accepted recipe; returns what became of it."""
    if needs := foreign(recipe):
        return refuse_foreign(recipe, typed=all(need.place.override for need in needs))
    if any(isinstance(number, int) and number > LARGEST_BUILT for number in _numbers(recipe)):
        return "accepted, too large to be built here"
    try:
        env = build_environment(recipe, torch.device("cpu"), 0, num_envs=2)
        build_learner(recipe, env)
        env.close()
    except MarlkitError as error:
        if "cannot be built:" in str(error):
            raise RuntimeError(f"passed the check: {error}") from error
        return "refused for its team"
    return "built"


def refuse_foreign(recipe: Recipe, *, typed: bool) -> str:
    """What becomes of a recipe that names code outside of marlkit, or environment variables."""
    if typed:
        return "accepted, names code that is not run here"
    try:
        require_trust(recipe)
    except TrustError:
        return "refused without trust"
    raise RuntimeError("would run foreign code without trust")


def _numbers(recipe: Recipe) -> Iterator[Any]:
    harmless = {
        "capacity",
        "warm_up",
        "minibatch_size",
        "batch_size",
        "num_envs",
        "max_steps",
        "interval",
        "fit_rows",
        "recent",
        "iterations",
    }

    def leaves(value: Any) -> Iterator[Any]:
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from leaves(entry)
        if not isinstance(value, (dict, list)):
            yield value

    for path in recipe.entries:
        if path != "trainer":
            yield from leaves({name: value for name, value in recipe.options(path).items() if name not in harmless})


def try_recipe(draw: random.Random, folder: Path, build_share: float) -> str:
    """Check a changed recipe, with changed overrides now and then; build some of those that pass."""
    file = folder / "team.yaml"
    overrides = changed_overrides(draw) if draw.random() < 0.4 else []
    source: str | Path = draw.choice(sorted(shipped()))
    if not overrides or draw.random() < 0.2:
        source = file
        file.write_bytes(changed_text(draw).encode("utf-8", "surrogatepass"))
    recipe = load_recipe(source, overrides)
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    if load_recipe(file, folders=recipe.folders).options("env") != recipe.options("env"):
        raise RuntimeError("reads back as another recipe")
    return build(recipe) if draw.random() < build_share else "accepted, not built"


def try_run(draw: random.Random, finished: Path, folder: Path) -> str:
    """Load the policy of a run of which one file is changed."""
    copied = folder / "run"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(finished, copied)
    file = draw.choice([path for path in sorted(copied.rglob("*")) if path.suffix in (".yaml", ".json", ".ckpt")])
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 4))):
        place = draw.randrange(max(1, len(content)))
        kind = draw.choice(("flip", "cut", "insert", "word"))
        if kind == "flip" and content:
            content[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del content[place : place + draw.choice((1, 10, 10_000))]
        else:
            content[place:place] = draw.choice((*WORDS, "null", "[]", "{}")).encode("utf-8", "surrogatepass")
    file.write_bytes(content)
    run.load_policy(copied)
    return "loaded"


def fuzz(inputs: Iterable[int], seed: int, *, build_share: float = 0.2, runs: bool = True) -> dict[str, Any]:
    """Try inputs; returns the counts of what became of them, and the failures."""
    counts: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, XDG_CONFIG_HOME=name):  # trust nothing yet
        folder = Path(name)
        finished = _finished_run(folder) if runs else None
        for number in inputs:
            draw = random.Random(f"{seed}-{number}")
            of_run = draw.random() < 0.1 and finished is not None
            said = ""
            try:
                with bounded():
                    outcome = try_run(draw, finished, folder) if of_run and finished else try_recipe(draw, folder, build_share)
            except MarlkitError:
                outcome = "refused"
            except _TooSlowError:
                outcome = "too slow"
                said = traceback.format_exc(limit=-3)
            except Exception as error:
                outcome = "failed"
                said = f"{type(error).__name__}: {error}"[:300] + traceback.format_exc(limit=-2)[-400:]
            counts[("run: " if of_run else "recipe: ") + outcome] += 1
            if said:
                failures.append({"input": number, "outcome": outcome, "said": said})
    return {"inputs": sum(counts.values()), "seed": seed, "counts": dict(sorted(counts.items())), "failures": failures}


def _finished_run(folder: Path) -> Path:
    small = [
        "env={type: matrix_game, game: climbing, num_envs: 4}", "data.steps=4", "update.minibatch_size=null", "update.epochs=1",
        "actor.hidden=[4]", "critic.hidden=[4]", "trainer.iterations=1", "trainer.video=false", "trainer.evaluation_episodes=2",
    ]  # fmt: skip
    return run.train(load_recipe("mappo", small), folder / "runs", progress=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the result as JSON, and write it; exit with 1 after a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--build-share", type=float, default=0.2, help="share of the accepted recipes that is built")
    parser.add_argument("--no-runs", action="store_true", help="recipes and overrides only")
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made_with = versions()
    result = fuzz(range(parsed.inputs), parsed.seed, build_share=parsed.build_share, runs=not parsed.no_runs)
    text = json.dumps(result | {"versions": made_with}, indent=2)
    print(text)
    if parsed.out:
        parsed.out.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(bool(result["failures"]))


if __name__ == "__main__":
    main()
