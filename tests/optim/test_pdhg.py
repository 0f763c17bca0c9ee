"""The update that wraps another one and lets the agents agree: on quadratics whose optima are known, and on real networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quadratics import SIZE, Quadratics, quadratics
from recipe_texts import TEAM, problem, read
from scripted import ScriptedEnvironment, fit, learner_of, random_script
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.component import Actor, Critic, Update
from marlkit.contract import Contract
from marlkit.critics.centralised import CentralisedCritic
from marlkit.critics.local import LocalCritic
from marlkit.errors import MarlkitError, OptionError
from marlkit.functional import consensus
from marlkit.learning import Adjust, Learning, Metrics
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.optim._local_copies import LocalCopies
from marlkit.optim.pdhg import PdhgUpdate
from marlkit.optim.ppo_clip import PpoClipUpdate
from marlkit.optim.sequential import SequentialUpdate
from marlkit.recipe import load_recipe
from marlkit.recipe.fit import check_fit
from marlkit.run.checkpoint_io import load_checkpoint, save_checkpoint
from marlkit.spec import Continuous, Discrete, TeamSpec
from marlkit.targets.soft import SoftTargets
from marlkit.training.assembly import build_environment, build_learner
from marlkit.training.dry_run import dry_run
from marlkit.training.learner import Learner

N = 8
NOTHING = TensorDict({}, batch_size=[])
UNUSED: Any = None
"""Stands for a component that is not used."""


# --- a critic of four numbers per agent -----------------------------------------------------------------------------------


class FourNumbers(Critic):
    """Copies of four parameters, in two leaves of different shapes; they start at random."""

    contract = Contract(predicts=keys.STATE_VALUE)

    def __init__(self, spec: TeamSpec) -> None:
        super().__init__()
        self.spec = spec
        self.normaliser = ValueNormaliser(enabled=False)
        self.first = nn.ParameterList(torch.randn(1, dtype=torch.float64) for _ in range(spec.n_agents))
        self.rest = nn.ParameterList(torch.randn(1, SIZE - 1, dtype=torch.float64) for _ in range(spec.n_agents))

    def agent_parameters(self, agents: Sequence[int]) -> list[nn.Parameter]:
        return [own[agent] for agent in agents for own in (self.first, self.rest)]

    def predict(self, batch: TensorDictBase) -> Tensor:
        return torch.stack([torch.cat([a, b[0]]) for a, b in zip(self.first, self.rest, strict=True)])


class PartlyShared(FourNumbers):
    """Agents agree on the three numbers of the second leaf and keep the first for themselves."""

    def shared_parameters(self, agent: int) -> list[nn.Parameter]:
        return [self.rest[agent]]


class FittedUpdate(Update):
    """Some gradient steps on the costs of some agents."""

    contract = Contract()

    def __init__(self, spec: TeamSpec, problem: Quadratics, steps: int, agents: list[int] | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.problem = problem
        self.steps = steps
        self.agents = agents
        self.adjust: Adjust | None = None
        self.attached: list[Tensor] = []

    def attach(self, actor: Actor, critic: Critic) -> None:
        self.attached.append(critic.predict(NOTHING).detach())

    def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
        for _ in range(self.steps):
            learning.minimise(self.cost(learning.critic, batch), None, self.adjust)
        return {}

    def cost(self, critic: Critic, batch: TensorDictBase) -> Tensor:
        if self.agents is None:
            return self.problem.costs(critic.predict(batch)).sum()
        own = [torch.cat([p.flatten() for p in critic.agent_parameters([agent])]) for agent in self.agents]
        some = Quadratics(self.problem.curvature[self.agents], self.problem.target[self.agents])
        return some.costs(torch.stack(own)).sum()


class Descent:
    """A ``minimise`` that takes plain gradient steps and remembers the first gradients."""

    def __init__(self, module: nn.Module, rate: float = 0.1) -> None:
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), lr=rate)
        self.gradients: list[list[Tensor | None]] = []

    def __call__(self, loss: Tensor, max_grad_norm: float | None, adjust: Adjust | None = None) -> Metrics:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if adjust is not None:
            adjust()
        if len(self.gradients) < 3:
            parameters = self.optimizer.param_groups[0]["params"]
            self.gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
        self.optimizer.step()
        return {}


class Trial:
    """A wrapped :class:`FittedUpdate` at work on a critic of four numbers."""

    def __init__(
        self,
        problem: Quadratics,
        steps: int,
        *,
        agents: list[int] | None = None,
        seed: int = 0,
        critic: type[FourNumbers] = FourNumbers,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        spec = TeamSpec(len(problem.target), 1, Discrete(2))
        self.critic = critic(spec)
        self.step = FittedUpdate(spec, problem, steps, agents)
        self.update = PdhgUpdate(spec, step=self.step, **options)
        self.update.attach(UNUSED, self.critic)
        self.start = self.copies()
        self.minimise = Descent(self.critic)

    def run(self) -> dict[str, float]:
        """One update."""
        learning = Learning(UNUSED, self.critic, UNUSED, self.minimise, 0.0)
        return {name: value.item() for name, value in self.update.update(NOTHING, learning).items()}

    def copies(self) -> np.ndarray[Any, Any]:
        return self.critic.predict(NOTHING).detach().numpy().copy()

    @property
    def kept(self) -> LocalCopies:
        kept = self.update.copies["critic"]
        assert isinstance(kept, LocalCopies)
        return kept

    @property
    def dual(self) -> np.ndarray[Any, Any]:
        return self.kept.dual.numpy().copy()


STAR = [[0, agent] for agent in range(1, N)]


@pytest.mark.parametrize(("topology", "steps"), [("full", 450), ("ring", 450), (STAR, 700)], ids=["full", "ring", "star"])
@pytest.mark.parametrize("dual", ["node", "edge"])
def test_the_optimum_of_the_sum_is_reached(topology: Any, steps: int, dual: str) -> None:
    """PD-1, through the wrapper."""
    problem = quadratics()
    trial = Trial(problem, steps, topology=topology, dual=dual, penalty=1.0)
    metrics = trial.run()
    optimum = np.broadcast_to(problem.optimum(np.ones(N)), (N, SIZE))
    assert np.abs(trial.copies() - optimum).max() < 1e-8
    assert np.abs(trial.dual.sum(0)).max() < 1e-10
    assert np.abs(trial.dual + problem.gradients(torch.tensor(optimum)).numpy()).max() < 1e-7
    assert metrics["consensus/gap"] < 1e-8
    assert metrics["consensus/dual_sum"] < 1e-10
    assert metrics["consensus/dual"] == pytest.approx(np.linalg.norm(trial.dual))


def test_individual_parameters_are_kept_while_shared_ones_agree() -> None:
    """``min sum_i f_i(u_i, v)`` with u_i agent i's own: v by the Schur complements of the curvatures, u_i by its own equation."""
    problem = quadratics()
    trial = Trial(problem, 900, critic=PartlyShared, topology="full", penalty=1.0)
    assert trial.kept.dual.shape == (N, SIZE - 1)
    trial.run()
    a, t = problem.curvature, problem.target
    cross = a[:, 1:, 0] / a[:, :1, 0]
    schur = a[:, 1:, 1:] - np.einsum("np,nq->npq", cross, a[:, 0, 1:])
    shared = np.linalg.solve(schur.sum(0), np.einsum("npq,nq->p", schur, t[:, 1:]))
    own = t[:, 0] - np.einsum("np,np->n", a[:, 0, 1:], shared - t[:, 1:]) / a[:, 0, 0]
    found = trial.copies()
    assert np.abs(found[:, 1:] - shared).max() < 1e-8
    assert np.abs(found[:, 0] - own).max() < 1e-8
    assert np.ptp(found[:, 0]) > 0.1


