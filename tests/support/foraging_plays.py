"""Play recorded with the package `lbforaging`, and how it was recorded.

`tests/envs/foraging_plays.npz` was made with `lbforaging` 1.1.1 (ids `-v2`; commit 2b2cab2 of github.com/semitable/lb-foraging)
and 2.0.0 (`-v3`; the wheel of PyPI), with gymnasium 1.4.0 and numpy 2.4.6:

    PYTHONPATH=<lbforaging 1.1.1>:tests/support python tests/support/foraging_plays.py 2
    PYTHONPATH=<lbforaging 2.0.0>:tests/support python tests/support/foraging_plays.py 3

The gym 0.21 that 1.1.1 asks for can no longer be installed. In its place stood a package `gym` with `Env` an empty class,
`spaces` those of gymnasium, `utils.seeding.np_random(seed)` as `(numpy.random.RandomState(seed), seed)`, and an empty `register`.

Agents act at random, go for food, or crowd together, and always with some random actions, unavailable ones among them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from marlkit.envs._foraging.maps import PAPER

FILE = Path(__file__).resolve().parents[1] / "envs" / "foraging_plays.npz"
EPISODES = 4

VARIANTS: dict[str, dict[str, Any]] = {
    "2s-8x8-3p-3f": {"sight": 2},
    "1s-5x5-2p-2f": {"sight": 1},
    "3s-10x10-8p-1f-coop": {"sight": 3},
    "2s-10x10-5p-3f": {"sight": 2},
    "6x6-2p-2f penalty": {"penalty": 0.1},
    "8x8-3p-3f plain": {"normalise_reward": False, "penalty": 0.5},
    "2s-8x8-3p-3f blind": {"sight": 2, "observe_agent_levels": False},
    "8x8-3p-3f alone": {"max_food_level": 1},
    "8x8-4p-4f strong": {"min_player_level": 2, "max_player_level": 4},
}
"""Further maps with options of marlkit's environment; a word after the name tells them apart."""
ONLY_3 = ("blind", "alone", "strong")
"""What 1.1.1 has no options for."""


class Play(NamedTuple):
    """E episodes of one map, L steps in all, one episode after another.

    Attributes:
        lengths: steps of each episode, ``[E]``.
        agents: row, column and level of each agent at the start, ``[E, N, 3]``.
        food: the same of each piece of food, zeros for what had no place, ``[E, F, 3]``.
        actions: ``[L, N]``, unavailable ones among them.
        rewards: ``[L, N]``.
        left: level of the food that is left, ``[L]``.
        first: observations at the start, ``[E, N, O]``.
        observations: after each step, ``[L, N, O]``.
        available_first: ``[E, N, 6]``.
        available: after each step, ``[L, N, 6]``.
    """

    lengths: NDArray[Any]
    agents: NDArray[Any]
    food: NDArray[Any]
    actions: NDArray[Any]
    rewards: NDArray[Any]
    left: NDArray[Any]
    first: NDArray[Any]
    observations: NDArray[Any]
    available_first: NDArray[Any]
    available: NDArray[Any]


def cases() -> list[str]:
    """Every recorded map as ``name-v2`` or ``name-v3``."""
    return [
        f"{name}-v{version}" for version in (2, 3) for name in [*PAPER, *VARIANTS] if version == 3 or not name.endswith(ONLY_3)
    ]


def options_of(case: str) -> dict[str, Any]:
    """The options of marlkit's environment for a case."""
    name = case[:-3]
    options = {key: value for key, value in VARIANTS.get(name, {}).items() if key != "sight"}
    return {"map": f"{name.partition(' ')[0]}{case[-3:]}", **options}


def recorded(case: str) -> Play:
    """The recorded play of a case."""
    with np.load(FILE) as file:
        return Play(*(file[f"{case}/{field}"] for field in Play._fields))


# --- recording; needs the package --------------------------------------------------------------------------------------------


