"""What breaks while it is played is named, before anything keeps it or learns from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from meeting import DISCRETE, MEETING, broken_at, replaced
from scripted import fit, learner_of
from small_runs import small
from tensordict import TensorDict

from marlkit import keys, run
from marlkit.actors.deterministic import DeterministicActor
from marlkit.actors.stochastic import StochasticActor
from marlkit.cli import main
from marlkit.component import Data
from marlkit.data.replay import ReplayData
from marlkit.data.rollout import RolloutData
from marlkit.envs.product_game import ProductGameEnvironment
from marlkit.errors import MarlkitError, NonFiniteError, RuleError
from marlkit.estimators.one_step import OneStepEstimator
from marlkit.recipe import load_recipe
from marlkit.run.checkpoint_io import load_checkpoint
from marlkit.run.checkpoints import LAST
from marlkit.run.metrics_file import read_metrics
from marlkit.training.dry_run import dry_run
from marlkit.training.evaluation import play_episodes
from marlkit.training.learner import Learner

NAN, INF = math.nan, math.inf


def learner(env: Any, data: Data | None = None, steps: int = 4) -> Learner:
    torch.manual_seed(0)
    actor = StochasticActor(env.spec, hidden=[4])
    estimator = OneStepEstimator(env.spec)
    return learner_of(env, actor, data=data or RolloutData(env.spec, steps=steps), estimator=estimator)


def replay(env: Any) -> ReplayData:
    return ReplayData(env.spec, steps=4, capacity=300, batch_size=8, warm_up=0)


def put(step: TensorDict, key: keys.Key, value: float, index: Any = (1, 0)) -> None:
    """Write a value to a copy, so that nothing else is changed."""
    changed = step[key].clone()
    changed[index] = value
    step.set(key, changed)


# --- values that are not finite ----------------------------------------------------------------------------------------------

REWARD, OBSERVATION, STATE = keys.REWARD[1:], keys.OBSERVATION, keys.STATE
SPOILT: dict[str, tuple[keys.Key, str, str]] = {
    "reward": (REWARD, "arrived", "next.agents.reward"),
    "observation": (OBSERVATION, "both", "next.agents.observation"),
    "state": (STATE, "both", "next.state"),
    "only before a reset": (OBSERVATION, "arrived", "next.agents.observation"),
    "only where the next step starts": (OBSERVATION, "current", "agents.observation"),
}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", SPOILT)
@pytest.mark.parametrize("kept", [False, True], ids=["rollout", "replay"])
@pytest.mark.parametrize("at", [6, 8], ids=["within a rollout", "at its end"])
def test_it_is_named_and_neither_kept_nor_learnt_from(name: str, value: float, kept: bool, at: int) -> None:
    key, where, says = SPOILT[name]

    def breaks(arrived: TensorDict, current: TensorDict) -> None:
        for what, step in {"arrived": arrived, "current": current}.items():
            if where in (what, "both"):
                put(step, key, value)

    env = broken_at(at, breaks)
    system = learner(env, replay(env) if kept else None)
    fit(system, 1)
    parameters = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    before = system.data.state_dict()
    with pytest.raises(NonFiniteError) as caught:
        fit(system, 2)
    said = str(caught.value)
    assert said.startswith(f"iteration 1: `{says}`, written by env (BrokenEnvironment), is not finite in step ")
    assert "of environment 1. Training stopped before anything was learnt from it" in said
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in system.state_dict().items())
    if kept:
        after = system.data.state_dict()
        assert (TensorDict(after["kept"]) == TensorDict(before["kept"])).all()
        assert after["position"] == before["position"]


def test_the_first_is_named_and_not_what_follows_from_it() -> None:
    """The actor's action becomes NaN from an observation, and the next observation from the action."""

    def breaks(arrived: TensorDict, current: TensorDict) -> None:
        put(current, OBSERVATION, NAN)

    with pytest.raises(NonFiniteError, match=r"`agents.observation`, written by env \(BrokenEnvironment\), .* in step 2 of"):
        fit(learner(broken_at(2, breaks)), 1)