def test_uniform_weights_on_a_star_count_agents_by_their_neighbours() -> None:
    problem = quadratics()
    trial = Trial(problem, 450, topology=STAR, dual="node", weights="uniform", penalty=1.0)
    trial.run()
    assert np.abs(trial.copies() - problem.optimum([N, *[2] * (N - 1)])).max() < 1e-8


@pytest.mark.parametrize("options", [{"penalty": 0.0}, {"topology": "none", "penalty": 1.0}, {"topology": [], "penalty": 1.0}])
def test_without_penalty_or_neighbours_everybody_finds_the_own_optimum(options: dict[str, Any]) -> None:
    problem = quadratics()
    trial = Trial(problem, 400, **options)
    trial.run()
    assert np.abs(trial.copies() - problem.target).max() < 1e-8
    assert not trial.dual.any()


def test_exchanges_at_different_times() -> None:
    """PD-2, through the wrapper: by edge the optimum is reached; by node there is agreement, but on something else."""
    problem = quadratics()
    optimum = problem.optimum(np.ones(N))
    trial = Trial(problem, 650, penalty=2.0, dual="edge", interval_mean=8.0, interval_std=4.0)
    trial.run()
    assert np.abs(trial.copies() - optimum).max() < 1e-6
    trial = Trial(problem, 650, penalty=2.0, dual="node", interval_mean=8.0, interval_std=4.0)
    assert trial.run()["consensus/gap"] < 1e-6
    assert np.abs(trial.copies() - optimum).max() > 0.01


