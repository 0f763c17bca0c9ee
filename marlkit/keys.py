"""Every TensorDict key of marlkit, with its shape and meaning.

Agents are stacked on one axis ``N`` and nested under ``"agents"`` (TorchRL's convention). A shape names the dimensions that
follow the batch dimensions (``[B, T]`` for a rollout): ``N`` agents, ``O`` observation features, ``S`` state features, ``A``
discrete actions, ``D`` action dimensions, ``H`` hidden features of a recurrent actor, ``E`` features of an encoded agent, ``V``
modelling agents: N, or 1 where all have equal beliefs, ``M`` steps of the recent past. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

Key = str | tuple[str, ...]


def following(key: Key) -> Key:
    """The same quantity at the next step, before any reset: ``("next", *key)``."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def current(key: Key) -> Key:
    """The key at the current step of which ``key`` is the next-step key; other keys are returned unchanged.

    ``REWARD``, ``TERMINATED``, ``TRUNCATED``, ``DONE`` and ``AGENT_ENDS`` stand under ``next`` but belong to the current step.
    """
    if isinstance(key, tuple) and key[0] == "next" and key not in TABLE:
        return key[1] if len(key) == 2 else key[1:]
    return key


OBSERVATION = ("agents", "observation")
STATE = "state"
ACTION_MASK = ("agents", "action_mask")
ACTION_DIMS = ("agents", "action_dims")
ALIVE = ("agents", "alive")
IS_FIRST = "is_first"

ACTION = ("agents", "action")
LOG_PROB = ("agents", "log_prob")
LOGITS = ("agents", "logits")
LOC = ("agents", "loc")
SCALE = ("agents", "scale")
HIDDEN = ("agents", "hidden")
ENCODING = ("agents", "encoding")
TEMPERATURE = ("agents", "temperature")

REWARD = ("next", "agents", "reward")
TERMINATED = ("next", "terminated")
TRUNCATED = ("next", "truncated")
DONE = ("next", "done")
AGENT_TERMINATED = ("next", "agents", "terminated")
AGENT_DONE = ("next", "agents", "done")

STATE_VALUE = ("agents", "state_value")
ACTION_VALUE = ("agents", "action_value")
ACTION_VALUES = ("agents", "action_values")
EXECUTED_VALUE = ("agents", "executed_value")
ADVANTAGE = ("agents", "advantage")
VALUE_TARGET = ("agents", "value_target")

OPPONENT_LOGITS = ("opponents", "logits")
OPPONENT_LOC = ("opponents", "loc")
OPPONENT_SCALE = ("opponents", "scale")
SAMPLE_SEED = ("opponents", "sample_seed")
JOINT_ACTION = ("opponents", "action")

BEHAVIOUR_LOGITS = ("behaviour", "logits")
BEHAVIOUR_LOC = ("behaviour", "loc")
BEHAVIOUR_SCALE = ("behaviour", "scale")

RECENT_OBSERVATION = ("recent", "observation")
RECENT_ACTION = ("recent", "action")
RECENT_VALID = ("recent", "valid")


@dataclass(frozen=True)
class KeyInfo:
    """Shape after the batch dimensions, element type and meaning of a key.

    ``continuous`` is the shape where actions are continuous and it differs (``None``: the same shape).
    """

    shape: str
    dtype: str
    meaning: str
    continuous: str | None = None

    def dimensions(self, *, discrete: bool) -> tuple[str, ...]:
        """The named dimensions, such as ``("N", "A")``; a literal ``"1"`` stands for a size of one."""
        shape = self.shape if discrete or self.continuous is None else self.continuous
        return tuple(shape.split())


