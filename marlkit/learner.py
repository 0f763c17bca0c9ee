"""One iteration of every system: collect, then annotate, estimate and update for each batch that the data gives.

Optimisation is manual (Lightning counts and saves, the update decides when to step). The batch is collected inside the training
step and not by a data loader, because a loader that reads ahead would collect with the parameters of the iteration before.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys, rng
from marlkit.component import (
    Actor,
    Adjust,
    Critic,
    Data,
    Environment,
    Estimator,
    Learning,
    Metrics,
    Opponents,
    Optimizer,
    Targets,
    Update,
    mean_metrics,
)
from marlkit.errors import NonFiniteError, OptionError
from marlkit.minibatches import units
from marlkit.options import Mode
from marlkit.precision import Precision, Products
from marlkit.ranks import ALONE, Ranks, rank_seed
from marlkit.repetition import Repetition

ANNOTATED_ROWS = 16384
"""Rows that a component annotates at a time: bounds memory, and keeps a layer's output within a processor's cache."""


class Learner(lightning.LightningModule):
    """Holds the components of a recipe and runs its iterations.

    Args:
        env, actor, opponents, critic, targets, data, estimator, update, optimizer: the components.
        iterations: length of the whole training; schedules end there.
        recipe: text of the completed recipe, kept in every checkpoint.
        evaluate: called every ``evaluation_interval`` iterations and after the last; what it returns is logged.
        evaluation_interval: 0 means after the last only.
        precision: in which hidden layers multiply, see :mod:`marlkit.precision`; while ``evaluate`` plays, float32.
        seed: of the recipe; from it come the draws that several ranks share, and where each other rank's own begin.
        compile: how steps run that come again and again, see :mod:`marlkit.repetition`.
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
        compile: Mode = "none",
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
        self.returns = EpisodeReturns()
        self.ranks = Ranks(seed)
        self.repetition = Repetition(compile, self, self._optimizer_state, self._learning_rates)
        self.register_buffer("share_done", torch.zeros(()), persistent=False)
        self._generators: dict[str, Any] | None = None
        self._metrics: dict[str, float] = {}
        self._wire()
        self.products = Products([actor, critic, opponents, targets], precision, env.device.type)

    def _wire(self) -> None:
        """Let the components know of one another what their contracts say."""
        read = {*self.critic.reads, *self.estimator.reads, *self.update.reads}
        self._beliefs = tuple(key for key in self.opponents.writes if key in read)
        self.opponents_are_read = bool(self._beliefs)
        self._critic_reads_beliefs = bool(set(self._beliefs) & set(self.critic.reads))
        self.opponents.wanted = frozenset(self._beliefs)
        believed = self._beliefs if self._critic_reads_beliefs else ()
        valued = {*self.critic.reads, *self.opponents.reads_for(believed)}
        self._policy_is_read = bool(set(self.actor.writes) & valued)
        self.value_is_read = not self._off_policy or bool({*self.critic.writes} & {*self.estimator.reads, *self.update.reads})
        read |= set(self.opponents.reads_for(self._beliefs))
        # What was played stays; what the policy says of it now may be another thing than then.
        current = [key for key in self.actor.writes if key not in (keys.ACTION, keys.LOG_PROB)]
        self._encoder_is_shared = bool(set(current) & set(self.critic.reads) & keys.WITH_GRADIENT)
        self._refreshed = tuple(current) if self._off_policy and read & set(current) else ()
        self.data.history = self.opponents.history if self.opponents_are_read else 0
        self.data.shown = self._read_of_batches()
        self.update.attach(self.actor, self.critic)
        self.targets.track(self.actor, self.critic)
        if self._encoder_is_shared and "lagging" in self.targets.traits and self.targets.actor() is self.actor:
            raise OptionError("actor", "must be true, because the critic reads the actor's encoder: both have to lag")

    def _read_of_batches(self) -> frozenset[keys.Key]:
        """Keys of played steps that some component reads, and those that the learner reads itself."""
        evaluated = {*self.actor.reads, *self.critic.reads, keys.HIDDEN}
        evaluated |= set(self.opponents.reads) if self.opponents_are_read else set()
        steps = {*self.estimator.reads, *self.update.reads, keys.TERMINATED}
        return frozenset(evaluated | steps | {keys.following(key) for key in evaluated})

    @property
    def _off_policy(self) -> bool:
        """Whether batches may hold what another policy than the present one played."""
        return "on_policy" not in self.data.traits

    # --- the four steps -------------------------------------------------------------------------------------------------

    def training_step(self, *_: Any) -> None:
        """One iteration."""
        seconds: dict[str, float] = defaultdict(float)
        history: list[Metrics] = []
        with self.repetition.watching(self.actor):
            self.actor.schedule(self.progress())
        self.actor.eval()
        with self._timed("collect", seconds):
            played = self.data.collect(self.env, self.actor, self.repetition)
            if self.opponents_are_read:
                self.opponents.observe(played)
        batch = played
        for batch in self._timed_each(self.data.batches(played, self.actor), "collect", seconds):
            with self._timed("annotate", seconds):
                self.annotate(batch)
            with self._timed("estimate", seconds):
                self.estimate(batch)
            self.actor.train()
            with self._timed("update", seconds):
                history.append(self.learn(batch))
            self.actor.eval()
        self._finish(played, batch, mean_metrics(history), seconds)

    def learn(self, batch: TensorDictBase) -> Metrics:
        """Update policy and critic from an estimated batch, then the opponent model."""
        learning = self.learning()
        metrics = self.update.update(batch, learning)
        return metrics | self.opponents.fit(batch, learning) if self.opponents_are_read else metrics

    def estimate(self, batch: TensorDictBase) -> None:
        """Write value targets, and advantages where there is a baseline, on an annotated batch ``[B, T]``."""
        if not self._off_policy:
            self.estimator(batch)
            return

        def step(read: TensorDictBase) -> dict[keys.Key, Tensor]:
            written = self.estimator(read)
            return {key: written[key] for key in self.estimator.writes}

        for key, value in self.repetition("estimate", step, batch.select(*self.estimator.reads)).items():
            batch.set(key, value)

    @torch.no_grad()
    def annotate(self, batch: TensorDictBase) -> None:
        """Write what opponents and critic say of a batch ``[B, T]`` and of its ``next``.

        On policy, the next state of a step is the state of the step after it, so only the steps after which an episode was cut or
        the batch ended are evaluated again. Off policy every next state is, on actions that the policy chooses afresh; and
        the parameters of the policy's distribution become those of the current policy (``ACTION`` and ``LOG_PROB`` stay what was
        played); of the present state only what somebody reads is written. After a true end nothing is worth anything.
        """
        found = self.repetition("annotate", self._afresh, batch) if self._off_policy else self._as_played(batch)
        for key, value in found.items():
            batch.set(key, value)

    def _as_played(self, batch: TensorDictBase) -> dict[keys.Key, Tensor]:
        """Of steps that were played one after another by the present policy."""
        rows = units(batch, None)
        self._annotate_rows(rows, self.critic, self._beliefs)
        found = {key: rows[key] for key in (*self.critic.writes, *self._beliefs)}
        target = self.targets.critic()
        if "lagging" in self.targets.traits:
            rows = rows.copy()
            self._encode(rows)
            self._annotate_rows(rows, target, ())
        index = _evaluated_again(batch)
        following = rows["next"][index] if len(index) else None
        if following is not None:
            self._annotate_rows(following, target, self._beliefs if self._critic_reads_beliefs else (), imagined=True)
        for key in self.critic.writes:
            values = found[keys.following(key)] = _shifted(rows[key], batch)
            if following is not None:
                values[index] = following[key]
        return _batch_major(found, batch)

    def _afresh(self, batch: TensorDictBase) -> dict[keys.Key, Tensor]:
        """Of steps that need not follow one another, and may have been played by another policy."""
        rows = units(batch, None)
        if self._refreshed:
            rows.update(self.actor.distribution(rows).parameters())
        critic = self.critic if self.value_is_read else None
        self._annotate_rows(rows, critic, self._beliefs)
        found = {key: rows[key] for key in (*(critic.writes if critic else ()), *self._beliefs, *self._refreshed)}
        following = rows["next"]
        beliefs = self._beliefs if self._critic_reads_beliefs else ()
        self._annotate_rows(following, self.targets.critic(), beliefs, imagined=True)
        ended = rows[keys.TERMINATED]
        for key in self.critic.writes:
            value = following[key]
            found[keys.following(key)] = value.masked_fill(ended.view(-1, *[1] * (value.dim() - 1)), 0.0)
        return _batch_major(found, batch)

    def _annotate_rows(
        self, rows: TensorDictBase, critic: Critic | None, beliefs: Sequence[keys.Key], *, imagined: bool = False
    ) -> None:
        """Write what the critic reads and says of ``rows``; ``imagined`` ones are states whose action nobody has taken."""
        wanted = [*(critic.writes if critic else ()), *beliefs]
        if not wanted:
            return
        blocks = []
        for start in range(0, len(rows), ANNOTATED_ROWS):
            block = rows[start : start + ANNOTATED_ROWS]
            if imagined and self._policy_is_read:
                self._choose(block)
            if beliefs:
                self.opponents(block, played=not imagined)
            if critic is not None:
                critic(block)
            blocks.append(block.select(*wanted))
        for key in wanted:
            rows.set(key, torch.cat([block[key] for block in blocks]))

    def _choose(self, rows: TensorDictBase) -> None:
        """The actions that the values of ``rows`` are bootstrapped with: on policy those of the policy that plays."""
        if self._off_policy:
            self.targets.actor().bootstrap(rows)
            return
        self.actor.bootstrap(rows)
        self._encode(rows)

    def _encode(self, rows: TensorDictBase) -> None:
        """Let a critic that lags and reads an encoder of the actor read the encoder that lags with it."""
        if self._encoder_is_shared and "lagging" in self.targets.traits:
            self.targets.actor().distribution(rows)

    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(1.0, self.iteration / max(1, self.iterations))

    def learning(self) -> Learning:
        """What the update works on."""
        self.optimizer.schedule(self._torch_optimizer(), self.progress())
        return Learning(
            self.actor,
            self.critic,
            self.opponents,
            self.minimise,
            self.share_done.fill_(self.progress()),
            self.targets.follow,
            self.ranks,
            self.repetition,
            self.repetition.afterwards,
        )

    def _optimizer_state(self) -> Iterator[Tensor]:
        """The tensors that an optimiser step changes or takes in, the parameters aside."""
        optimizer = self._torch_optimizer()
        for held in (*optimizer.state.values(), *optimizer.param_groups):
            yield from (value for value in held.values() if isinstance(value, Tensor))

    def _learning_rates(self) -> tuple[float, ...]:
        """Those that are no tensors."""
        rates = [group["lr"] for group in self._torch_optimizer().param_groups]
        return tuple(rate for rate in rates if not isinstance(rate, Tensor))

    def minimise(self, loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        """One optimiser step on what ``loss`` reaches; see :class:`marlkit.component.Minimise`."""
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
        self.targets.follow(list(norms), self.repetition.afterwards)
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
        logged |= self.returns.take(played, self.ranks)
        logged |= {f"time/{name}": value for name, value in seconds.items()}
        logged["time/frames_per_second"] = frames / sum(seconds.values())
        logged["optimizer/lr"] = float(self._torch_optimizer().param_groups[0]["lr"])
        logged["frames"] = float(self.frames)
        if self._is_evaluated():
            logged |= self.ranks.from_first(self._evaluation())
        self._log(logged)

    def _evaluation(self) -> dict[str, float]:
        """How well the actor plays; nothing on a rank that does not evaluate."""
        if self.evaluate is None:
            return {}
        self.actor.eval()
        # As whoever loads the policy will play it.
        with self.products.exact():
            return self.evaluate(self.actor)

    def _log(self, metrics: dict[str, float]) -> None:
        """Hand metrics to callbacks and loggers.

        Lightning's own way takes as long as ten environment steps, and would count optimiser steps instead of iterations.
        """
        self._tell_callbacks(metrics)
        for logger in self.loggers:
            logger.log_metrics(metrics, step=self.iteration - 1)
            logger.save()

    def _tell_callbacks(self, metrics: dict[str, float]) -> None:
        told = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
        self.trainer.callback_metrics.update(told)

    def _latest_metrics(self) -> dict[str, float]:
        """What callbacks see, but for the times, which no two runs have in common."""
        latest = self.trainer.callback_metrics.items()
        return {name: value.item() for name, value in latest if not name.startswith("time/")}

    def _is_evaluated(self) -> bool:
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
        """Continue from :meth:`on_save_checkpoint`; the generators' state is restored when training starts."""
        state = checkpoint["marlkit"]
        self.iteration = state["iteration"]
        self.frames = state["frames"]
        self._metrics = state.get("metrics", {})
        if self.ranks.size > 1 or "ranks" in state:
            self.ranks.load_state_dict(state.get("ranks", ALONE.state_dict()))
        if self.ranks.index > 0:
            state = state["others"][self.ranks.index - 1]
            checkpoint["state_dict"].update(state["buffers"])
        self.returns.load_state_dict(state["returns"])
        self.env.load_state_dict(state["env"])
        self.data.load_state_dict(state["data"])
        self._generators = state["rng"]

    def on_train_start(self) -> None:
        """Restore what callbacks look at, and last the random generators, after everything that may have drawn from them."""
        self.ranks.align(self.parameters())
        self._tell_callbacks(self._metrics)
        if self._generators is not None:
            rng.restore(self._generators)
            self._generators = None


def _differing(buffers: dict[str, Tensor], first: dict[str, Any]) -> dict[str, Tensor]:
    """Those of a rank's ``buffers`` that a checkpoint holds and that are not as on the first rank."""
    return {name: own for name, own in buffers.items() if name in first and not torch.equal(own, first[name].cpu())}


class EpisodeReturns:
    """Undiscounted returns of the episodes that ended during a rollout, averaged over the team's agents."""

    def __init__(self) -> None:
        self.running: Tensor | None = None
        self.steps: Tensor | None = None

    @torch.no_grad()
    def take(self, batch: TensorDictBase, ranks: Ranks = ALONE) -> dict[str, float]:
        """Add a rollout ``[B, T]``; mean return and length of the episodes that ended, on any rank (nothing if none did)."""
        reward = batch[keys.REWARD].mean(-2).squeeze(-1)
        done = batch[keys.DONE].squeeze(-1)
        running = torch.zeros_like(reward[:, 0]) if self.running is None else self.running
        steps = torch.zeros_like(running) if self.steps is None else self.steps
        total, length, count = (torch.zeros((), device=reward.device) for _ in range(3))
        some_end = done.any(0).tolist()
        for now, ended, any_ends in zip(reward.unbind(1), done.unbind(1), some_end, strict=True):
            running, steps = running + now, steps + 1
            if not any_ends:
                continue
            total += running.masked_fill(~ended, 0).sum()
            length += steps.masked_fill(~ended, 0).sum()
            count += ended.sum()
            running, steps = running.masked_fill(ended, 0), steps.masked_fill(ended, 0)
        self.running, self.steps = running, steps
        rewarded = reward.mean()
        ranks.mean_([total, length, count, rewarded])
        logged = {"episode/count": count.item() * ranks.size, "episode/reward": rewarded.item()}
        if count > 0:
            logged |= {"episode/return": (total / count).item(), "episode/length": (length / count).item()}
        return logged

    def state_dict(self) -> dict[str, Tensor | None]:
        """Sums of the running episodes."""
        return {"running": self.running, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        """Continue from :meth:`state_dict`."""
        self.running, self.steps = state["running"], state["steps"]


def _evaluated_again(batch: TensorDictBase) -> Tensor:
    """Time-major indices of the steps of ``batch`` after which an episode was cut, or the batch ended."""
    cut = batch[keys.TRUNCATED].clone()
    cut[:, -1] = True
    return (cut & ~batch[keys.TERMINATED]).transpose(0, 1).flatten().nonzero().squeeze(-1)


def _batch_major(found: dict[keys.Key, Tensor], batch: TensorDictBase) -> dict[keys.Key, Tensor]:
    """What was found of the steps of ``batch`` ``[B, T]`` as time-major rows, in the shape of the batch."""
    return {key: value.unflatten(0, batch.batch_size[::-1]).transpose(0, 1) for key, value in found.items()}


def _shifted(values: Tensor, batch: TensorDictBase) -> Tensor:
    """Time-major ``values`` one step later; zero behind the last step and after a true end."""
    later = torch.zeros_like(values)
    later[: -batch.batch_size[0]] = values[batch.batch_size[0] :]
    # What follows a true end is the first state of another episode.
    ended = batch[keys.TERMINATED].transpose(0, 1).reshape(-1, *[1] * (values.dim() - 1))
    return later.masked_fill_(ended, 0.0)


def refuse_non_finite(batch: TensorDictBase, metrics: Metrics, learner: Learner) -> None:
    """Stop at the first NaN or infinity, in the order in which tensors are made.

    Raises:
        NonFiniteError: names the tensor, the component that wrote it and what to try.
    """
    checks: list[tuple[str, str, Tensor]] = []
    for section in ("env", "actor", "opponents", "critic", "estimator"):
        written = {key: batch.get(key, None) for key in getattr(learner, section).writes}
        checks += [(section, keys.name(key), x) for key, x in written.items() if x is not None and x.is_floating_point()]
    checks += [("update", name, value) for name, value in metrics.items() if value.is_floating_point()]
    checks = [check for check in checks if check[2].numel()]
    # The largest magnitude is as finite as what it is taken of, and one operation takes it of all.
    finite = torch.stack(torch._foreach_norm([value for _, _, value in checks], float("inf"))).isfinite()
    if finite.all():
        return
    section, name, _ = checks[int((~finite).nonzero()[0])]
    component = type(getattr(learner, section)).__name__
    raise NonFiniteError(
        f"iteration {learner.iteration}: `{name}`, written by {section} ({component}), is not finite. Training stopped; the "
        "checkpoints of the run are from before it. Usual causes: a learning rate that is too high, unclipped gradients, "
        "rewards that are very large."
    )
