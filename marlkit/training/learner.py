"""One iteration of every system: collect, then annotate, estimate and update for each batch that the data gives.

Optimisation is manual (Lightning counts and saves, the update decides when to step). The batch is collected inside the training
step and not by a data loader, because a loader that reads ahead would collect with the parameters of the iteration before.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import lightning
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys, rng
from marlkit.component import Actor, Critic, Data, Environment, Estimator, Opponents, Optimizer, Targets, Update, who_is
from marlkit.errors import MarlkitError, NonFiniteError, OptionError, writing
from marlkit.learning import Adjust, Learning, Metrics, mean_metrics
from marlkit.options import CompileMode
from marlkit.ranks import ALONE, Ranks, rank_seed
from marlkit.recorder.steps import StepRecorder
from marlkit.saved import named
from marlkit.training.annotation import Annotator
from marlkit.training.culprit import naming_the_culprit
from marlkit.training.diagnostics import Diagnostics
from marlkit.training.episode_returns import EpisodeReturns
from marlkit.training.inspection import Witness, all_finite, inspect_played
from marlkit.training.precision import Precision, Products
from marlkit.training.restoring import refuse_unfit


class Learner(lightning.LightningModule):
    """Holds the components of a recipe and runs its iterations.

    Args:
        env, actor, opponents, critic, targets, data, estimator, update, optimizer: the components.
        iterations: length of the whole training; schedules end there.
        recipe: text of the completed recipe, kept in every checkpoint.
        evaluate: called every ``evaluation_interval`` iterations and after the last; what it returns is logged.
        evaluation_interval: 0 means after the last only.
        precision: in which hidden layers multiply, see :mod:`marlkit.training.precision`; while ``evaluate`` plays, float32.
        seed: of the recipe; from it come the draws that several ranks share, and where each other rank's own begin.
        compile: how steps run that come again and again, see :mod:`marlkit.recorder.steps`.
        diagnostics: what to measure beside the training, see :mod:`marlkit.training.diagnostics`.
    """

    share_done: Tensor

    def __init__(
        self,
        *,
        env: Environment,
        actor: Actor,
        opponents: Opponents,
        critic: Critic,
        targets: Targets,
        data: Data,
        estimator: Estimator,
        update: Update,
        optimizer: Optimizer,
        iterations: int,
        recipe: str = "",
        evaluate: Callable[[Actor], dict[str, float]] | None = None,
        evaluation_interval: int = 0,
        precision: Precision = "float32",
        seed: int = 0,
        compile: CompileMode = "none",
        diagnostics: Literal["all"] | Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.env = env
        self.data = data
        self.optimizer = optimizer
        self.actor = actor
        self.critic = critic
        self.opponents = opponents
        self.targets = targets
        self.estimator = estimator
        self.update = update
        self.iterations = iterations
        self.recipe = recipe
        self.evaluate = evaluate
        self.evaluation_interval = evaluation_interval
        self.iteration = 0
        self.frames = 0
        self.returns = EpisodeReturns(env.spec)
        self.ranks = Ranks(seed)
        self.step_recorder = StepRecorder(compile, self, lambda: [self._torch_optimizer()], [data, optimizer])
        self.register_buffer("share_done", torch.zeros(()), persistent=False)
        self._generators: dict[str, Any] | None = None
        self._learning: Learning | None = None  # one object, so that recorded steps find it unchanged by identity
        self._metrics: dict[str, float] = {}
        self._wire()
        self.diagnostics = None
        if diagnostics:
            self.diagnostics = Diagnostics(diagnostics, estimator=estimator, critic=critic, seed=seed)
        self.products = Products([actor, critic, opponents, targets], precision, env.device.type)

    def _wire(self) -> None:
        """Connect the components as their contracts say."""
        self.annotator = Annotator(
            actor=self.actor,
            opponents=self.opponents,
            critic=self.critic,
            targets=self.targets,
            data=self.data,
            estimator=self.estimator,
            update=self.update,
            run_step=self.step_recorder,
        )
        self.annotator.wire(self.data)
        self.data.inspect = self._inspect
        self._played_in, self._inspected = Witness(self.env), False
        self.update.attach(self.actor, self.critic)
        self.targets.track(self.actor, self.critic)
        lags = "lagging" in self.targets.traits
        if lags and self.annotator.critic_trains_actor and self.targets.actor() is self.actor:
            raise OptionError("actor", "must be true, because the critic reads what the actor owns: both have to lag")
        self.targets.train()  # a copy that is asked for is in evaluation mode from then on, of which Lightning warns

    # --- the four steps -------------------------------------------------------------------------------------------------

    def training_step(self, *_: Any) -> None:
        """One iteration."""
        with naming_the_culprit(f"iteration {self.iteration}"), self.step_recorder.undisturbed():
            self._iterate()

    def _iterate(self) -> None:
        seconds: dict[str, float] = defaultdict(float)
        history: list[Metrics] = []
        self.actor.schedule(self.progress())
        learns = _switch(self.actor)
        learns(False)
        with self._timed("collect", seconds):
            played = self.collect()
            if self.annotator.opponents_are_read:
                self.opponents.observe(played)
            self.estimator.observe(played, self.ranks)
        batch = played
        for batch in self._timed_each(self.data.batches(played, self.actor), "collect", seconds):
            with self._timed("annotate", seconds):
                self.annotate(batch)
            with self._timed("estimate", seconds):
                self.estimate(batch)
            learns(True)
            with self._diagnosed(batch, seconds), self._timed("update", seconds):
                history.append(self.learn(batch))
            learns(False)
        self._finish(played, batch, mean_metrics(history), seconds)

    def collect(self) -> TensorDict:
        """Play the steps of an iteration, ``[B, T]``, and look at them before anything is learnt from them."""
        self._inspected = False
        try:
            played = self.data.collect(cast(Environment, self._played_in), self.actor, self.step_recorder)
        except MarlkitError:
            raise
        except Exception:
            self._played_in.refuse_unfit()
            raise
        if not self._inspected:
            self._inspect(played)
        return played

    def _inspect(self, played: TensorDictBase, following: TensorDictBase | None = None) -> None:
        self._inspected = True
        inspect_played(played, self.env, self.actor, self.iteration, following)

    def learn(self, batch: TensorDictBase) -> Metrics:
        """Update policy and critic from an estimated batch ``[*, T]``, then the opponent model."""
        learning = self.learning()
        metrics = self.update.update(batch, learning)
        return metrics | self.opponents.fit(batch, learning) if self.annotator.opponents_are_read else metrics

    @contextmanager
    def _diagnosed(self, batch: TensorDictBase, seconds: dict[str, float]) -> Iterator[None]:
        """Measure an estimated batch ``[*, T]`` around what is learnt from it, where that is wanted."""
        if self.diagnostics is None:
            yield
            return
        with self._timed("diagnostics", seconds):
            self.diagnostics.before(batch, self.learning(), self.estimator, self.update, self.iteration)
        yield
        with self._timed("diagnostics", seconds):
            self.diagnostics.after(batch, self.actor)

    def estimate(self, batch: TensorDictBase) -> None:
        """Write value targets, and advantages where there is a baseline, on an annotated batch ``[B, T]``."""
        if not self.annotator.off_policy:
            self.estimator(batch)
            return

        def step(read: TensorDictBase) -> dict[keys.Key, Tensor]:
            written = self.estimator(read)
            return {key: written[key] for key in self.estimator.writes}

        given = batch.select(*self.estimator.reads, *keys.AGENT_ENDS, strict=False)
        for key, value in self.step_recorder("estimate", step, given).items():
            batch.set(key, value)

    def annotate(self, batch: TensorDictBase) -> None:
        """Write what opponents and critic say of a batch ``[B, T]`` and of its ``next``; see :class:`Annotator`."""
        self.annotator(batch)

    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(1.0, self.iteration / max(1, self.iterations))

    def learning(self) -> Learning:
        """What the update works on."""
        self.optimizer.schedule(self._torch_optimizer(), self.progress())
        self.share_done.fill_(self.progress())
        if self._learning is None or self._learning.progress is not self.share_done:
            self._learning = Learning(
                self.actor,
                self.critic,
                self.opponents,
                self.minimise,
                self.share_done,
                self.targets.follow,
                self.ranks,
                self.step_recorder,
                self.step_recorder.afterwards,
            )
        return self._learning

    def minimise(self, loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        """One optimiser step on what the scalar ``loss`` ``[]`` reaches; see :class:`marlkit.learning.Minimise`."""
        optimizer = self._torch_optimizer()
        optimizer.zero_grad(set_to_none=True)
        self.manual_backward(loss)
        groups = {name: [p for p in parameters if p.grad is not None] for name, parameters in self.parameter_groups().items()}
        self.ranks.mean_([p.grad for reached in groups.values() for p in reached if p.grad is not None])
        limit = float("inf") if max_grad_norm is None else max_grad_norm
        groups = {name: reached for name, reached in groups.items() if reached}
        norms = {name: nn.utils.clip_grad_norm_(reached, limit, foreach=True) for name, reached in groups.items()}
        if adjust is not None:
            adjust()
        optimizer.step()
        self.targets.follow(list(norms), self.step_recorder.afterwards)
        return {f"{name}/grad_norm": norm for name, norm in norms.items()}

    # --- around them ----------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by component; one that several components use belongs to the first."""
        groups: dict[str, list[nn.Parameter]] = {}
        taken: set[int] = set()
        for name in ("actor", "critic", "opponents", "update"):
            own = [parameter for parameter in getattr(self, name).parameters() if id(parameter) not in taken]
            taken.update(id(parameter) for parameter in own)
            if own:
                groups[name] = own
        return groups

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser over all components."""
        return self.optimizer.build(self.parameter_groups())

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def _finish(self, played: TensorDictBase, batch: TensorDictBase, metrics: Metrics, seconds: dict[str, float]) -> None:
        refuse_non_finite(batch, metrics, self)
        self.iteration += 1
        frames = played.batch_size.numel() * self.ranks.size
        self.frames += frames
        logged = {name: float(value) for name, value in self.ranks.mean_each(metrics).items()}
        if self.diagnostics is not None:
            logged |= self.diagnostics.take(self.ranks)
        logged |= self.returns.take(played, self.ranks)
        logged |= {f"time/{name}": value for name, value in seconds.items()}
        logged["time/frames_per_second"] = frames / sum(seconds.values())
        logged["optimizer/lr"] = float(self._torch_optimizer().param_groups[0]["lr"])
        logged["frames"] = float(self.frames)
        if self.is_evaluated():
            logged |= self.ranks.from_first(self._evaluation())
        self._log(logged)

    def _evaluation(self) -> dict[str, float]:
        """How well the actor plays; nothing on a rank that does not evaluate."""
        if self.evaluate is None:
            return {}
        self.actor.eval()
        # As a loaded policy plays.
        with self.products.exact():
            return self.evaluate(self.actor)

    def _log(self, metrics: dict[str, float]) -> None:
        """Hand metrics to callbacks and loggers.

        Lightning's own way takes as long as ten environment steps, and would count optimiser steps instead of iterations.
        """
        self._tell_callbacks(metrics)
        for logger in self.loggers:
            where = getattr(logger, "save_dir", None) or logger.name or type(logger).__name__
            with writing(where, "`marlkit resume` continues from the last checkpoint."):
                logger.log_metrics(metrics, step=self.iteration - 1)
                logger.save()

    def _tell_callbacks(self, metrics: dict[str, float]) -> None:
        told = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
        self.trainer.callback_metrics.update(told)

    def _latest_metrics(self) -> dict[str, float]:
        """What callbacks see, but for the times, which no two runs have in common."""
        latest = self.trainer.callback_metrics.items()
        return {name: value.item() for name, value in latest if not name.startswith("time/")}

    def is_evaluated(self) -> bool:
        """Whether the iteration that has just ended was followed by an evaluation."""
        last = self.iteration == self.iterations
        return last or (self.evaluation_interval > 0 and self.iteration % self.evaluation_interval == 0)

    @contextmanager
    def _timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        start = self._now()
        yield
        seconds[name] += self._now() - start

    def _timed_each(self, batches: Iterator[TensorDict], name: str, seconds: dict[str, float]) -> Iterator[TensorDict]:
        while True:
            with self._timed(name, seconds):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def train_dataloader(self) -> Sequence[int]:
        """One token per epoch: an epoch of Lightning is one iteration."""
        return [0]

    def setup(self, stage: str) -> None:
        """Join the other ranks, where there are any, and draw from here on what they do not draw."""
        if self.trainer.world_size > 1:
            self.ranks.join()
        if self.ranks.index > 0:
            rng.seed_all(rank_seed(self.ranks.seed, self.ranks.index))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what decides the future beside the parameters: of this rank, and at the first of the others too."""
        self.ranks.align(self.parameters())
        own = {
            "returns": self.returns.state_dict(),
            "env": self.env.state_dict(),
            "data": self.data.state_dict(),
            "rng": rng.state(),
        }
        checkpoint["marlkit"] = {
            "recipe": self.recipe,
            "spec": self.env.spec.as_dict(),
            "iteration": self.iteration,
            "frames": self.frames,
            "metrics": self._latest_metrics(),
            **own,
        }
        if self.ranks.size > 1:
            others = self.ranks.gather(own | {"buffers": dict(self.named_buffers())})[1:]
            kept = checkpoint["state_dict"]
            for other in others:
                other["buffers"] = _differing(other["buffers"], kept)
            checkpoint["marlkit"] |= {"ranks": self.ranks.state_dict(), "others": others}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue from :meth:`on_save_checkpoint`; the generators' state is restored when training starts.

        Raises:
            CheckpointError: an entry does not fit; names it.
        """
        with named(str(self.trainer.ckpt_path)):
            self._load(checkpoint)

    def _load(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["marlkit"]
        if self.ranks.size > 1 or "ranks" in state:
            self.ranks.load_state_dict(state.get("ranks", ALONE.state_dict()))
        refuse_unfit(checkpoint, self)
        self.iteration = state["iteration"]
        self.frames = state["frames"]
        self._metrics = state.get("metrics", {})
        if self.ranks.index > 0:
            state = state["others"][self.ranks.index - 1]
            checkpoint["state_dict"].update(state["buffers"])
        for section in ("returns", "env", "data"):
            component = getattr(self, section)
            with named(f"the state of {section} ({type(component).__name__}) cannot be loaded"):
                component.load_state_dict(state[section])
        self._generators = state["rng"]

    def on_train_start(self) -> None:
        """Restore what callbacks look at, and last the random generators, after everything that may have drawn from them."""
        self.ranks.align(self.parameters())
        self._tell_callbacks(self._metrics)
        if self._generators is not None:
            rng.restore(self._generators)
            self._generators = None


def _switch(module: nn.Module) -> Callable[[bool], object]:
    """Its method `train`, for many calls: without torch's checks of each attribute where no part has a `train` of its own."""
    parts = list(module.modules())
    if any(type(part).train is not nn.Module.train for part in parts):
        return module.train

    def train(mode: bool) -> None:
        for part in parts:
            vars(part)["training"] = mode

    return train