TABLE: dict[Key, KeyInfo] = {
    OBSERVATION: KeyInfo("N O", "float32", "observation of each agent, padded with zeros to the longest"),
    STATE: KeyInfo("S", "float32", "global state; the joint observation where the environment has none"),
    ACTION_MASK: KeyInfo("N A", "bool", "discrete actions that are available"),
    ACTION_DIMS: KeyInfo("N D", "bool", "continuous action dimensions that the agent has (not padding)"),
    ALIVE: KeyInfo(
        "N 1",
        "bool",
        "agents that take part; others do not train policies and beliefs, but count in the critic's regression",
    ),
    IS_FIRST: KeyInfo("1", "bool", "first step of an episode: recurrent actors start from a zero hidden state"),
    ACTION: KeyInfo("N", "int64", "action taken, in the units of the environment", continuous="N D"),
    LOG_PROB: KeyInfo("N 1", "float32", "log-probability of the action per agent, summed over action dimensions only"),
    LOGITS: KeyInfo("N A", "float32", "unnormalised log-probabilities; unavailable actions hold -1e10"),
    LOC: KeyInfo("N D", "float32", "mean of the normal distribution of the action"),
    SCALE: KeyInfo("N D", "float32", "standard deviation of the normal distribution of the action"),
    TEMPERATURE: KeyInfo("N 1", "float32", "weight of the entropy in soft values, fixed or learnt; the actor's; no gradient"),
    HIDDEN: KeyInfo("N H", "float32", "hidden state of a recurrent actor before this step"),
    REWARD: KeyInfo("N 1", "float32", "reward of the step; the team's where the environment pools it"),
    TERMINATED: KeyInfo("1", "bool", "the episode truly ended: no bootstrap"),
    TRUNCATED: KeyInfo("1", "bool", "the episode was cut, by a time limit for instance: the value of `next` is bootstrapped"),
    DONE: KeyInfo("1", "bool", "terminated or truncated"),
    AGENT_TERMINATED: KeyInfo(
        "N 1", "bool", "the episode of the agent truly ended, now or before; absent: as `terminated` for all"
    ),
    AGENT_DONE: KeyInfo("N 1", "bool", "the episode of the agent ended in any way, now or before; absent: as `done` for all"),
    STATE_VALUE: KeyInfo("N 1", "float32", "baseline of agent i; may depend on others' actions, never on its own"),
    ACTION_VALUE: KeyInfo("N 1", "float32", "Q of the action taken"),
    ACTION_VALUES: KeyInfo("N A", "float32", "Q of each own action, others' actions held"),
    EXECUTED_VALUE: KeyInfo("N 1", "float32", "value given what the others executed, which no sample of their actions enters"),
    ADVANTAGE: KeyInfo("N 1", "float32", "value of the action minus the baseline; no gradient"),
    VALUE_TARGET: KeyInfo("N 1", "float32", "regression target of the critic; no gradient"),
    OPPONENT_LOGITS: KeyInfo("V N A", "float32", "belief of agent i (axis -3) about the logits of agent j (axis -2)"),
    OPPONENT_LOC: KeyInfo("V N D", "float32", "belief of agent i about the action mean of agent j"),
    OPPONENT_SCALE: KeyInfo("V N D", "float32", "belief of agent i about the action deviation of agent j"),
    ENCODING: KeyInfo("N E", "float32", "features of each agent from all agents' observations; with gradient during an update"),
    SAMPLE_SEED: KeyInfo("1", "int64", "seed of the opponents' action samples here; fixed for one iteration"),
    JOINT_ACTION: KeyInfo(
        "V N", "int64", "joint action in the view of agent i: own as chosen, others' known or believed", continuous="V N D"
    ),
    BEHAVIOUR_LOGITS: KeyInfo("N A", "float32", "`agents.logits` of the policy that played, which a batch of older steps keeps"),
    BEHAVIOUR_LOC: KeyInfo("N D", "float32", "`agents.loc` of the policy that played"),
    BEHAVIOUR_SCALE: KeyInfo("N D", "float32", "`agents.scale` of the policy that played"),
    RECENT_OBSERVATION: KeyInfo("M N O", "float32", "observations of the last M steps before this one, oldest first"),
    RECENT_ACTION: KeyInfo("M N", "int64", "actions of the last M steps before this one, oldest first", continuous="M N D"),
    RECENT_VALID: KeyInfo("M", "bool", "whether that step belongs to the running episode"),
}
"""All keys at the current step. ``following(key)`` of any of them has the same shape and meaning at the next step."""


BEHAVIOUR: dict[Key, Key] = {LOGITS: BEHAVIOUR_LOGITS, LOC: BEHAVIOUR_LOC, SCALE: BEHAVIOUR_SCALE}
"""Where the parameters of the distribution that an action was played from stand, beside those of the present policy."""

WITH_GRADIENT = frozenset({ENCODING, ACTION_VALUES})
"""Keys that an actor may own: :meth:`marlkit.component.Actor.distribution` renews those that it writes on a batch, with gradient,
so that the loss of a critic that reads them trains the actor too."""

AGENT_ENDS = (AGENT_TERMINATED, AGENT_DONE)
"""The agents' own ends. No contract declares them: environments whose agents may end before the episode does write them, and who
reads them takes the ends of the episode where they are absent."""


def describe(key: Key) -> KeyInfo:
    """Shape and meaning of ``key``, or of the key that it follows.

    Raises:
        KeyError: the key is not in :data:`TABLE`.
    """
    if current(key) in TABLE:
        return TABLE[current(key)]
    raise KeyError(f"{key!r} is not a key of marlkit; the keys are listed in marlkit/keys.py")


def name(key: Key) -> str:
    """A key as text: ``agents.observation``."""
    return key if isinstance(key, str) else ".".join(key)
