"""Rules for estimators."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys
from marlkit.component import Estimator
from marlkit.keys import Key
from marlkit.testing.batches import batch_for, leaves
from marlkit.testing.rules import close, needs_of, require, rule

END = 2
"""The step of :func:`_rollout` after which one environment's episode is over."""

ENDS = (keys.TERMINATED, keys.TRUNCATED, keys.DONE)


def _rollout(estimator: Estimator, end: Key | None) -> TensorDict:
    """A batch ``[2, 6]`` without an end but ``end`` at step :data:`END` of the first environment."""
    batch = batch_for(estimator, (2, 6))
    for key in set(ENDS) & leaves(batch):
        ended = torch.zeros_like(batch[key])
        ended[0, END] = key in (end, keys.DONE) and end is not None
        batch.set(key, ended)
    return batch


def _outputs(estimator: Estimator, batch: TensorDict) -> dict[Key, Tensor]:
    written = estimator(batch.clone())
    return {key: written[key] for key in estimator.writes}


def _moved(batch: TensorDict, where: tuple[int | slice, ...], only_next: bool = False) -> TensorDict:
    """Other numbers in some steps of a batch; ``only_next``: in the values of the next state."""
    moved = batch.clone()
    for key in leaves(batch):
        if batch[key].is_floating_point() and (not only_next or (key[0] == "next" and key != keys.REWARD)):
            moved[key][where] += 1.0
    return moved


@rule("estimator")
def gives_no_gradient(estimator: Estimator) -> None:
    """Value targets and advantages are constants: they carry no gradient, even if rewards or values do."""
    batch = batch_for(estimator, (2, 6))
    for key in leaves(batch):
        if batch[key].is_floating_point():
            batch[key].requires_grad_()
    with torch.enable_grad():
        written = estimator(batch)
    for key in estimator.writes:
        kept = not written[key].requires_grad
        require(kept, f"writes `{keys.name(key)}` with gradient", "Decorate `forward` with `@torch.no_grad()`.")


@rule("estimator")
def stops_at_the_end_of_an_episode(estimator: Estimator) -> None:
    """What comes after the end of an episode, terminated or truncated, changes nothing before it."""
    for end in (keys.TERMINATED, keys.TRUNCATED):
        batch = _rollout(estimator, end)
        wanted, found = (_outputs(estimator, rows) for rows in (batch, _moved(batch, (0, slice(END + 1, None)))))
        for key, value in wanted.items():
            problem = f"lets the steps after an episode is {keys.name(end).split('.')[-1]} into `{keys.name(key)}` before it"
            remedy = "Multiply what comes from the step after by `1 - done`."
            require(close(found[key][0, : END + 1], value[0, : END + 1]), problem, remedy)


@rule("estimator")
def bootstraps_a_cut_and_no_true_end(estimator: Estimator) -> None:
    """After a truncation the value of the next state counts; after a true end it does not."""
    after = [key for key in estimator.reads if key[0] == "next" and key not in (keys.REWARD, *ENDS)]
    for end, counts in ((keys.TERMINATED, False), (keys.TRUNCATED, True)) if after else ():
        batch = _rollout(estimator, end)
        wanted, found = (_outputs(estimator, rows) for rows in (batch, _moved(batch, (0, END), only_next=True)))
        bootstrapped = [key for key, value in wanted.items() if not close(found[key][0, : END + 1], value[0, : END + 1])]
        if counts:
            remedy = "Multiply the value of the next state by `1 - terminated`, not by `1 - done`."
            require(bool(bootstrapped), "does not bootstrap where an episode was truncated", remedy)
        else:
            names = ", ".join(map(keys.name, bootstrapped))
            remedy = "Multiply the value of the next state by `1 - terminated`."
            require(not bootstrapped, f"bootstraps `{names}` where an episode was terminated", remedy)


@rule("estimator")
def estimates_each_environment_by_itself(estimator: Estimator) -> None:
    """What happens in one environment changes nothing in another, and a single step is a rollout too."""
    batch = _rollout(estimator, keys.TRUNCATED)
    wanted, found = (_outputs(estimator, rows) for rows in (batch, _moved(batch, (0,))))
    alone = _outputs(estimator, batch[1:])
    for key, value in wanted.items():
        problem = f"lets another environment into `{keys.name(key)}`"
        require(close(found[key][1], value[1]) and close(alone[key][0], value[1]), problem, "Sum over time alone, axis 1.")
    _outputs(estimator, batch[:, :1])


@rule("estimator")
def pays_for_reward(estimator: Estimator) -> None:
    """A larger reward of all agents raises the value target of its step, and lowers no value target and no advantage."""
    if keys.REWARD not in estimator.reads:
        return
    batch = _rollout(estimator, None)
    richer = batch.clone()
    richer[keys.REWARD][:, END] += 1.0
    wanted, found = _outputs(estimator, batch), _outputs(estimator, richer)
    for key in {keys.ADVANTAGE, keys.VALUE_TARGET} & wanted.keys():
        lowered = bool((found[key] < wanted[key] - 1e-5).any())
        require(not lowered, f"lowers `{keys.name(key)}` where rewards are larger", "Add rewards; subtract baselines.")
    if keys.VALUE_TARGET in wanted:
        raised = bool((found[keys.VALUE_TARGET][:, END] > wanted[keys.VALUE_TARGET][:, END] + 1e-5).all())
        remedy = "A return begins with the reward of its own step, in full."
        require(raised, "gives the same `agents.value_target` whatever the reward of its step is", remedy)


@rule("estimator")
def takes_steps_in_any_order_unless_it_needs_a_rollout(estimator: Estimator) -> None:
    """An estimator that does not need `on_policy` data takes each step by itself: those of a replay need not follow."""
    if "on_policy" in needs_of(estimator).get("data", ()):
        return
    batch = _rollout(estimator, None)
    wanted, found = (_outputs(estimator, rows) for rows in (batch, _moved(batch, (slice(None), 3))))
    for key, value in wanted.items():
        same = close(found[key][:, :3], value[:, :3]) and close(found[key][:, 4:], value[:, 4:])
        remedy = 'Declare `needs={"data": ("on_policy",)}`.'
        require(same, f"lets other steps into `{keys.name(key)}`, although steps need not follow each other", remedy)