@pytest.mark.parametrize("dual", ["node", "edge"])
@pytest.mark.parametrize("topology", ["full", "ring"])
def test_copies_that_are_drawn_directly_agree_under_adam_at_every_exchange(dual: str, topology: str) -> None:
    """Where penalty and duals pass through Adam, they swing at the same settings."""
    gaps = {}
    for pull in (None, 0.4):
        trial = Trial(quadratics(), 600, topology=topology, dual=dual, penalty=1.0, pull=pull)
        trial.minimise.optimizer = torch.optim.Adam(trial.critic.parameters(), lr=1e-2)
        gaps[pull] = trial.run()["consensus/gap"]
        assert np.abs(trial.dual.sum(0)).max() < 1e-10
    assert gaps[0.4] < 0.01 < 0.1 < gaps[None]


def test_drawn_directly_the_optimum_is_reached_by_plain_steps_with_a_dual_step_of_its_own() -> None:
    problem = quadratics()
    trial = Trial(problem, 900, topology="ring", penalty=1.0, pull=0.3, dual_step=0.5)
    trial.run()
    assert np.abs(trial.copies() - problem.optimum(np.ones(N))).max() < 1e-6


def test_agents_that_never_exchange_learn_alone() -> None:
    problem = quadratics()
    trial = Trial(problem, 400, topology="ring", extra_edges=0.5, interval_mean=None)
    assert trial.run()["consensus/messages"] == 0
    assert np.abs(trial.copies() - problem.target).max() < 1e-8


def loops(
    trial: Trial, steps: int, graphs: Sequence[Tensor], intervals: list[list[int]], penalty: float, by_edge: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]:
    """The method written out agent by agent, given which graphs and intervals were drawn: copies, duals, messages."""
    problem = trial.step.problem
    n_agents = len(problem.target)
    w = [row.copy() for row in trial.start]
    z, lam = [row.copy() for row in w], [np.zeros(SIZE) for _ in w]
    waits, graph_of_exchange = list(intervals.pop(0)), iter(graphs)
    messages = 0
    for _ in range(steps):
        for i in range(n_agents):
            gradient = problem.curvature[i] @ (w[i] - problem.target[i])
            w[i] = w[i] - 0.1 * (gradient + lam[i] + penalty * (w[i] - z[i]))
        waits = [wait - 1 for wait in waits]
        due = [i for i in range(n_agents) if waits[i] == 0]
        if not due:
            continue
        graph = next(graph_of_exchange).tolist()
        degree = [sum(row) for row in graph]
        used = set()
        for i in due:
            near = [j for j in range(n_agents) if graph[i][j]]
            weight = {j: 1 / (1 + max(degree[i], degree[j])) for j in near}
            z[i] = sum((weight[j] * w[j] for j in near), (1 - sum(weight.values())) * w[i])
            used |= {(j, i) for j in near} | ({(i, j) for j in near} if by_edge else set())
            if not by_edge:
                lam[i] = lam[i] + penalty * (w[i] - z[i])
            for j in near if by_edge else []:
                moved = penalty / 2 * weight[j] * (w[j] - w[i])
                lam[i] = lam[i] - moved
                lam[j] = lam[j] + moved
        messages += len(used)
        for i, interval in zip(due, intervals.pop(0), strict=True):
            waits[i] = interval
    return np.stack(w), np.stack(lam), messages


