"""A critic of your own: written here, checked alone, and trained by naming it in a recipe.

Run it by `python examples/own_critic.py --iterations 10`.
"""

from __future__ import annotations

import argparse

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

import marlkit
from marlkit import keys
from marlkit.component import Critic
from marlkit.contract import Contract
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.options import PositiveInt
from marlkit.spec import TeamSpec
from marlkit.testing import check_component, spec_examples


class NeighbourCritic(Critic):
    """Values what an agent observes beside the mean of what its team observes.

    Args:
        spec: the team; all sizes come from it.
        width: units of the hidden layer. Whatever stands behind the `*` is an option in a recipe.
    """

    # What it reads and writes. `marlkit check` reads this without running the file, and finds out whether the parts fit.
    contract = Contract(reads=(keys.OBSERVATION,), writes=(keys.STATE_VALUE,), predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec, *, width: PositiveInt = 32) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=True)
        self.network = nn.Sequential(nn.Linear(2 * spec.observation, width), nn.Tanh(), nn.Linear(width, 1))

    def predict(self, batch: TensorDictBase) -> Tensor:
        """A value for each agent, ``[*, N, 1]``, of observations ``[*, N, O]``."""
        seen = batch[keys.OBSERVATION]
        return self.network(torch.cat([seen, seen.mean(-2, keepdim=True).expand_as(seen)], -1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=3)
    arguments = parser.parse_args()
    for spec in spec_examples():  # small teams that differ in all that a critic has to cope with
        check_component(NeighbourCritic(spec))
    print("NeighbourCritic keeps its contract.")
    small = ["env.num_envs=32", "data.steps=50", "update.minibatch_size=400", "trainer.video=false"]
    length = f"trainer.iterations={arguments.iterations}"
    # The dotted path of the class: this file's name, and the class in it.
    folder = marlkit.train(marlkit.load_recipe("mappo", ["critic=own_critic.NeighbourCritic", *small, length]), progress=False)
    print(f"Trained; see {folder / 'curve.png'}.")
