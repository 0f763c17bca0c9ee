"""Off-policy replay: batches drawn from stored steps (Lin 1992; Lowe et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Actor, Data, Environment
from marlkit.contract import Contract, When
from marlkit.data._recent_past import PAST, write_recent
from marlkit.data.rollout import RolloutData, bytes_of_step
from marlkit.errors import CheckpointError, OptionError
from marlkit.functional.history import ring_slot
from marlkit.learning import RunStep, run_directly
from marlkit.options import NonNegativeInt, PositiveInt
from marlkit.saved import MAPPING, TENSOR, Kind, refuse_misfit
from marlkit.spec import TeamSpec


class ReplayData(Data):
    """Plays ``steps`` joint steps per environment and draws ``updates`` batches of stored steps.

    Of every step the keys that a component reads are stored, with the log-probability under the policy that played it, its hidden
    state, and the next state before any reset. It is overwritten after ``capacity // num_envs`` further steps of
    its environment. Draws are uniform, with replacement. Actors without memory learn from single steps, ``[batch_size, 1]``;
    recurrent ones from sequences of consecutive steps, ``[batch_size // L, L]``, which may continue after the end of an
    episode. The recent past (``RECENT_*``) is written if a component reads it, as far back as it is still stored. If one reads
    them, the parameters of the distributions that were played from (``BEHAVIOUR_*``) are stored too: they tell how likely any
    other action was.

    A checkpoint holds all stored steps, so that its size grows with ``capacity``.

    Args:
        spec: the team.
        steps: joint steps that each environment plays per iteration.
        capacity: joint steps stored, over all environments; 5e4 to 1e6.
        batch_size: joint steps per batch; 128 to 1024.
        updates: batches per iteration.
        warm_up: joint steps played before the first batch.

    Raises:
        OptionError: ``warm_up`` is larger than ``capacity``; see also :meth:`refuse_unfit`.
    """

    contract = Contract(
        writes=(
            *(keys.RECENT_OBSERVATION, keys.RECENT_ACTION, keys.RECENT_VALID),
            When("discrete", (keys.BEHAVIOUR_LOGITS,)),
            When("continuous", (keys.BEHAVIOUR_LOC, keys.BEHAVIOUR_SCALE)),
        ),
        at_most={
            "warm_up": ("data.capacity", "env.num_envs * data.steps * trainer.iterations"),
            "batch_size": ("data.capacity",),
        },
    )

    def __init__(
        self,
        spec: TeamSpec,
        *,
        steps: PositiveInt = 10,
        capacity: PositiveInt = 100_000,
        batch_size: PositiveInt = 1024,
        updates: PositiveInt = 1,
        warm_up: NonNegativeInt = 1000,
    ) -> None:
        if warm_up > capacity:
            raise OptionError("warm_up", f"must be at most the capacity, {capacity}, got {warm_up}")
        self.spec = spec
        self.capacity = capacity
        self.batch_size = batch_size
        self.updates = updates
        self.warm_up = warm_up
        self._player = RolloutData(spec, steps=steps)
        self._storage: TensorDict | None = None
        self._shown: TensorDict
        self._past: TensorDict
        self._position = 0
        self._filled = 0

    def collect(self, env: Environment, actor: Actor, run_step: RunStep = run_directly) -> TensorDict:
        """Play and store the steps of this iteration, batch ``[B, T]``; the next call overwrites it."""
        self._refuse_unfit_capacity(env.num_envs, actor.sequence_length or 1)
        self._player.inspect, self._player.shown = self.inspect, self.shown
        played = self._player.collect(env, actor, run_step)
        # Batches show the parameters of the current policy's distribution, not those of the one that played.
        carried = {*actor.carried, *map(keys.following, actor.carried)}
        forgotten = set(actor.writes) - {keys.ACTION, keys.LOG_PROB} - carried
        kept = self._kept(played.exclude(*forgotten)).transpose(0, 1)
        storage = self._allocate(kept) if self._storage is None else self._storage
        slots = torch.arange(self._position, self._position + len(kept), device=kept[keys.IS_FIRST].device) % len(storage)
        storage[slots] = kept
        self._position = (self._position + len(kept)) % len(storage)
        self._filled = min(self._filled + len(kept), len(storage))
        return played

    def batches(self, played: TensorDict, actor: Actor) -> Iterator[TensorDict]:
        """Batches ``[batch_size, 1]`` or ``[batch_size // L, L]`` of stored steps; none before ``warm_up`` joint steps."""
        length = actor.sequence_length or 1
        envs = played.batch_size[0]
        if self._filled * envs >= self.warm_up and self._filled >= length:
            for _ in range(self.updates):
                yield self._draw(length)

    def held_bytes(self, envs: int, played: TensorDict) -> int:
        """Bytes of the stored steps and of a rollout of ``envs`` environments, judged by ``played`` ``[B, T]``."""
        return self._player.held_bytes(envs, played) + self.capacity * bytes_of_step(self._kept(played))

    @classmethod
    def brief(cls, steps: int) -> dict[str, Any]:
        """Options of a short rollout, all of which fits into one batch."""
        return {"steps": steps, "capacity": 2 * steps, "batch_size": 2 * steps, "updates": 1, "warm_up": 0}

    def refuse_unfit(self, envs: int, iterations: int, sequence_length: int | None) -> None:
        """Refuse a capacity below a rollout or a sequence, a warm-up beyond the training, a batch shorter than a sequence."""
        self._refuse_unfit_capacity(envs, sequence_length or 1)
        played = iterations * self._player.steps * envs
        if self.warm_up > played:
            message = f"must be at most {played}, all joint steps of {iterations} iterations: nothing is learnt before"
            raise OptionError("warm_up", message)
        if sequence_length is not None and sequence_length > self.batch_size:
            raise OptionError(
                "sequence_length",
                f"must be at most data.batch_size, the {self.batch_size} steps of a batch, got {sequence_length}",
            )

    def state_dict(self) -> dict[str, Any]:
        """The stored steps, the slot that is written next, and the state of the rollout."""
        state: dict[str, Any] = {"player": self._player.state_dict()}
        if self._storage is not None:
            # Copied, so that later steps do not change it.
            kept = self._storage[: self._filled].apply(lambda tensor: tensor.to("cpu", copy=True))
            state |= {"kept": kept.to_dict(), "position": self._position}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        refuse_misfit(state, {"player": MAPPING}, "state", exact=False)
        self._player.load_state_dict(state["player"])
        self._storage, self._position, self._filled = None, 0, 0
        if "kept" in state:
            refuse_misfit(state, {"player": {"current": MAPPING}, "kept": {keys.IS_FIRST: TENSOR}}, "state", exact=False)
            device = state["player"]["current"][keys.IS_FIRST].device
            kept = TensorDict(state["kept"], batch_size=state["kept"][keys.IS_FIRST].shape[:2])
            kept = self._kept(kept)
            self._refuse_without_behaviour(kept)
            filled, slots = len(kept), self.capacity // kept.batch_size[1]
            # What is not full yet has been filled from the first slot on.
            possible = range(slots) if filled == slots else range(filled, filled + 1)
            words = f"a slot, {possible[0]} to {possible[-1]}"
            refuse_misfit(state.get("position"), Kind(words, lambda value: type(value) is int and value in possible), "position")
            if filled > slots:
                raise CheckpointError(f"`kept` holds {filled} steps of each environment, more than the {slots} that are stored.")
            self._allocate(kept[:0].to(device))[:filled] = kept.to(device)
            self._position, self._filled = state["position"], filled

    def _refuse_without_behaviour(self, kept: TensorDict) -> None:
        self._player.shown = self.shown
        missing = [keys.name(key) for key in self._player.behaviour_read() if key not in kept.keys(include_nested=True)]
        if missing:
            raise CheckpointError(
                f"`kept` holds no {', '.join(missing)}, which a component reads: its steps were stored by an earlier marlkit, "
                "which kept of the policies that played only the log-probabilities. Such a run cannot go on; train anew."
            )

    def _kept(self, steps: TensorDict) -> TensorDict:
        """The keys of each step that a component reads, directly or as the recent past of another step."""
        if self.shown is None:
            return steps
        return steps.select(*self.shown, *PAST, strict=False)

    def _allocate(self, steps: TensorDict) -> TensorDict:
        # Time-major, as rollouts are.
        envs = steps.batch_size[1]
        self._storage = steps.new_empty((self.capacity // envs, envs))
        self._shown = self._storage if self.shown is None else self._storage.select(*self.shown, strict=False)
        self._past = self._storage.select(*PAST)
        return self._storage

    def _draw(self, length: int) -> TensorDict:
        assert self._storage is not None
        capacity, envs = self._storage.batch_size
        count, device = self.batch_size // length, self._storage[keys.IS_FIRST].device
        drawn = torch.randint((self._filled - length + 1) * envs, (count,), device=device)
        first, env = drawn // envs, drawn % envs
        order = first + torch.arange(-self.history, length, device=device).unsqueeze(-1)
        index = ring_slot(order, position=self._position, filled=self._filled, capacity=capacity) * envs + env
        batch = _taken(self._shown, index[self.history :], transposed=True)
        if self.history:
            steps = _taken(self._past, index)
            write_recent(batch, steps, (self.history - first).clamp(min=0), self.history)
        return batch

    def _refuse_unfit_capacity(self, envs: int, sequence_length: int) -> None:
        each = self.capacity // envs
        needed = max(self._player.steps, sequence_length)
        if each < needed:
            what = "a sequence has" if sequence_length == needed else "an iteration plays"
            raise OptionError(
                "capacity",
                f"{self.capacity} joint steps are {each} of each of {envs} environments, fewer than the {needed} that {what}; "
                f"set data.capacity={needed * envs} or more",
            )
        if each * envs < self.warm_up:
            raise OptionError("warm_up", f"must be at most {each * envs}, the {each} steps kept of each of {envs} environments")


def _taken(stored: TensorDict, index: Tensor, *, transposed: bool = False) -> TensorDict:
    """The steps ``slot * B + environment`` of ``index`` ``[L, R]`` from ``[C, B]``: ``[L, R]``, or ``[R, L]`` if transposed."""
    flat, size = index.flatten(), index.T.shape if transposed else index.shape

    def take(kept: Tensor) -> Tensor:
        taken = kept.flatten(0, 1).index_select(0, flat).view(*index.shape, *kept.shape[2:])
        return taken.transpose(0, 1) if transposed else taken

    # Indexing and transposing the TensorDict is several times slower, and `apply` a third.
    found = TensorDict(batch_size=size)
    for key, kept in stored.items(include_nested=True, leaves_only=True):
        found.set(key, take(kept))
    return found