@pytest.mark.parametrize("dual", ["node", "edge"])
@pytest.mark.parametrize("topology", [{"topology": "full"}, {"topology": "ring", "extra_edges": 0.4}], ids=["full", "ring"])
def test_steps_are_those_of_a_loop_over_agents(dual: str, topology: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[int]] = []
    graphs: list[Tensor] = []
    draw, weigh = consensus.draw_intervals, consensus.metropolis_weights

    def noted_intervals(count: int, **options: float) -> Tensor:
        found = draw(count, **options)
        drawn.append(found.tolist())
        return found

    def noted_graph(graph: Tensor) -> Tensor:
        graphs.append(graph)
        return weigh(graph)

    monkeypatch.setattr(consensus, "draw_intervals", noted_intervals)
    monkeypatch.setattr(consensus, "metropolis_weights", noted_graph)
    options: dict[str, Any] = {"penalty": 0.7, "dual": dual, "interval_mean": 3.0, "interval_std": 1.5}
    trial = Trial(quadratics(), 40, **options, **topology)
    metrics = trial.run()
    copies, lam, messages = loops(trial, 40, graphs, drawn, 0.7, dual == "edge")
    assert np.abs(trial.copies() - copies).max() < 1e-12
    assert np.abs(trial.dual - lam).max() < 1e-12
    assert metrics["consensus/messages"] == messages
    assert metrics["consensus/bytes"] == messages * 8 * SIZE
    assert metrics["consensus/gap"] == pytest.approx(np.abs(copies - copies.mean(0)).max())
    assert metrics["consensus/dual_sum"] == pytest.approx(np.linalg.norm(lam.sum(0)), abs=1e-12)
    different = len({tuple(graph.flatten().tolist()) for graph in graphs})
    assert different == 1 if "extra_edges" not in topology else different > 10


def test_the_copies_start_as_the_first_agents_and_are_never_overwritten() -> None:
    trial = Trial(quadratics(), 1, penalty=1.0)
    torch.manual_seed(0)
    untouched = FourNumbers(trial.critic.spec)
    (attached,) = trial.step.attached
    assert np.array_equal(attached.numpy(), trial.start), "the step is attached to the equal copies"
    assert np.array_equal(trial.start, np.broadcast_to(untouched.predict(NOTHING)[0].detach().numpy(), (N, SIZE)))
    trial.run()
    # The first step is plain: copies equal their view, and the duals are zero.
    problem = trial.step.problem
    plain = [w - 0.1 * a @ (w - t) for w, a, t in zip(trial.start, problem.curvature, problem.target, strict=True)]
    assert np.abs(trial.copies() - plain).max() < 1e-14


def test_what_is_added_comes_after_the_inner_adjustment() -> None:
    """Clipping comes before both, as `minimise` adjusts after it; the inner update must not see what is added."""
    trial = Trial(quadratics(), 1, penalty=0.7)
    trial.kept.view.normal_()
    trial.kept.dual.normal_()
    added = torch.from_numpy(trial.start) * 0.7 + trial.kept.dual - 0.7 * trial.kept.view
    seen: list[Tensor] = []

    def double() -> None:
        for parameter in trial.critic.parameters():
            assert parameter.grad is not None
            seen.append(parameter.grad.clone())
            parameter.grad.mul_(2)

    trial.step.adjust = double
    plain = trial.step.problem.gradients(torch.from_numpy(trial.start))
    trial.run()
    by_agent = lambda found: torch.cat([torch.stack(found[:N]), torch.stack(found[N:])[:, 0]], -1)  # noqa: E731
    assert torch.allclose(by_agent(seen), plain, rtol=0, atol=1e-12)
    assert torch.allclose(by_agent(trial.minimise.gradients[0]), 2 * plain + added, rtol=0, atol=1e-12)


def test_only_agents_that_a_step_reaches_are_drawn_and_exchange() -> None:
    trial = Trial(quadratics(), 3, agents=[2], penalty=0.7, dual="node", interval_mean=2.0)
    trial.run()
    for gradients in trial.minimise.gradients:
        assert [agent for agent in range(2 * N) if gradients[agent] is not None] == [2, N + 2]
    assert trial.kept.waits == [2, 2, 1, 2, 2, 2, 2, 2]
    view = trial.kept.view.numpy()
    others = [agent for agent in range(N) if agent != 2]
    assert np.array_equal(trial.copies()[others], trial.start[others])
    assert np.array_equal(view[others], trial.start[others])
    assert not np.allclose(view[2], trial.start[2])
    assert not trial.dual[others].any()
    assert trial.dual[2].any()