def _differing(buffers: dict[str, Tensor], first: dict[str, Any]) -> dict[str, Tensor]:
    """Those of a rank's ``buffers`` that a checkpoint holds and that are not as on the first rank."""
    return {name: own for name, own in buffers.items() if name in first and not torch.equal(own, first[name].cpu())}


def refuse_non_finite(batch: TensorDictBase, metrics: Metrics, learner: Learner) -> None:
    """Stop at the first NaN or infinity in a batch ``[*, T]`` or in metrics, in the order in which tensors are made.

    What was just played was looked at already (:func:`marlkit.training.inspection.inspect_played`).

    Raises:
        NonFiniteError: names the tensor, the component that wrote it and what to try.
    """
    checks: list[tuple[str, str, Tensor]] = []
    for section in ("env", "actor", "opponents", "critic", "estimator"):
        written = {key: batch.get(key, None) for key in getattr(learner, section).writes}
        checks += [(section, keys.name(key), x) for key, x in written.items() if x is not None and x.is_floating_point()]
    checks += [("update", name, value) for name, value in metrics.items() if value.is_floating_point()]
    checks = [check for check in checks if check[2].numel()]
    finite = all_finite([value for _, _, value in checks])
    if finite.all():
        return
    section, name, _ = checks[int((~finite).nonzero()[0])]
    raise NonFiniteError(
        f"iteration {learner.iteration}: `{name}`, written by {who_is(getattr(learner, section))}, is not finite. Training "
        "stopped; the checkpoints of the run are from before it. Usual causes: a learning rate that is too high, unclipped "
        "gradients, rewards that are very large."
    )
