"""How a recipe is trained: a Lightning Trainer, evaluation, logging and saving."""

from __future__ import annotations

from typing import Any, Literal

from marlkit.component import Trainer
from marlkit.contract import Contract
from marlkit.options import CompileMode, Diagnostic, NonNegativeFloat, NonNegativeInt, PositiveInt, Processes
from marlkit.spec import TeamSpec


class LightningTrainer(Trainer):
    """Options of a training run.

    Args:
        spec: the team.
        iterations: how often to collect, annotate, estimate and update.
        accelerator: `auto` takes a GPU where there is one; `cpu`, `cuda` or `mps` ask for one kind.
        device: index of the GPU; the first of several.
        devices: processes on each machine that train together, one GPU each; on a CPU too. Each has `env.num_envs` environments.
        nodes: machines.
        threads: CPU threads of a process; `null` leaves torch's choice.
        compile: how steps run that are many small operations. `none`: operation by operation. `record`: the operations of a step
            are recorded and replayed, without the Python around them. `graph`: the same as one CUDA graph. `auto` takes what was
            measured faster: on a CPU `none` for the environment and `record` for the rest, with the same results bit for bit;
            elsewhere nothing was measured yet, and it takes `none`. What cannot be recorded runs as with `none`,
            after a warning that says why.
        precision: of the products between hidden layers while training; all the rest, and every later use of the policy, is
            float32. `bfloat16` pays for wide layers where the processor multiplies in it (not on MPS); the same on resume.
        evaluation_interval: iterations between evaluations; 0: only at the end.
        evaluation_episodes: episodes per evaluation, on environments of their own, with the most likely actions.
        evaluation_steps: steps after which an episode of an evaluation is cut where the environment sets no limit.
        monitor: the metric of evaluations whose largest value makes `best.ckpt`; `null`: `evaluation/return`. Agents that are
            opposed to each other have no such return: name a group's or an agent's (`evaluation/group_return/…`), or the
            latest evaluation makes it.
        checkpoint_seconds: time between checkpoints of the last state; what a kill can lose.
        diagnostics: what to measure beside the training, which stays the same bit for bit (`docs/diagnostics.md`): `all`, or some
            of `td_error`, `variance` of the critic's estimate, `gradient` and `kl` of the policy.
        logger: a Lightning logger beside the CSV file and TensorBoard.
        logger_options: its constructor's arguments.
        video: draw an episode of the trained team at the end.
    """

    contract = Contract(code="marlkit.trainers._loggers:code")

    def __init__(
        self,
        spec: TeamSpec,
        *,
        iterations: PositiveInt = 100,
        accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto",
        device: NonNegativeInt = 0,
        devices: Processes = 1,
        nodes: Processes = 1,
        threads: Processes | None = None,
        compile: Literal["auto", CompileMode] = "auto",
        precision: Literal["float32", "bfloat16"] = "float32",
        evaluation_interval: NonNegativeInt = 10,
        evaluation_episodes: PositiveInt = 32,
        evaluation_steps: PositiveInt = 1000,
        monitor: str | None = None,
        checkpoint_seconds: NonNegativeFloat = 60.0,
        diagnostics: Literal["all"] | list[Diagnostic] = [],  # noqa: B006
        logger: Literal["wandb", "mlflow", "comet", "neptune"] | None = None,
        logger_options: dict[str, Any] | None = None,
        video: bool = True,
    ) -> None:
        self.spec = spec
        self.iterations = iterations
        self.accelerator = accelerator
        self.device = device
        self.devices = devices
        self.nodes = nodes
        self.threads = threads
        self.compile = compile
        self.precision = precision
        self.evaluation_interval = evaluation_interval
        self.evaluation_episodes = evaluation_episodes
        self.evaluation_steps = evaluation_steps
        self.monitor = monitor
        self.checkpoint_seconds = checkpoint_seconds
        self.diagnostics = diagnostics
        self.logger = logger
        self.logger_options = logger_options or {}
        self.video = video