def test_an_actor_that_chooses_nan_is_named_although_the_environment_follows() -> None:
    env = broken_at(99, lambda arrived, current: None)
    system = learner(env)
    fit(system, 1)
    with torch.no_grad():
        next(system.actor.parameters()).fill_(NAN)
    with pytest.raises(NonFiniteError, match=r"written by actor \(StochasticActor\), is not finite in step 0 .*learning rate"):
        fit(system, 2)


def test_an_evaluation_that_is_not_finite_is_refused() -> None:
    env = broken_at(2, lambda arrived, current: put(arrived, REWARD, NAN))
    with pytest.raises(NonFiniteError, match=r"the returns in env \(BrokenEnvironment\) are not finite"):
        play_episodes(env, StochasticActor(env.spec, hidden=[4]), seed=0, steps=6)


@pytest.mark.parametrize("recipe", ["maddpg", "f2a2_ddpg"])
def test_the_last_checkpoint_is_clean_and_the_run_goes_on(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, count = ProductGameEnvironment.step, {"now": 0}

    def once(self: ProductGameEnvironment, action: torch.Tensor) -> Any:
        arrived, current = step(self, action)
        count["now"] += self.num_envs == 4
        if count["now"] == 25:  # in the third iteration
            put(arrived, REWARD, INF)
        return arrived, current

    monkeypatch.setattr(ProductGameEnvironment, "step", once)
    sizes = [size for size in small(recipe) if not size.startswith("env.")]
    with pytest.raises(NonFiniteError, match=r"iteration 2: `next.agents.reward`, written by env \(ProductGameEnvironment\)"):
        run.train(load_recipe(recipe, ["env={type: product_game, num_envs: 4}", *sizes]), tmp_path, progress=False)
    (folder,) = (tmp_path / recipe).iterdir()
    saved = load_checkpoint(folder / "checkpoints" / LAST)["marlkit"]
    assert saved["iteration"] == 2
    assert all(
        tensor.isfinite().all() for tensor in TensorDict(saved["data"]["kept"]).values(True, True) if tensor.is_floating_point()
    )
    run.resume(folder, progress=False)
    metrics = read_metrics(folder / "metrics.csv")
    assert metrics["iteration"] == [0, 1, 2, 3]
    assert all(math.isfinite(value) for value in metrics["episode/reward"])


# --- forms and rules that are broken later -----------------------------------------------------------------------------------


def reshaped(key: keys.Key, change: Any, both: bool = True) -> Any:
    def breaks(arrived: TensorDict, current: TensorDict) -> None:
        for step in (arrived, current) if both else (arrived,):
            step.set(key, change(step[key]))

    return breaks


FORMS: dict[str, tuple[Any, str]] = {
    "a longer observation": (reshaped(OBSERVATION, lambda x: torch.cat([x, x], -1)), "agents.observation"),
    "an observation that a copy would stretch": (reshaped(OBSERVATION, lambda x: x[..., :1]), "agents.observation"),
    "an agent that is gone": (reshaped(OBSERVATION, lambda x: x[:, 1:]), "agents.observation"),
    "a reward of double precision": (reshaped(REWARD, lambda x: x.double(), both=False), "next.agents.reward"),
    "a reward for all": (reshaped(REWARD, lambda x: x[:, :1], both=False), "next.agents.reward"),
    "a state of whole numbers": (reshaped(STATE, lambda x: x.long()), "state"),
    "a missing key": (lambda arrived, current: (arrived.exclude(STATE), current.exclude(STATE)), "state"),
    "no TensorDict": (lambda arrived, current: (arrived, None), "gives a NoneType and no TensorDict"),
    "one instead of two": (lambda arrived, current: arrived.clone(), "failed: ValueError"),
}


@pytest.mark.parametrize("name", FORMS)
def test_what_has_another_form_later_is_named(name: str) -> None:
    breaks, says = FORMS[name]
    with pytest.raises(MarlkitError) as caught:
        fit(learner(broken_at(6, breaks)), 2)
    said = str(caught.value)
    assert "env (BrokenEnvironment)" in said
    assert says in said
    assert "actor" not in said


def never(arrived: TensorDict, current: TensorDict) -> None:
    """Mark everything as ended, but not as done."""
    arrived.set("terminated", torch.ones_like(arrived["terminated"])).set("truncated", torch.zeros_like(arrived["truncated"]))
    arrived.set("done", torch.zeros_like(arrived["done"]))


RULES: dict[str, tuple[str, Any, str]] = {
    "done": ("done", never, MEETING),
    "no reset": ("first", lambda arrived, current: put(current, keys.IS_FIRST, not current["is_first"][1], 1), MEETING),
    "nothing allowed": ("masks", lambda arrived, current: put(current, keys.ACTION_MASK, False), DISCRETE),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_is_broken_later_is_named(name: str) -> None:
    rule, breaks, code = RULES[name]
    with pytest.raises(RuleError, match=r"^iteration 1: env \(BrokenEnvironment\) gave an? ") as caught:
        fit(learner(broken_at(6, breaks, code)), 2)
    assert caught.value.rule == rule


# --- exceptions --------------------------------------------------------------------------------------------------------------


def test_an_exception_of_the_environment_names_it_and_its_line() -> None:
    with pytest.raises(
        MarlkitError, match=r"^iteration 1: env \(BrokenEnvironment\) failed: ZeroDivisionError: division by zero"
    ):
        fit(learner(broken_at(6, lambda arrived, current: 1 / 0)), 2)


PLACES = {
    "actor": "forward",
    "critic": "forward",
    "estimator": "forward",
    "update": "update",
    "data": "batches",
    "opponents": "observe",
    "targets": "follow",
    "optimizer": "schedule",
}


@pytest.mark.parametrize("section", PLACES)
def test_an_exception_of_any_component_names_it_and_its_line(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = learner(broken_at(99, lambda arrived, current: None))
    system.annotator.opponents_are_read = True
    kind = type(getattr(system, section))
    fit(system, 1)

    def fails(self: Any, *arguments: Any, **options: Any) -> Any:
        raise ValueError("no such luck")

    monkeypatch.setattr(kind, PLACES[section], fails)
    with pytest.raises(
        MarlkitError, match=rf"^iteration 1: {section} \({kind.__name__}\) failed: ValueError: no such luck"
    ) as caught:
        fit(system, 2)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
        ),
    ],
)
def test_want_of_memory_says_what_to_lower(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    system = learner(broken_at(99, lambda arrived, current: None))

    def fails(self: Any, *arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(type(system.update), "update", fails)
    with pytest.raises(MarlkitError, match=r"update \(PpoClipUpdate\) needs more memory than there is .*Lower .*env.num_envs"):
        fit(system, 1)


def test_an_actor_that_does_not_write_what_it_declares_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    system = learner(broken_at(99, lambda arrived, current: None))
    forward = StochasticActor.forward
    monkeypatch.setattr(StochasticActor, "forward", lambda *a, **k: forward(*a, **k).exclude(keys.LOG_PROB))
    with pytest.raises(MarlkitError, match=r"actor \(StochasticActor\) declares that it writes `agents.log_prob`, but did not"):
        fit(system, 1)


# --- before a training -------------------------------------------------------------------------------------------------------

BOTH = "torch.cat([self.places, self.places.mean(1, keepdim=True).expand_as(self.places)], -1)"
SEEN = '        agents = {"observation": observation, '
START = "        self._start(done)\n        return arrived, self._seen(done)\n"
BEFORE: dict[str, tuple[list[tuple[str, str]], str]] = {
    "an observation of size 0": (
        [("observation=2", "observation=0")],
        "env.type: env (MeetingEnvironment) has a team spec with 0 observation",
    ),
    "an observation of another size": (
        [(SEEN, "        observation = observation.repeat(1, 1, 2)\n" + SEEN)],
        "has `agents.observation` as [3, 4]",
    ),
    "an extra dimension": (
        [(SEEN, "        observation = observation.unsqueeze(1)\n" + SEEN)],
        "has `agents.observation` as [1, 3, 2]",
    ),
    "double precision": ([('"reward"), -apart', '"reward"), -apart.double()')], "has `next.agents.reward` as float64"),
    "a missing key": ([(', "is_first": is_first}', "}")], "has no `is_first`"),
    "no tensor": ([('"is_first": is_first}', '"is_first": "yes"}')], "`is_first`"),
    "a failing reset": (
        [("        self._start(everywhere)\n", "        self._start(everywhere[0, 0, 0])\n")],
        "failed: IndexError",
    ),
    "a failing step": ([("self.steps = self.steps + 1", "self.steps = self.steps + self.missing")], "failed: AttributeError"),
    "NaN at once": ([('"reward"), -apart', '"reward"), (-apart).sqrt()')], "`agents.reward` that is not finite"),
    "done that is wrong": ([("done = terminated | truncated", "done = terminated & truncated")], "is not terminated | truncated"),
    "no reset": ([(START, "        return arrived, self._seen(done & False)\n")], "reset the environments that are done"),
    "tensors written over": (
        [("self.places = self.places + 0.2", "self.places += 0.2"), (BOTH, "self.places"), ("observation=2", "observation=1")],
        "writes to the `reset` that it gave before",
    ),
    "an action that is changed": (
        [("0.2 * action.clamp(-1, 1)", "0.2 * action.clamp_(-0.001, 0.001)")],
        "writes to the `action` that it was given",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_it_is_named_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, says = BEFORE[name]
    module = f"meeting_{list(BEFORE).index(name)}"
    code = replaced(MEETING, *changes)
    (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    command = [
        "train",
        "mappo",
        f"env={module}.MeetingEnvironment",
        "env.max_steps=2",
        "--root",
        str(tmp_path / "runs"),
        "--no-progress",
    ]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "env (MeetingEnvironment)" in said
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_an_actor_that_ignores_the_mask_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = StochasticActor.forward

    def ignoring(self: StochasticActor, batch: Any, deterministic: bool = False) -> Any:
        found = forward(self, batch, deterministic)
        return found.set(keys.ACTION, torch.full_like(found[keys.ACTION], 9))

    monkeypatch.setattr(StochasticActor, "forward", ignoring)
    with pytest.raises(MarlkitError, match=r"actor \(StochasticActor\) chose an action that `agents.action_mask` does not allow"):
        dry_run(
            load_recipe(
                "mappo", ["env.scenario=simple_speaker_listener", "env.scenario_options={}", "env.continuous_actions=false"]
            )
        )


@pytest.mark.parametrize(
    ("recipe", "override", "remedy"),
    [
        ("mappo", "env.num_envs=10000000000", "Lower env.num_envs or data.steps."),
        ("mappo", "data.steps=10000000000", "Lower env.num_envs or data.steps."),
        ("maddpg", "data.capacity=10000000000000", "Lower env.num_envs or data.steps or data.capacity."),
    ],
)
def test_what_cannot_fit_into_memory_is_refused_before_anything_is_written(
    recipe: str, override: str, remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", recipe, override, "--root", str(tmp_path), "--no-progress"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "GiB of steps" in said
    assert remedy in said
    assert not list(tmp_path.iterdir())


def test_the_bytes_that_data_holds() -> None:
    """Against the tensors that it really allocates."""
    env = broken_at(99, lambda arrived, current: None)
    for data in (RolloutData(env.spec, steps=7), replay(env)):
        system = learner(env, data)
        played = system.collect()
        held = sum(x.numel() * x.element_size() for x in played.values(True, True))
        if isinstance(data, ReplayData):
            held += sum(x.numel() * x.element_size() for x in TensorDict(data.state_dict()["kept"]).values(True, True)) * 100 // 4
        assert data.held_bytes(3, played) == pytest.approx(held, rel=0.02)


def test_deterministic_actors_are_looked_at_as_well() -> None:
    env = broken_at(2, lambda arrived, current: put(arrived, REWARD, NAN))
    system = learner_of(env, DeterministicActor(env.spec, hidden=[4]), data=RolloutData(env.spec, steps=4))
    with pytest.raises(NonFiniteError, match=r"env \(BrokenEnvironment\)"):
        system.collect()
