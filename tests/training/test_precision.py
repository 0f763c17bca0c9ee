"""Products of networks in bfloat16: they and nothing else, what they do to gradients and to learning, and who is refused them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from scripted import fit, learner_of
from small_runs import KilledError, killed_at, known, same, states, without_times
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import marlkit
from marlkit import keys, run
from marlkit.actors.stochastic import StochasticActor
from marlkit.batches import units
from marlkit.component import Runtime
from marlkit.contract import Contract
from marlkit.critics.centralised import CentralisedCritic
from marlkit.data.rollout import RolloutData
from marlkit.envs.one_step import OneStepGame
from marlkit.errors import CheckpointError, RecipeError
from marlkit.learning import Learning
from marlkit.nn.networks import TeamGRU, TeamLinear, TeamNetwork
from marlkit.optim.adam import AdamOptimizer
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.recipe import load_recipe, shipped
from marlkit.run.folder import _decisive
from marlkit.run.metrics_file import read_metrics
from marlkit.spec import Discrete, TeamSpec
from marlkit.training.assembly import build_environment, build_learner, choose_device
from marlkit.training.dry_run import dry_run
from marlkit.training.learner import Learner
from marlkit.training.precision import Precision, Products, unfit_precision

CPU = torch.device("cpu")
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
WIDE = [
    "env.num_envs=8", "env.max_steps=10", "actor.hidden=[32,24]", "actor.embedding=32", "critic.hidden=[32,24]",
    "critic.embedding=32", "data.steps=10", "data.batch_size=20", "data.updates=2", "data.capacity=100", "data.warm_up=40",
    "update.epochs=2", "update.minibatch_size=40", "update.step.epochs=2", "update.step.minibatch_size=40",
    "trainer.iterations=2", "trainer.evaluation_interval=2", "trainer.evaluation_episodes=4", "trainer.video=false",
    "trainer.checkpoint_seconds=0",
]  # fmt: skip
"""Overrides that make a recipe small, its layers still wide enough to be rounded."""
CASES = [
    *(pytest.param(name, [], id=name) for name in sorted(shipped())),
    pytest.param("mappo", ["actor.body=gru", "actor.sequence_length=5"], id="gru"),
    pytest.param("mappo", ["actor.layer_norm=true", "critic.layer_norm=true", "actor.activation=gelu"], id="layer_norm"),
    pytest.param("coma", ["critic=attention", "critic.activation=tanh"], id="attention"),
    pytest.param("mat", ["update={type: trust_region}"], id="transformer-trust_region"),
]
ROUNDING = 2.0**-9
"""Relative error of a number with 8 significant bits."""


class Seen(TorchDispatchMode):
    """Notes the matrix products, ``(type, number of columns)``, and the types of all tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[torch.dtype, int]] = []
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.types |= {x.dtype for x in tensors}
        if func.overloadpacket.__name__ in PRODUCTS:
            self.products.append((result.dtype, result.shape[-1]))
        return result


def seen(function: Callable[[], Any]) -> Seen:
    with Seen() as mode:
        function()
    return mode


def learner(name: str, precision: Precision, extra: Sequence[str] = (), device: torch.device = CPU) -> Learner:
    overrides = [*extra, f"trainer.precision={precision}"]
    recipe = load_recipe(name, [*known(name, WIDE), *overrides])
    return build_learner(recipe, build_environment(recipe, device, recipe.seed)).to(device)


def rows_of(system: Learner) -> TensorDict:
    """What the system learns from in an iteration, annotated, as networks read it."""
    while (batch := next(system.data.batches(system.data.collect(system.env, system.actor), system.actor), None)) is None:
        pass
    system.annotate(batch)
    return units(batch, system.actor.sequence_length)