def test_each_agent_that_a_step_reaches_gets_what_is_kept_for_it() -> None:
    trial = Trial(quadratics(), 1, agents=[5, 2], penalty=0.7)
    trial.kept.view.normal_()
    trial.kept.dual.normal_()
    added = trial.dual + 0.7 * (trial.start - trial.kept.view.numpy())
    trial.run()
    plain = trial.step.problem.gradients(torch.from_numpy(trial.start)).numpy()
    gradients = trial.minimise.gradients[0]
    for agent in (2, 5):
        first, rest = gradients[agent], gradients[N + agent]
        assert first is not None
        assert rest is not None
        assert np.allclose(torch.cat([first, rest[0]]).numpy(), plain[agent] + added[agent], rtol=0, atol=1e-12)


def test_leaves_without_gradient_get_none() -> None:
    trial = Trial(quadratics(), 1, penalty=0.7)
    trial.kept.dual.fill_(1.0)
    trial.critic.first[3].requires_grad_(False)
    trial.run()
    assert trial.minimise.gradients[0][3] is None
    assert all(gradient is not None for place, gradient in enumerate(trial.minimise.gradients[0]) if place != 3)


def test_steps_that_reach_no_copy_count_nothing() -> None:
    trial = Trial(quadratics(), 0, penalty=0.7, interval_mean=2.0)
    outside = nn.Parameter(torch.zeros(1))

    class ElsewhereUpdate(Update):
        def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
            return learning.minimise((outside - 1).square().sum(), None)

    trial.update.step = ElsewhereUpdate()
    trial.minimise.optimizer.add_param_group({"params": [outside]})
    assert trial.run()["consensus/messages"] == 0
    assert trial.kept.waits == [2] * N


def test_an_agent_without_neighbours_learns_alone() -> None:
    problem = quadratics()
    alone = Trial(problem, 20, topology="none")
    alone.run()
    some = Trial(problem, 20, topology=[[0, 1], [1, 2]], penalty=0.5, interval_mean=3.0)
    some.run()
    assert np.array_equal(some.copies()[3:], alone.copies()[3:])
    assert not some.dual[3:].any()
    assert not np.allclose(some.copies()[:3], alone.copies()[:3])


@pytest.mark.parametrize("options", [{}, {"topology": "ring", "interval_mean": 3.0, "interval_std": 2.0}, {"dual": "node"}])
def test_one_agent_takes_plain_gradient_steps(options: dict[str, Any]) -> None:
    """PD-1: bit for bit, and no random number is drawn for it."""
    trial = Trial(quadratics(1), 30, penalty=0.7, **options)
    before = torch.get_rng_state()
    metrics = trial.run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    plain = FourNumbers(trial.critic.spec)
    minimise = Descent(plain)
    for _ in range(30):
        minimise(trial.step.problem.costs(plain.predict(NOTHING)).sum(), None)
    assert np.array_equal(trial.copies(), plain.predict(NOTHING).detach().numpy())
    assert metrics["consensus/messages"] == metrics["consensus/bytes"] == metrics["consensus/gap"] == 0


# --- the graph ------------------------------------------------------------------------------------------------------------


def test_a_ring_is_in_random_order_decided_by_the_seed() -> None:
    graphs = [Trial(quadratics(), 0, topology="ring", seed=seed).update.graph for seed in (0, 0, *range(1, 20))]
    assert torch.equal(graphs[0], graphs[1])
    assert len({tuple(graph.flatten().tolist()) for graph in graphs}) > 15
    assert all((graph.sum(-1) == 2).all() for graph in graphs)


def test_making_the_update_draws_nothing() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    spec = TeamSpec(N, 1, Discrete(2))
    PdhgUpdate(spec, step=PpoClipUpdate(spec), topology="ring", extra_edges=0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": [[0, 3]]}, r"`topology`: edge \[0, 3\] names an agent that is not there: they are numbered 0 to 2"),
        ({"topology": [[0, 1], [1, 1]]}, r"`topology`: edge \[1, 1\] goes from an agent to itself"),
        ({"topology": [[0, 1], [1, 2], [1, 0]]}, r"`topology`: edge \[1, 0\] is named twice"),
        ({"topology": [[0, 1, 2]]}, r"`topology`: entry 0: must be a list \[a whole number"),
        ({"topology": [[0, -1]]}, r"`topology`: entry 0: entry 1: must be at least 0, got -1"),
        ({"topology": "star"}, r"`topology`: must be full or ring or none or a list"),
        ({"extra_edges": 0.5}, r"`extra_edges`: adds edges to the topology `ring`, got 0.5 with `full`"),
        ({"extra_edges": 1.5, "topology": "ring"}, r"`extra_edges`: must be at most 1"),
        ({"penalty": -0.1}, r"`penalty`: must be at least 0"),
        ({"interval_mean": 0.0}, r"`interval_mean`: must be above 0"),
        ({"interval_std": -1.0}, r"`interval_std`: must be at least 0"),
        ({"dual": "both"}, r"`dual`: must be node or edge"),
        ({"weights": "equal"}, r"`weights`: must be metropolis or uniform"),
    ],
)
def test_options_out_of_order(options: dict[str, Any], message: str) -> None:
    spec = TeamSpec(3, 1, Discrete(2))
    with pytest.raises(OptionError, match=message):
        PdhgUpdate(spec, step=PpoClipUpdate(spec), **options)


