"""The return of a team that acts at random: the baseline of learning curves.

    python -m benchmarks.random_play maddpg --episodes 100

Actions are uniform: over the available ones where discrete, between the bounds where continuous.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase

from marlkit import keys, load_recipe
from marlkit.component import Actor
from marlkit.nn.distributions import CategoricalTeam, TeamDistribution
from marlkit.spec import Continuous, TeamSpec
from marlkit.training.assembly import build_environment
from marlkit.training.evaluation import play_episodes


class RandomActor(Actor):
    """Acts uniformly at random."""

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec

    def distribution(self, batch: TensorDictBase, agents: Sequence[int] | None = None) -> TeamDistribution:
        """Equal probabilities of the available actions, from a batch ``[*]`` with mask ``[*, N, A]``."""
        mask = batch[keys.ACTION_MASK]
        return CategoricalTeam(torch.zeros_like(mask, dtype=torch.float32), mask)

    def forward(self, batch: TensorDictBase, deterministic: bool = False) -> TensorDictBase:
        """Write a random ``ACTION``, ``[*, N]`` or ``[*, N, D]``."""
        space = self.spec.action
        if not isinstance(space, Continuous):
            return batch.set(keys.ACTION, self.distribution(batch).sample())
        if space.low is None or space.high is None:
            raise ValueError("there is no uniform distribution over unbounded actions")
        low, high = torch.tensor(space.low), torch.tensor(space.high)
        return batch.set(keys.ACTION, low + (high - low) * torch.rand(*batch.batch_size, *low.shape))


def random_return(recipe: str, overrides: Sequence[str] = (), *, episodes: int = 100, seed: int = 0) -> float:
    """Mean return of ``episodes`` episodes of random play in the environment of a recipe."""
    loaded = load_recipe(recipe, overrides)
    env = build_environment(loaded, torch.device("cpu"), seed, num_envs=episodes)
    steps = env.spec.horizon or 1000
    return float(play_episodes(env, RandomActor(env.spec), seed=seed, steps=steps).returns.mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the return as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="such as env.scenario=balance")
    parser.add_argument("--episodes", type=int, default=100)
    options = parser.parse_args(arguments)
    found = random_return(options.recipe, options.overrides, episodes=options.episodes)
    print(json.dumps({"recipe": options.recipe, "episodes": options.episodes, "return": round(found, 4)}))


if __name__ == "__main__":
    main()
