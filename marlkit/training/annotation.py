"""Annotation: what opponents and critic say of a batch and of the states that follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marlkit import keys
from marlkit.batches import units
from marlkit.component import Actor, Critic, Data, Estimator, Opponents, Targets, Update
from marlkit.learning import RunStep, run_directly

ANNOTATED_ROWS = 16384
"""Rows that a component annotates at a time: bounds memory, and keeps a layer's output within a processor's cache."""


class Annotator:
    """Evaluates opponents and critic on batches, as far as the contracts of the other components read what they write.

    Args:
        actor, opponents, critic, targets: the components that are evaluated.
        data, estimator, update: those that decide what has to be.
        run_step: takes the steps that come again and again.

    Attributes:
        opponents_are_read: whether a component reads what the opponent model writes; it runs only then.
        value_is_read: whether a component reads the critic's value of the present state.
        off_policy: whether batches may hold what another policy than the present one played.
    """

    def __init__(
        self,
        *,
        actor: Actor,
        opponents: Opponents,
        critic: Critic,
        targets: Targets,
        data: Data,
        estimator: Estimator,
        update: Update,
        run_step: RunStep = run_directly,
    ) -> None:
        self.actor = actor
        self.opponents = opponents
        self.critic = critic
        self.targets = targets
        self.run_step = run_step
        self.off_policy = "on_policy" not in data.traits
        read = {*critic.reads, *estimator.reads, *update.reads}
        self._beliefs = tuple(key for key in opponents.writes if key in read)
        self.opponents_are_read = bool(self._beliefs)
        self._critic_reads_beliefs = bool(set(self._beliefs) & set(critic.reads))
        believed = self._beliefs if self._critic_reads_beliefs else ()
        valued = {*critic.reads, *opponents.reads_for(believed)}
        self._policy_is_read = bool(set(actor.writes) & valued)
        self.value_is_read = not self.off_policy or bool({*critic.writes} & {*estimator.reads, *update.reads})
        read |= set(opponents.reads_for(self._beliefs))
        # What was played stays; what the policy says of it now may be another thing than then.
        chosen = [key for key in actor.writes if key[0] != "next"]
        current = [key for key in chosen if key not in (keys.ACTION, keys.LOG_PROB)]
        self.critic_trains_actor = bool(set(current) & set(critic.reads) & keys.WITH_GRADIENT)
        self._next_choice = tuple(key for key in chosen if keys.following(key) in {*estimator.reads, *update.reads})
        # Where no value is written, what carries a gradient is left to the update, which renews it.
        renewed = frozenset() if self.value_is_read else keys.WITH_GRADIENT
        self._refreshed = tuple(current) if self.off_policy and (read & set(current)) - renewed else ()
        self._read_of_steps = self._keys_read_of_steps(estimator, update)

    def wire(self, data: Data) -> None:
        """Tell opponents and data which keys of theirs are read, so that nothing else is written or kept."""
        self.opponents.wanted = frozenset(self._beliefs)
        data.history = self.opponents.history if self.opponents_are_read else 0
        data.shown = self._read_of_steps

    def _keys_read_of_steps(self, estimator: Estimator, update: Update) -> frozenset[keys.Key]:
        """Keys of played steps that a component reads, and those that the learner reads itself."""
        evaluated = {*self.actor.reads, *self.critic.reads}
        evaluated |= set(self.opponents.reads) if self.opponents_are_read else set()
        steps = {*estimator.reads, *update.reads, keys.TERMINATED, *keys.AGENT_ENDS}
        return frozenset(evaluated | steps | {keys.following(key) for key in evaluated})

    @torch.no_grad()
    def __call__(self, batch: TensorDictBase) -> None:
        """Write what opponents and critic say of a batch ``[B, T]`` and of its ``next``.

        On policy, the next state of a step is the state of the step after it, so only the steps after which an episode was cut or
        the batch ended are evaluated again. Off policy every next state is, on actions that the policy chooses anew; and
        the parameters of the policy's distribution become those of the current policy (``ACTION`` and ``LOG_PROB`` stay what was
        played); of the present state only keys that a component reads are written. After a true end every value is zero.

        What estimator or update read of the actor under ``next``, such as the log-probability of a soft value, belongs to the
        action that the next value is bootstrapped with.
        """
        found = self.run_step("annotate", self._annotate_off_policy, batch) if self.off_policy else self._annotate_rollout(batch)
        for key, value in found.items():
            batch.set(key, value)

    def _annotate_rollout(self, batch: TensorDictBase) -> dict[keys.Key, Tensor]:
        """Of consecutive steps that were played by the present policy."""
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
        for key in (*self.critic.writes, *self._next_choice):
            values = found[keys.following(key)] = _shifted(rows[key], batch)
            if following is not None:
                values[index] = following[key]
        return _batch_major(found, batch)

    def _annotate_off_policy(self, batch: TensorDictBase) -> dict[keys.Key, Tensor]:
        """Of steps that need not be consecutive, and may have been played by another policy."""
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
        for key in (*self.critic.writes, *self._next_choice):
            value = following[key]
            found[keys.following(key)] = value.masked_fill(ended.view(-1, *[1] * (value.dim() - 1)), 0)
        return _batch_major(found, batch)

    def _annotate_rows(
        self, rows: TensorDictBase, critic: Critic | None, beliefs: Sequence[keys.Key], *, imagined: bool = False
    ) -> None:
        """Write what the critic reads and says of ``rows``; ``imagined`` ones are states in which no action was taken."""
        wanted = [*(critic.writes if critic else ()), *beliefs, *(self._next_choice if imagined else ())]
        if not wanted:
            return
        blocks = []
        for start in range(0, len(rows), ANNOTATED_ROWS):
            block = rows[start : start + ANNOTATED_ROWS]
            if imagined and (self._policy_is_read or self._next_choice):
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
        chooser = self.targets.chooser() if self.off_policy else self.actor
        chooser.bootstrap(rows)
        if chooser is not self.targets.actor():
            self._encode(rows)

    def _encode(self, rows: TensorDictBase) -> None:
        """Let a critic that lags and reads what the actor owns read it from the actor that lags with it."""
        if self.critic_trains_actor and "lagging" in self.targets.traits:
            self.targets.actor().distribution(rows)


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
    return later.masked_fill_(ended, 0)