def slopes(system: Learner, rows: TensorDict) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, predictions, and the gradient of some loss of both with respect to everything that it reaches.

    Of an actor that is greedy its action values, because its log-probabilities have no gradient.
    """
    log_prob = system.actor.distribution(rows).log_prob(rows[keys.ACTION])
    if "greedy" in system.actor.traits:
        log_prob = rows[keys.ACTION_VALUES]
    values = system.critic.predict(rows)
    weight = torch.linspace(-1, 1, log_prob.numel(), device=log_prob.device).view_as(log_prob)
    loss = (log_prob * weight).mean() + (values - 1).square().mean()
    parameters = [*system.actor.parameters(), *system.critic.parameters()]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return log_prob.detach(), values.detach(), torch.cat([x.flatten() for x in found if x is not None])


# --- what is rounded and what is not ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_wide_products_are_rounded_and_results_are_not(name: str, extra: list[str]) -> None:
    system = learner(name, "bfloat16", extra)
    rows = rows_of(system)
    policy: list[Any] = []
    for pass_ in (lambda: policy.append(system.actor.distribution(rows)), lambda: policy.append(system.critic.predict(rows))):
        products = seen(pass_).products
        assert {dtype for dtype, columns in products if columns < 16} <= {torch.float32}
        assert torch.bfloat16 in {dtype for dtype, _ in products} or not products
    results = [*policy[0].parameters().values(), policy[0].log_prob(rows[keys.ACTION]), policy[0].entropy(), policy[1]]
    assert {x.dtype for x in results} == {torch.float32}
    assert {x.dtype for x in rows.values(True, True) if x.is_floating_point()} == {torch.float32}


def test_a_perceptron_multiplies_in_bfloat16_but_for_its_last_layer() -> None:
    system = learner("mappo", "bfloat16")
    rows = rows_of(system)
    forward = seen(lambda: system.critic.predict(rows)).products
    assert forward == [(torch.float32, 32), (torch.bfloat16, 24), (torch.float32, 3)]
    backward = seen(system.critic.predict(rows).sum().backward).products
    assert [dtype for dtype, _ in backward] == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.float32]
    plain = learner("mappo", "float32")
    assert seen(lambda: slopes(plain, rows)).types.isdisjoint({torch.bfloat16, torch.float16})


@pytest.mark.parametrize("name", sorted(shipped()))
def test_an_iteration_is_float32_but_for_the_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    system = learner(name, "bfloat16")
    system.evaluate = None
    simulated, estimated, losses, products = Seen(), Seen(), [], Seen()
    step, minimise, estimator = system.env.step, system.minimise, system.estimator.forward

    def watched_step(action: Tensor) -> Any:
        with simulated:
            return step(action)

    def watched_estimator(batch: Any) -> Any:
        with estimated:
            return estimator(batch)

    def watched_minimise(loss: Tensor, *args: Any) -> Any:
        losses.append(loss)
        with products:
            metrics = minimise(loss, *args)
        gradients = [p.grad for p in system.parameters() if p.grad is not None]
        assert {x.dtype for x in [loss, *gradients, *metrics.values()]} == {torch.float32}
        return metrics

    monkeypatch.setattr(system.env, "step", watched_step)
    monkeypatch.setattr(system, "minimise", watched_minimise)
    monkeypatch.setattr(system.estimator, "forward", watched_estimator)
    fit(system, 2)
    assert system.iteration == 2
    assert losses
    assert torch.bfloat16 in {dtype for dtype, _ in products.products}
    assert torch.float32 in simulated.types & estimated.types
    assert torch.bfloat16 not in simulated.types | estimated.types
    moments = [x for state in system._torch_optimizer().state.values() for x in state.values() if isinstance(x, Tensor)]
    kept = [x for x in [*system.parameters(), *system.buffers(), *moments] if x.is_floating_point()]
    assert {x.dtype for x in kept} == {torch.float32}
    assert all(torch.isfinite(x).all() for x in kept)


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_gradients_are_float32_and_close_to_those_of_float32(name: str, extra: list[str]) -> None:
    """Some six products and roundings lie between a loss and a gradient, each off by at most ``ROUNDING`` relatively."""
    exact, rounded = (learner(name, precision, extra) for precision in ("float32", "bfloat16"))
    rounded.load_state_dict(exact.state_dict())
    rows = rows_of(exact)
    expected, found = slopes(exact, rows.clone()), slopes(rounded, rows.clone())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, theirs)
        assert (ours - theirs).norm() <= 12 * ROUNDING * theirs.norm()


def test_a_result_far_from_zero_is_not_rounded() -> None:
    """In bfloat16 there is nothing between 100 and 100.5: such positions would be all the same, and such values too."""
    torch.manual_seed(0)
    network = TeamNetwork(4, 1, hidden=[32, 32], groups=[0], activation="tanh", output_gain=1.0, agent_id=False, layer_norm=False)
    features = 100 + 0.2 * torch.rand(50, 1, 4)
    with torch.no_grad():
        first, _, last = cast(list[TeamLinear], list(network.layers))
        first.biases[0].copy_(-100 * first.weights[0].sum(-1))
        last.biases[0].fill_(100.2)
    expected = network(features)
    Products([nn.ModuleList([network])], "bfloat16", "cpu")
    assert 0 < (network(features) - expected).abs().max() < 0.02


def test_what_a_recurrent_policy_remembers_is_not_rounded() -> None:
    network = TeamGRU(16, [0])
    Products([nn.ModuleList([network])], "bfloat16", "cpu")
    remembered = torch.full((2, 1, 16), 0.123456789)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        # An update gate that lets nothing in: sigmoid(40) is 1 in either precision.
        network.from_input.biases[0][16:32] = 40.0
    states = network(torch.zeros(2, 6, 1, 16), remembered, torch.zeros(2, 6, 1, dtype=torch.bool))
    torch.testing.assert_close(states, remembered.unsqueeze(1).expand_as(states), rtol=0, atol=1e-7)


# --- the switch -------------------------------------------------------------------------------------------------------------


class OwnLayer(nn.Linear):
    """Gives more than one tensor, and may break."""

    fails: type[BaseException] | None = None

    def forward(self, features: Tensor) -> Any:
        if self.fails:
            raise self.fails
        product = super().forward(features)
        return {"both": (product, [product.relu()])}


class OwnNetwork(nn.Module):
    """A user's component without any code for precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), OwnLayer(32, 32))

    def forward(self, features: Tensor) -> Tensor:
        both: dict[str, Any] = self.layers(features)
        return both["both"][0]