def test_parameters_that_do_not_correspond_are_refused() -> None:
    leaves = [[nn.Parameter(torch.zeros(3))], [nn.Parameter(torch.zeros(2))]]
    with pytest.raises(MarlkitError, match=r"the critic keeps parameters of shapes \[\(2,\)\] for agent 1 and \[\(3,\)\]"):
        LocalCopies("critic", leaves, torch.ones(2, dtype=torch.int64))
    with pytest.raises(MarlkitError, match=r"shapes \[\] for agent 0"):
        LocalCopies("critic", [[], []], torch.ones(2, dtype=torch.int64))


# --- resuming -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", ["node", "edge"])
def test_a_stored_state_continues_bit_for_bit(dual: str, tmp_path: Path) -> None:
    """Duals, views, timers, the ring's order and the counts, through a checkpoint of plain data."""
    options: dict[str, Any] = {
        "penalty": 0.7, "dual": dual, "topology": "ring", "extra_edges": 0.4, "interval_mean": 3.0, "interval_std": 1.5,
    }  # fmt: skip
    whole = Trial(quadratics(), 25, **options)
    whole.run()
    save_checkpoint({"critic": whole.critic.state_dict(), "update": whole.update.state_dict()}, tmp_path / "state")
    generator = torch.get_rng_state()
    expected = whole.run()
    resumed = Trial(quadratics(), 25, seed=1, **options)
    assert not torch.equal(resumed.update.graph, whole.update.graph)
    saved = load_checkpoint(tmp_path / "state")
    resumed.critic.load_state_dict(saved["critic"])
    resumed.update.load_state_dict(saved["update"])
    torch.set_rng_state(generator)
    assert resumed.run() == expected
    assert np.array_equal(resumed.copies(), whole.copies())
    assert np.array_equal(resumed.dual, whole.dual)
    assert torch.equal(resumed.kept.view, whole.kept.view)
    assert resumed.kept.waits == whole.kept.waits
    assert torch.equal(resumed.update.graph, whole.update.graph)


# --- real networks --------------------------------------------------------------------------------------------------------


SPEC = TeamSpec(3, 5, Discrete(4))
PARAMETERS = (5 * 4 + 4) + (4 * 1 + 1)
"""Of one agent's :func:`a_critic`."""


def a_critic(spec: TeamSpec = SPEC) -> LocalCritic:
    return LocalCritic(spec, hidden=[4], share="none")


def an_actor(spec: TeamSpec = SPEC) -> StochasticActor:
    return StochasticActor(spec, hidden=[4], share="none")


def wrapped_learner(spec: TeamSpec, update: Callable[[Update], Update], *, equal: bool = False, **extra: Any) -> Learner:
    """Two epochs of two minibatches per iteration; ``equal`` sets the critics to that of the first agent."""
    torch.manual_seed(0)
    actor, critic = an_actor(spec), a_critic(spec)
    if equal:
        with torch.no_grad():
            for agent in range(1, spec.n_agents):
                for own, first in zip(critic.agent_parameters([agent]), critic.agent_parameters([0]), strict=True):
                    own.copy_(first)
    env = ScriptedEnvironment(spec, random_script(spec, 3, 8))
    step = update(PpoClipUpdate(spec, epochs=2, minibatch_size=6))
    learner = learner_of(env, actor, critic=critic, update=step, **extra)
    torch.manual_seed(1)
    return learner