def _make(name: str, version: int) -> Any:
    from lbforaging.foraging.environment import ForagingEnv

    size, players, food = map(int, re.findall(r"(\d+)x\d+-(\d+)p-(\d+)f", name)[0])
    options = VARIANTS.get(name, {})
    lowest, highest = options.get("min_player_level", 1), options.get("max_player_level", 2)
    common = {
        "players": players,
        "field_size": (size, size),
        "sight": options.get("sight", size),
        "max_episode_steps": 50,
        "force_coop": "coop" in name,
        "normalize_reward": options.get("normalise_reward", True),
        "penalty": options.get("penalty", 0.0),
    }
    if version == 2:
        return ForagingEnv(max_player_level=highest + 1, max_food=food, **common)
    levels = {"min_player_level": lowest, "max_player_level": highest, "min_food_level": 1}
    levels["max_food_level"] = options.get("max_food_level")
    return ForagingEnv(max_num_food=food, observe_agent_levels=options.get("observe_agent_levels", True), **levels, **common)


def _available(env: Any) -> NDArray[Any]:
    return np.array([[any(a.value == n for a in env._valid_actions[player]) for n in range(6)] for player in env.players])


def _choose(env: Any, kind: int, draw: np.random.Generator, crowd: tuple[int, int]) -> list[int]:
    """Random actions (kind 0), towards the nearest food and load (1, 2), or all towards one cell (3)."""
    food = list(zip(*env.field.nonzero(), strict=True))
    actions = []
    for player in env.players:
        row, column = player.position
        goals = [crowd] if kind == 3 else food
        if kind == 0 or draw.random() < 0.25 or not goals:
            actions.append(int(draw.integers(6)))
            continue
        far = [(abs(r - row) + abs(c - column), r - row, c - column) for r, c in goals]
        distance, down, right = min(far)
        if distance <= 1:
            actions.append(5 if kind < 3 else int(draw.integers(5)))
        elif abs(down) > abs(right) or (abs(down) == abs(right) and draw.random() < 0.5):
            actions.append(2 if down > 0 else 1)
        else:
            actions.append(4 if right > 0 else 3)
    return actions


def _record(name: str, version: int) -> Play:
    env, draw = _make(name, version), np.random.default_rng(len(name) + version)
    pieces = env.max_food if version == 2 else env.max_num_food
    found: dict[str, list[Any]] = {field: [] for field in Play._fields}
    if version == 2:
        env.seed(version)
    for episode in range(EPISODES):
        started = env.reset() if version == 2 else env.reset(seed=episode)[0]
        found["first"].append(np.stack(started))
        found["available_first"].append(_available(env))
        found["agents"].append([[*player.position, player.level] for player in env.players])
        food = [[row, column, env.field[row, column]] for row, column in zip(*env.field.nonzero(), strict=True)]
        found["food"].append(food + [[0, 0, 0]] * (pieces - len(food)))
        crowd = (int(draw.integers(env.rows)), int(draw.integers(env.cols)))
        steps, done = 0, False
        while not done:
            actions = _choose(env, episode, draw, crowd)
            result = env.step(actions)
            steps, done = steps + 1, bool(np.all(result[2]))
            step = (actions, result[1], env.field.sum(), np.stack(result[0]), _available(env))
            for field, value in zip(("actions", "rewards", "left", "observations", "available"), step, strict=True):
                found[field].append(value)
        found["lengths"].append(steps)
    play = {field: np.array(values) for field, values in found.items()}
    small = {field: values.astype(np.int8) for field, values in play.items() if values.dtype != bool and field != "rewards"}
    return Play(**{**play, **small})


def main(version: int) -> None:
    """Record all cases of a version, beside those of the other."""
    kept: dict[str, Any] = {}
    if FILE.exists():
        with np.load(FILE) as file:
            kept = {key: file[key] for key in file if f"-v{version}/" not in key}
    for case in cases():
        if case.endswith(f"-v{version}"):
            play = _record(case[:-3], version)
            kept |= {f"{case}/{field}": values for field, values in play._asdict().items()}
    np.savez_compressed(FILE, allow_pickle=False, **kept)


if __name__ == "__main__":
    main(int(sys.argv[1]))
