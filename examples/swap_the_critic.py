"""Train one recipe with three critics, by one override each, and print what the teams earn.

Run it by `python examples/swap_the_critic.py --iterations 10`.
"""

from __future__ import annotations

import argparse

import marlkit
from marlkit.run.metrics_file import read_metrics

# `mappo` is a recipe that comes with marlkit: `marlkit list mappo` prints it. An override changes one line of it. These make an
# easy task of few steps: two agents walk to their goals. Without them the recipe learns a harder one in a minute or two.
SMALL = [
    "env.scenario=navigation", "env.scenario_options={n_agents: 2, collisions: false}", "env.num_envs=64", "env.max_steps=50",
    "data.steps=50", "update.minibatch_size=800", "optimizer.lr=1.0e-3", "trainer.evaluation_interval=1",
    "trainer.evaluation_episodes=16", "trainer.video=false",
]  # fmt: skip

CRITICS = {
    "its own observation": ["critic=local"],  # this is IPPO
    "what all observe": ["critic=centralised"],  # this is MAPPO
    "what all observe and may do": ["critic=marginalised", "critic.samples=10"],  # this is PERLA
}


def main() -> None:
    """Train each and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=5, help="length of each training")
    arguments = parser.parse_args()
    print(f"{'the critic sees':30}{'first return':>14}{'last return':>14}")
    for seen, critic in CRITICS.items():
        overrides = [*SMALL, *critic, f"trainer.iterations={arguments.iterations}"]
        # A recipe is checked before anything is built; a mistake is a RecipeError with its place and a remedy.
        recipe = marlkit.load_recipe("mappo", overrides)
        folder = marlkit.train(recipe, "runs", progress=False)
        returns = read_metrics(folder / "metrics.csv")["evaluation/return"]
        print(f"{seen:30}{returns[0]:14.2f}{returns[-1]:14.2f}")


if __name__ == "__main__":
    main()
