"""What Lightning and the callbacks have saved, held against what they are now."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning
from torch import Tensor

from marlkit.errors import CheckpointError
from marlkit.run.checkpoint_io import of_file
from marlkit.run.checkpoints import Checkpoints
from marlkit.saved import ANY, COUNT, LIST, MAPPING, Kind, refuse_misfit

VERSION = re.compile(r"\d+\.\d+(\.\d+)*((a|b|rc|\.dev|\.post|\+)[0-9a-z.]*)*")
LIGHTNINGS: dict[str, Any] = {
    "pytorch-lightning_version": Kind("a version", lambda value: isinstance(value, str) and VERSION.fullmatch(value) is not None),
    "epoch": COUNT,
    "global_step": COUNT,
    "lr_schedulers": LIST,
    "loops": MAPPING,
    "callbacks": MAPPING,
}
NUMBER = Kind("a number", lambda value: type(value) in (int, float) and value == value)


def refuse_unfit_progress(checkpoint: dict[str, Any], trainer: lightning.Trainer, path: Path) -> None:
    """Check the part of a checkpoint that is Lightning's; :mod:`marlkit.training.restoring` does so for the learner's.

    Raises:
        CheckpointError: names the first entry that does not fit.
    """
    with of_file(path):
        refuse_misfit(checkpoint, LIGHTNINGS, "", exact=False)
        loop = checkpoint["loops"].get("fit_loop")
        refuse_misfit(loop, _counts(trainer.fit_loop.state_dict()), "loops.fit_loop", exact=False)
        played, iteration = loop["epoch_progress"]["current"]["processed"], checkpoint["marlkit"]["iteration"]
        if played != iteration:
            raise CheckpointError(f"counts {played} iterations in `loops.fit_loop` and {iteration} in `marlkit.iteration`.")
        examples: dict[str, Any] = {Checkpoints.__qualname__: {"best": NUMBER}}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # A callback that was not there before has no state.
            if callback.state_key in checkpoint["callbacks"]:
                examples[callback.state_key] = _of_any_number(callback.state_dict())
        refuse_misfit(checkpoint["callbacks"], examples, "callbacks", exact=False)


def _counts(example: Any) -> Any:
    """The example, with any count in place of its whole numbers."""
    if isinstance(example, dict):
        return {name: _counts(value) for name, value in example.items()}
    return COUNT if type(example) is int else example


def _of_any_number(example: dict[str, Any]) -> dict[str, Any]:
    """The example of a callback's state, of which numbers may be of another kind by now."""
    return {name: ANY if value is None or isinstance(value, (int, float, Tensor)) else value for name, value in example.items()}
