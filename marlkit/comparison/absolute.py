"""The absolute metric: the best policy of a run, over ten times the episodes of an evaluation.

Gorsane et al. 2022, "Towards a Standardised Performance Evaluation Protocol for Cooperative MARL", after Colas et al. 2018.
"""

from __future__ import annotations

from pathlib import Path

from marlkit.comparison.loading import Absolute
from marlkit.run.checkpoints import BEST, LAST
from marlkit.run.contents import CHECKPOINTS, run_recipe
from marlkit.run.use import play_checkpoint

TIMES = 10
"""Times the episodes of an evaluation."""
SEED = 2_000_000
"""Added to a recipe's seed, so that the best policy is not judged by the episodes that it was chosen by."""


def absolute_metric(folder: Path, *, trust: bool = False) -> Absolute:
    """Play the policy of ``best.ckpt``, or of ``last.ckpt`` where there is no other.

    Args:
        folder: a run.
        trust: as in :func:`marlkit.run.evaluate`.

    Raises:
        TrustError: the recipe names code outside of marlkit that the user has not trusted.
        RunError: there is no checkpoint, or it cannot be used.
    """
    recipe = run_recipe(folder, trust=trust)
    name = BEST if (folder / CHECKPOINTS / BEST).exists() else LAST
    played, saved = play_checkpoint(
        folder,
        checkpoint=name.partition(".")[0],
        count=TIMES * recipe.config.trainer.evaluation_episodes,
        seed=recipe.seed + SEED,
        trust=trust,
    )
    episodes = {metric: values.tolist() for metric, values in played.by_metric().items()}
    return Absolute(name, saved["iteration"], saved["frames"], episodes)