def lowered() -> OwnNetwork:
    torch.manual_seed(0)
    network = OwnNetwork()
    Products([nn.ModuleList([network])], "bfloat16", "cpu")
    return network


def test_networks_of_others_take_part_without_doing_anything() -> None:
    network = lowered()
    assert seen(lambda: network(torch.ones(3, 4))).products == [(torch.float32, 32), (torch.bfloat16, 32)]
    result = network.layers(torch.ones(3, 4))["both"]
    assert {result[0].dtype, result[1][0].dtype} == {torch.float32}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_whatever_ends_a_pass_ends_the_rounding(error: type[BaseException]) -> None:
    network = lowered()
    layer = cast(OwnLayer, network.layers[2])
    layer.fails = error
    with pytest.raises(error):
        network(torch.ones(3, 4))
    assert not torch.is_autocast_enabled("cpu")
    layer.fails = None
    assert seen(lambda: network(torch.ones(3, 4))).products == [(torch.float32, 32), (torch.bfloat16, 32)]


def test_a_step_of_the_optimiser_is_seen_at_once_also_within_a_foreign_autocast() -> None:
    network = lowered()
    with torch.autocast("cpu", torch.bfloat16):
        before = network(torch.ones(3, 4))
        with torch.no_grad():
            for parameter in network.layers[2].parameters():
                parameter.add_(1.0)
        after = network(torch.ones(3, 4))
    assert not torch.equal(before, after)
    hidden = torch.relu(network.layers[0](torch.ones(3, 4)))
    torch.testing.assert_close(after, before + 1 + hidden.sum(-1, keepdim=True), rtol=0.02, atol=0.02)


def test_copies_of_networks_are_rounded_and_are_their_own() -> None:
    network = lowered()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    mode = Seen()
    with mode:
        result = twin(torch.ones(3, 4))
    assert mode.products == [(torch.float32, 32), (torch.bfloat16, 32)]
    assert result.abs().sum() > 0


def test_lagging_copies_are_rounded_as_what_they_copy() -> None:
    system = learner("maddpg", "bfloat16")
    rows = rows_of(system)
    target = system.targets.critic()
    assert target is not system.critic
    assert torch.bfloat16 in {dtype for dtype, _ in seen(lambda: target.predict(rows)).products}
    assert torch.equal(target.predict(rows), system.critic.predict(rows))


