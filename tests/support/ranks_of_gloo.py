"""Two processes that learn from the halves of a batch, and one that learns from the whole; everything random is fixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tensordict import TensorDict
from torch import Tensor, distributed
from torch.multiprocessing.spawn import spawn

from marlkit import keys, rng
from marlkit.nn.distributions import CategoricalTeam, NormalTeam
from marlkit.ranks import Ranks
from marlkit.recipe import Recipe, load_recipe
from marlkit.spec import TeamSpec
from marlkit.training.assembly import LEARNING_SECTIONS, build, build_environment
from marlkit.training.learner import Learner

SIZE = 2
SEED = 5
ROUNDS = 2

SMALL = [
    "env.num_envs=8", "env.max_steps=5", "actor.hidden=[8]", "actor.embedding=8", "critic.hidden=[8]", "critic.embedding=8",
    "opponents.hidden=[8]", "opponents.memory=4", "opponents.fit_rows=1000", "opponents.every=1",
    "data.steps=7", "data.batch_size=40", "data.updates=1", "data.capacity=80", "data.warm_up=0",
    "update.epochs=2", "update.minibatch_size=null", "update.critic_epochs=null",
    "update.step.epochs=2", "update.step.minibatch_size=null", "update.step.critic_epochs=null",
    "update.interval_mean=2", "update.interval_std=1", "update.extra_edges=0.5", "trainer.video=false",
]  # fmt: skip


def tiny(words: str) -> Recipe:
    """A shipped recipe with options behind its name, small, of which every minibatch is the whole batch."""
    name, *options = words.split()
    entries = load_recipe(name).entries
    split = [(text, *text.partition("=")[0].rpartition(".")[::2]) for text in SMALL]
    able = [text for text, path, option in split if path in entries and option in entries[path].options]
    return load_recipe(name, [*able, *options])


class WithStream(Ranks):
    """A single rank that makes the common draws of several."""

    @contextmanager
    def common(self) -> Iterator[None]:
        self.size = SIZE
        try:
            with super().common():
                yield
        finally:
            self.size = 1


def learner_of(recipe: Recipe, spec: TeamSpec, ranks: Ranks) -> Learner:
    """A learner in double precision, without environment and trainer."""
    rng.seed_all(SEED)
    parts = {section: build(recipe, section, spec) for section in LEARNING_SECTIONS}
    learner = Learner(env=SimpleNamespace(spec=spec, device=torch.device("cpu"), writes=()), iterations=4, **parts).double()  # type: ignore[arg-type]
    optimizer = learner.configure_optimizers()
    for name, function in {"optimizers": lambda **_: optimizer, "manual_backward": Tensor.backward, "ranks": ranks}.items():
        object.__setattr__(learner, name, function)
    return learner


def played(recipe: Recipe) -> tuple[TensorDict, TeamSpec]:
    """A batch to learn from, of which unequally many agents are alive in its two halves."""
    env = build_environment(recipe, torch.device("cpu"), SEED)
    learner = learner_of(recipe, env.spec, Ranks()).float()
    batch = next(learner.data.batches(learner.data.collect(env, learner.actor), learner.actor)).clone()
    share = torch.linspace(0.9, 0.2, len(batch)).reshape(-1, 1, 1, 1)
    if keys.ALIVE in batch.keys(include_nested=True):  # replay keeps what is read
        batch[keys.ALIVE] = torch.rand(batch[keys.ALIVE].shape) < share
        batch[keys.following(keys.ALIVE)] = batch[keys.ALIVE]
    return batch.apply(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor), env.spec


def learnt(recipe: Recipe, spec: TeamSpec, batch: TensorDict, ranks: Ranks) -> dict[str, Any]:
    """Parameters and statistics after some updates, where no row's random numbers depend on other rows."""
    fixed: list[AbstractContextManager[Any]] = [
        mock.patch.object(torch, "randint", lambda high, size, **_: torch.zeros(size, dtype=torch.int64)),
        mock.patch.object(torch, "rand_like", lambda tensor: torch.full_like(tensor, 0.5)),
        mock.patch.object(torch, "randn_like", lambda tensor: torch.full_like(tensor, 0.5)),
        mock.patch.object(NormalTeam, "sample", lambda self: self.loc.detach()),
        mock.patch.object(CategoricalTeam, "sample", lambda self: self.mode()),
    ]
    learner = learner_of(recipe, spec, ranks)
    if hasattr(learner.opponents, "latest"):
        learner.opponents.latest.record(batch)  # type: ignore[union-attr, operator]
    with ExitStack() as stack:
        for patch in fixed:
            stack.enter_context(patch)
        for _ in range(ROUNDS):
            rows = batch.clone()
            learner.actor.eval()
            learner.estimator.observe(rows, ranks)
            learner.annotate(rows)
            learner.estimator(rows)
            learner.actor.train()
            learner.learn(rows)
    own = ("opponents.latest",)
    return {name: value for name, value in learner.state_dict().items() if not name.startswith(own)}


def half(batch: TensorDict, rank: int) -> TensorDict:
    """The rows of a rank."""
    count = len(batch) // SIZE
    return batch[rank * count : (rank + 1) * count].clone()


def ranks_run(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(ranks, *arguments)`` returns on each of two ranks of a gloo group."""
    spawn(_work, (function, str(folder), arguments), nprocs=SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(SIZE)]


def _work(rank: int, function: Callable[..., Any], folder: str, arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    # Ranks that wait for different things shall fail, not hang.
    patience = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=SIZE, timeout=patience)
    ranks = Ranks(SEED)
    ranks.join()
    torch.save(function(ranks, *arguments), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def learn_all(ranks: Ranks, names: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """What each recipe has learnt on this rank."""
    found = {}
    for name in names:
        batch, spec = torch.load(folder / f"{name}.batch", weights_only=False)
        ranks.__init__(SEED)  # type: ignore[misc]
        ranks.join()
        found[name] = learnt(tiny(name), spec, half(batch, ranks.index), ranks)
    return found
