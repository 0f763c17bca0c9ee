"""Speed of a recipe on the work of its bare loop: one JSON line with the same options and entries.

    python -m benchmarks.recipe_speed maddpg --agents 4
    python -m benchmarks.bare.maddpg --agents 4

``update_s`` is the time after collecting; the time between the steps (logging, Lightning) is part of ``iteration_s``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.bare import f2a2_ddpg, happo, maddpg, perla_mappo_vmas, qmix, stopwatch
from benchmarks.mappo_balance import entries
from benchmarks.measure import measure

WORKS: dict[str, Any] = {
    "happo": happo.Work,
    "perla_mappo_vmas": perla_mappo_vmas.Work,
    "maddpg": maddpg.Work,
    "f2a2_ddpg": f2a2_ddpg.Work,
    "qmix": qmix.Work,
}
FROM_THE_START: dict[str, list[str]] = {recipe: ["data.warm_up=0"] for recipe in ("maddpg", "f2a2_ddpg", "qmix")}
"""Overrides without warm-up: bare loops learn from the first iteration on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print one JSON line."""
    chooser = argparse.ArgumentParser(description=__doc__, add_help=False)
    chooser.add_argument("recipe", choices=list(WORKS))
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    recipe = chooser.parse_args(arguments[:1]).recipe
    options = stopwatch.parser(WORKS[recipe]).parse_args(arguments[1:])
    work = stopwatch.work_of(WORKS[recipe], options)
    measured = measure(
        recipe,
        [*stopwatch.overrides(work), *FROM_THE_START.get(recipe, [])],
        iterations=options.iterations,
        warm_up=options.warm_up,
        threads=options.threads,
        device=options.device,
        turn=options.turn if options.turns else 0,
    )
    print(json.dumps({"who": "marlkit", "recipe": recipe, **entries(measured, options.envs * options.steps, digits=4)}))


if __name__ == "__main__":
    main()