def parameters_of(learner: Learner) -> dict[str, Tensor]:
    named = [(n, p) for n, p in learner.named_parameters() if n.startswith(("actor.", "critic."))]
    return {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (SPEC, {"topology": "none", "interval_mean": 3.0, "interval_std": 2.0}),
        (TeamSpec(1, 5, Discrete(4)), {"interval_mean": 3.0, "interval_std": 2.0}),
        (TeamSpec(1, 5, Continuous(2)), {"topology": "ring", "share_actor": True}),
    ],
    ids=["none", "one discrete agent", "one continuous agent"],
)
def test_without_edges_training_is_that_of_the_step_bit_for_bit(spec: TeamSpec, options: dict[str, Any]) -> None:
    plain = wrapped_learner(spec, lambda step: step, equal=True)
    fit(plain, 2)
    wrapped = wrapped_learner(spec, lambda step: PdhgUpdate(spec, step=step, penalty=0.5, **options))
    fit(wrapped, 2)
    expected, found = parameters_of(plain), parameters_of(wrapped)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    metrics = wrapped.trainer.callback_metrics
    assert metrics["consensus/messages"] == metrics["consensus/bytes"] == metrics["consensus/dual"] == 0


@pytest.mark.parametrize(
    ("options", "messages"),
    [({}, 6), ({"topology": "ring"}, 6), ({"topology": [[0, 1], [1, 2]]}, 4), ({"dual": "node", "share_actor": True}, 6)],
)
def test_bytes_are_four_per_parameter_and_directed_edge(options: dict[str, Any], messages: int) -> None:
    learner = wrapped_learner(SPEC, lambda step: PdhgUpdate(SPEC, step=step, **options))
    fit(learner, 2)
    steps = 2 * 2  # epochs, minibatches: what the last iteration sent
    actor = (5 * 4 + 4) + (4 * 4 + 4) if options.get("share_actor") else 0
    networks = 2 if actor else 1
    metrics = learner.trainer.callback_metrics
    assert metrics["consensus/messages"] == steps * messages * networks
    assert metrics["consensus/bytes"] == steps * messages * 4 * (PARAMETERS + actor)


def test_shared_actors_start_equal_and_have_duals_of_their_own() -> None:
    learner = wrapped_learner(SPEC, lambda step: PdhgUpdate(SPEC, step=step, share_actor=True, penalty=0.5))
    policies = [torch.cat([p.flatten() for p in learner.actor.agent_parameters([agent])]) for agent in range(3)]
    assert torch.equal(policies[0], policies[1])
    assert torch.equal(policies[0], policies[2])
    fit(learner, 2)
    state = learner.state_dict()
    for name in ("actor", "critic"):
        assert state[f"update.copies.{name}.dual"].abs().max() > 0
        assert state[f"update.copies.{name}.dual"].sum(0).abs().max() < 1e-6
    assert set(state) >= {"update._extra_state", "update.copies.actor._extra_state"}


