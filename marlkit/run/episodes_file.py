"""Every episode of every evaluation as one CSV file, for statistics that a mean does not allow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from marlkit.run.contents import METRICS
from marlkit.run.metrics_file import EVALUATION_LENGTH, FRAMES, episode_column, iterations_with
from marlkit.run.metrics_logger import MetricsFile
from marlkit.training.evaluation import Episodes


class EpisodesFile(MetricsFile):
    """A Lightning logger that writes ``episodes.csv``: one row per evaluation, as safe as those of ``metrics.csv``.

    The column ``evaluation/return/3`` holds the fourth episode's part in the metric ``evaluation/return``. It logs what
    :meth:`take` was given, in the row of the metrics that are logged next, and nothing of these but ``frames``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._taken: dict[str, float] = {}

    def take(self, episodes: Episodes) -> None:
        """Keep the episodes of an evaluation until its iteration is logged."""
        self._taken = {
            episode_column(name, number): value
            for name, values in episodes.by_metric().items()
            for number, value in enumerate(values.tolist())
        }

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the episodes of iteration ``step``, if it was followed by an evaluation."""
        if self._taken:
            taken, self._taken = self._taken, {}
            super().log_metrics({FRAMES: metrics[FRAMES]} | taken, step)

    def _expected(self) -> Iterable[int]:
        """The iterations that were followed by an evaluation, as ``metrics.csv`` tells."""
        metrics = self.path.with_name(METRICS)
        found = iterations_with(metrics, EVALUATION_LENGTH) if metrics.exists() else ()
        return [iteration for iteration in found if iteration < self.first_iteration]
