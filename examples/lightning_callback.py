"""A callback of your own: it watches a metric and ends the training once the team is good enough.

Run it by `python examples/lightning_callback.py --enough 1.7`.
"""

from __future__ import annotations

import argparse

from lightning.pytorch import Callback, LightningModule, Trainer

import marlkit

# An easy task of few steps, evaluated after every iteration: two agents walk to their goals.
SMALL = [
    "env.scenario=navigation", "env.scenario_options={n_agents: 2, collisions: false}", "env.num_envs=64", "env.max_steps=50",
    "data.steps=50", "update.minibatch_size=800", "optimizer.lr=1.0e-3", "trainer.evaluation_interval=1",
    "trainer.evaluation_episodes=16", "trainer.video=false",
]  # fmt: skip


class Enough(Callback):
    """Stops when the mean return of evaluations reaches a threshold; any callback of Lightning works like this.

    Args:
        threshold: the return that is enough.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each iteration: to Lightning an iteration is an epoch."""
        # Every metric of `metrics.csv` is here under the same name; that of an evaluation stays until the next one.
        found = trainer.callback_metrics.get("evaluation/return")
        if found is None:
            return
        print(f"iteration {trainer.current_epoch}: return {found:.2f}")
        if found >= self.threshold:
            print("That is enough.")
            trainer.should_stop = True  # the run is finished as if it had ended by itself: checkpoints, curve


def main() -> None:
    """Train MAPPO, small, with the callback."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=20, help="at most")
    parser.add_argument("--enough", type=float, default=1.5, help="the return that ends it")
    arguments = parser.parse_args()
    length = f"trainer.iterations={arguments.iterations}"
    recipe = marlkit.load_recipe("mappo", [*SMALL, length])
    folder = marlkit.train(recipe, progress=False, callbacks=[Enough(arguments.enough)])
    print(f"The run is in {folder}; marlkit.load_policy(...) loads its policy.")


if __name__ == "__main__":
    main()