def test_own_actors_stay_what_they_were_when_attached() -> None:
    torch.manual_seed(0)
    untouched = an_actor()
    learner = wrapped_learner(SPEC, lambda step: PdhgUpdate(SPEC, step=step))
    for own, expected in zip(learner.actor.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_targets_start_from_the_equal_copies() -> None:
    learner = wrapped_learner(SPEC, lambda step: PdhgUpdate(SPEC, step=step), targets=SoftTargets(SPEC))
    first = torch.cat([p.flatten() for p in learner.critic.agent_parameters([0])])
    for agent in range(3):
        own = torch.cat([p.flatten() for p in learner.targets.critic().agent_parameters([agent])])
        assert torch.equal(own, first)


def test_agents_that_learn_one_after_another_exchange_one_by_one() -> None:
    """Shared actors under a sequential step: only the agent whose turn it is steps, and pulls its neighbours' copies."""
    spec = TeamSpec(3, 5, Discrete(4), team_reward=True)

    def wrap(step: Update) -> Update:
        return PdhgUpdate(spec, step=SequentialUpdate(spec, step=step), share_actor=True, dual="node")

    learner = wrapped_learner(spec, wrap)
    fit(learner, 1)
    # Per epoch and minibatch: each actor pulls 2 copies in its turn, then all critics exchange 6.
    assert learner.trainer.callback_metrics["consensus/messages"] == 2 * 2 * (3 * 2 + 6)


def test_the_critic_agreed_on_fits_the_mean_of_the_targets_and_the_gap_shrinks() -> None:
    """C1: rewarded differently, agents that learn alone fit their own targets, and those that agree the mean of them."""
    own = torch.tensor([1.0, -2.0, 4.0]).view(3, 1)
    found: dict[str, Tensor] = {}
    gaps: dict[str, list[float]] = {}
    for topology in ("none", "full"):
        torch.manual_seed(0)
        critic = CentralisedCritic(SPEC, hidden=[4], share="none", value_norm=False)
        rows = TensorDict({keys.STATE: torch.randn(16, 15)}, batch_size=[16])

        class RegressionUpdate(Update):
            def update(self, batch: TensorDictBase, learning: Learning) -> Metrics:
                for _ in range(100):
                    away = learning.critic.predict(batch) - own
                    learning.minimise(away.square().mean((0, 2)).sum(), None)
                return {}

        update = PdhgUpdate(SPEC, step=RegressionUpdate(), topology=topology, penalty=3.0)
        update.attach(UNUSED, critic)
        learning = Learning(UNUSED, critic, UNUSED, Descent(critic, 0.03), 0.0)
        gaps[topology] = [update.update(rows, learning)["consensus/gap"].item() for _ in range(5)]
        found[topology] = critic.predict(rows).detach()
    assert (found["none"] - own).abs().max() < 0.2
    assert (found["full"] - own.mean()).abs().max() < 0.01
    assert gaps["none"][-1] > 0.5
    assert gaps["full"][-1] < 0.1 * gaps["full"][0] < 0.1 * gaps["none"][0]


# --- in recipes -----------------------------------------------------------------------------------------------------------


PDHG = ["update=pdhg", "update.step=ppo_clip", "critic.share=none"]


def test_it_wraps_any_update_in_a_recipe(tmp_path: Path) -> None:
    for step in ("ppo_clip", "policy_gradient"):
        recipe = read(tmp_path, overrides=["update=pdhg", f"update.step={step}", "critic.share=none"])
        assert check_fit(recipe) == []


def test_happo_decentralised_trains(tmp_path: Path) -> None:
    text = """\
extends: happo
env: {num_envs: 4}
critic: {share: none, hidden: [8]}
actor: {hidden: [8]}
data: {steps: 5}
update: {type: pdhg, topology: ring, step: {type: sequential, step: {type: ppo_clip, epochs: 2, minibatch_size: 10}}}
"""
    (tmp_path / "decentralised.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "decentralised.yaml")
    dry_run(recipe)
    env = build_environment(recipe, torch.device("cpu"), 0)
    learner = build_learner(recipe, env)
    before = parameters_of(learner)
    fit(learner, 2)
    env.close()
    after = parameters_of(learner)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert learner.trainer.callback_metrics["consensus/gap"] > 0


def test_a_shared_critic_is_refused(tmp_path: Path) -> None:
    found = problem(tmp_path, overrides=PDHG[:2])
    assert "`pdhg` needs the trait `separate_parameters`, which critic `centralised`" in found.message
    assert found.remedy == "Set critic.share=none."


def test_actors_are_shared_only_where_each_has_its_own(tmp_path: Path) -> None:
    found = problem(tmp_path, overrides=[*PDHG, "update.share_actor=true"])
    assert "`separate_parameters`, which actor `stochastic`" in found.message
    assert found.remedy == "Set actor.share=none."
    assert check_fit(read(tmp_path, overrides=[*PDHG, "update.share_actor=true", "actor.share=none"])) == []


def test_actors_are_shared_only_where_they_learn_by_gradient(tmp_path: Path) -> None:
    step = "update: {type: pdhg, share_actor: true, step: {type: sequential, step: {type: trust_region}}}"
    head, _, tail = TEAM.partition("update:")
    text = f"{head}{step}\n{tail[tail.index('optimizer') :]}"
    found = problem(tmp_path, text, ["critic.share=none", "actor.share=none", "env.pooled=true"])
    assert "`pdhg` needs the trait `by_gradient`, which update.step `sequential`" in found.message
    assert "ppo_clip" in found.remedy


def test_a_wrapper_of_itself_is_refused() -> None:
    spec = TeamSpec(2, 1, Discrete(2))
    with pytest.raises(OptionError, match="cannot be `pdhg` itself"):
        PdhgUpdate(spec, step=PdhgUpdate(spec, step=PpoClipUpdate(spec)))