def test_nothing_is_rounded_meanwhile_and_a_replaced_method_stays_replaced() -> None:
    torch.manual_seed(0)
    network = OwnNetwork()
    plain = network.layers[2].forward
    vars(network.layers[2])["forward"] = lambda x: plain(x + 1)
    expected = network(torch.ones(3, 4))
    products = Products([nn.ModuleList([network]), nn.ModuleList([network])], "bfloat16", "cpu")
    rounded = network(torch.ones(3, 4))
    with contextlib.suppress(KilledError), products.exact():
        exact = network(torch.ones(3, 4))
        raise KilledError
    assert torch.equal(exact, expected)
    assert torch.equal(network(torch.ones(3, 4)), rounded)
    assert 0 < (rounded - expected).abs().max() < 0.05


# --- trust regions ----------------------------------------------------------------------------------------------------------


def test_a_natural_gradient_step_points_where_that_of_float32_does() -> None:
    """Conjugate gradients take products with a Hessian whose roundings need not cancel; damping keeps them from growing."""
    steps = []
    exact, rounded = (learner("hatrpo", precision, ["env.num_envs=32"]) for precision in ("float32", "bfloat16"))
    rounded.load_state_dict(exact.state_dict())
    batch = exact.data.collect(exact.env, exact.actor)
    exact.annotate(batch)
    exact.estimator(batch)
    for system in (exact, rounded):
        before = torch.cat([p.detach().flatten() for p in system.actor.parameters()])
        torch.manual_seed(0)
        learning = Learning(system.actor, system.critic, system.opponents, lambda *_: {}, progress=0.0)
        metrics = system.update.update(batch.clone(), learning)
        assert metrics["actor/step_fraction"] > 0
        steps.append(torch.cat([p.detach().flatten() for p in system.actor.parameters()]) - before)
    assert not torch.equal(*steps)
    assert torch.cosine_similarity(steps[0], steps[1], 0) > 0.99


# --- runs -------------------------------------------------------------------------------------------------------------------


def small(*extra: str) -> list[str]:
    return [*known("mappo", WIDE), "trainer.precision=bfloat16", "trainer.iterations=4", *extra]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run.train(load_recipe("mappo", small()), tmp_path_factory.mktemp("whole"), progress=False)


def cut_short(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        killed_at(2, patch)
        with pytest.raises(KilledError):
            run.train(load_recipe("mappo", small()), folder, progress=False)
    (cut,) = (folder / "mappo").iterdir()
    return cut


def test_killed_and_resumed_equals_uninterrupted(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cut_short(tmp_path, monkeypatch)
    run.resume(cut, progress=False)
    ended, expected = states(cut), states(whole)
    for part in ("state_dict", "optimizer_states"):
        assert same(ended[part], expected[part]), part
    assert without_times(cut) == without_times(whole)
    plain = run.train(load_recipe("mappo", [*small(), "trainer.precision=float32"]), tmp_path / "plain", progress=False)
    assert not same(states(plain)["state_dict"], expected["state_dict"])


def test_a_run_is_not_resumed_in_another_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cut_short(tmp_path, monkeypatch)
    text = (cut / "recipe.yaml").read_text(encoding="utf-8")
    (cut / "recipe.yaml").write_text(text.replace("precision: bfloat16", "precision: float32"), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"precision: float32` in the run, `trainer\.precision: bfloat16` in the ch"):
        run.resume(cut, progress=False)


def test_a_run_from_before_there_was_a_choice_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = load_recipe("mappo", [*small(), "trainer.precision=float32"])
    without = exact.to_yaml().replace("  precision: float32\n", "")
    assert without != exact.to_yaml()
    assert _decisive(without) == _decisive(exact.to_yaml())
    assert _decisive(without) != _decisive(load_recipe("mappo", small()).to_yaml())


def test_evaluations_and_loaded_policies_are_float32(whole: Path) -> None:
    policy = marlkit.load_policy(whole, "last")
    mode = seen(lambda: policy(torch.zeros(5, policy.spec.n_agents, policy.spec.observation)))
    assert mode.products
    assert mode.types.isdisjoint({torch.bfloat16})
    evaluated = [value for value in read_metrics(whole / "metrics.csv")["evaluation/return"] if value == value]
    assert run.evaluate(whole, checkpoint="last")["evaluation/return"] == evaluated[-1]


def test_the_dry_run_rounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("mappo", small())
    assert torch.bfloat16 in {dtype for dtype, _ in seen(lambda: dry_run(recipe)).products}


def test_a_device_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    recipe = load_recipe("mappo", ["trainer.accelerator=mps", "trainer.precision=bfloat16"])
    with pytest.raises(RecipeError, match=r"trainer\.precision.*not for `mps`.*trainer\.precision=float32"):
        choose_device(recipe)
    assert choose_device(load_recipe("mappo", ["trainer.accelerator=mps"])).type == "mps"
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an old GPU")
    assert "an old GPU has no bfloat16" in unfit_precision("bfloat16", torch.device("cuda", 0))
    assert unfit_precision("float32", torch.device("cuda", 0)) == unfit_precision("bfloat16", CPU) == ""


# --- learning ---------------------------------------------------------------------------------------------------------------


class WheelGame(OneStepGame):
    """Every agent sees a direction and is paid for naming the third of the circle that it points to; 1 at best, 1/3 by chance."""

    contract = Contract(
        writes=(
            *(keys.OBSERVATION, keys.STATE, keys.ALIVE, keys.IS_FIRST, keys.ACTION_MASK),
            *(keys.REWARD, keys.TERMINATED, keys.TRUNCATED, keys.DONE),
        ),
        traits=("discrete", "team_reward"),
    )

    def __init__(self, runtime: Runtime, num_envs: int) -> None:
        super().__init__(runtime, TeamSpec(2, 2, Discrete(3), horizon=1, team_reward=True), num_envs)

    def payoff(self, action: Tensor) -> Tensor:
        return (action == self.right).float().mean(-1)

    def restart(self) -> Tensor:
        angle = torch.rand(self.num_envs, 2, device=self.device)
        self.right = (3 * angle).long()
        turn = 2 * torch.pi * angle
        self._position = torch.stack([turn.cos(), turn.sin()], -1)
        return self._position

    def proceed(self, seen: Tensor, done: Tensor, finished: Tensor) -> Tensor:
        return self.restart()


def learnt(precision: Precision, seed: int, iterations: int = 12) -> float:
    """What the most likely actions are paid on average after some iterations of PPO."""
    torch.manual_seed(seed)
    env = WheelGame(Runtime(CPU, seed), 256)
    system = learner_of(
        env,
        StochasticActor(env.spec, hidden=[32, 32]),
        critic=CentralisedCritic(env.spec, hidden=[32, 32]),
        update=PpoClipUpdate(env.spec, epochs=4, minibatch_size=256),
        data=RolloutData(env.spec, steps=4),
        optimizer=AdamOptimizer(env.spec, lr=1e-3),
    )
    system.products = Products([system.actor, system.critic], precision, "cpu")
    fit(system, iterations)
    current, total = env.reset(), 0.0
    for _ in range(8):
        taken = system.actor(current.copy(), deterministic=True)
        arrived, current = env.step(taken[keys.ACTION])
        total += arrived[keys.REWARD[1:]].mean().item()
    return total / 8


def test_learning_is_unharmed() -> None:
    exact, rounded = learnt("float32", 0), learnt("bfloat16", 0)
    assert exact > 0.95
    assert rounded > exact - 0.02


# --- on a GPU ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "extra"), CASES)
def test_gradients_on_a_gpu_are_close_to_those_of_float32(name: str, extra: list[str]) -> None:
    device = torch.device("cuda", 0)
    exact, rounded = (learner(name, precision, extra, device) for precision in ("float32", "bfloat16"))
    rounded.load_state_dict(exact.state_dict())
    rows = rows_of(exact)
    expected = slopes(exact, rows.clone())
    products = Seen()
    with products:
        found = slopes(rounded, rows.clone())
    assert torch.bfloat16 in {dtype for dtype, _ in products.products}
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() <= 12 * ROUNDING * theirs.norm()


@pytest.mark.gpu
def test_a_run_on_a_gpu_trains_and_plays(tmp_path: Path) -> None:
    folder = run.train(load_recipe("mappo", small("trainer.accelerator=cuda")), tmp_path, progress=False)
    assert states(folder)["marlkit"]["iteration"] == 4
    assert run.evaluate(folder, checkpoint="last")["evaluation/return"] == pytest.approx(
        [value for value in read_metrics(folder / "metrics.csv")["evaluation/return"] if value == value][-1], abs=1e-3
    )
