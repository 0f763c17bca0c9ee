"""Level-based foraging: agents on a grid collect food that the weaker ones only carry together.

Christianos, Schäfer and Albrecht 2020, "Shared Experience Actor-Critic for Multi-Agent Reinforcement Learning", arXiv:2006.07169;
the rules are those of their package `lbforaging`.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from marlkit import rng
from marlkit.component import Runtime
from marlkit.contract import Contract
from marlkit.envs._adapter import POOLED, WRITES, AdapterEnvironment, Outcome, Pooling
from marlkit.envs._foraging import maps
from marlkit.envs._foraging.drawing import draw_grid
from marlkit.errors import MarlkitError, OptionError
from marlkit.options import NonNegativeFloat, PositiveInt, Range
from marlkit.saved import TEXT, Kind, refuse_misfit
from marlkit.spec import Discrete, TeamSpec

NONE, NORTH, SOUTH, WEST, EAST, LOAD = range(6)
"""The actions of every agent."""

Level = Annotated[int, Range(at_least=1, at_most=100)]
TRIALS = 200
"""Starts that are tried at construction, to see whether a map has room for its food."""


class Grids(NamedTuple):
    """What G grids hold. Cells are numbered row by row on a board with a wall around the grid; cell 0 is a corner of the wall.

    Attributes:
        agents: the agents' cells, ``[G, N]`` int64.
        levels: their levels, ``[G, N]`` float32.
        food: the cells of the food, ascending, ``[G, F]`` int64; 0 for what found no place.
        food_levels: its levels, ``[G, F]`` float32; 0 for what is gone.
        total: the level of all food at the start, ``[G, 1]`` float32.
    """

    agents: Tensor
    levels: Tensor
    food: Tensor
    food_levels: Tensor
    total: Tensor


class View(NamedTuple):
    """What the agents of G grids see and can do.

    Attributes:
        observation: ``[G, N, O]``.
        available: the actions that have an effect, and `NONE`, ``[G, N, 6]`` bool.
        beside: whether an agent stands beside a piece of food, ``[G, N, F]`` bool; it never does beside two.
    """

    observation: Tensor
    available: Tensor
    beside: Tensor


class ForagingEnvironment(AdapterEnvironment[View]):
    """Level-based foraging on B grids at once.

    In each step an agent stays (action 0), moves north, south, west or east (1 to 4), or loads the food beside it (5). Moves into a
    wall or food, and loading where there is no food, are masked and do nothing. Of agents that would enter one cell none moves;
    two may change places. Food is eaten if the levels of the agents that load it add up to its own, and pays each of them

        reward_i = level_i · food / (levels of those who load it · levels of all food at the start),

    so that the rewards of a team add up to 1 where nothing is left. An episode terminates when all food is eaten, and is truncated
    after ``max_steps`` steps.

    An episode starts with the agents anywhere, their levels uniform from ``min_player_level`` to ``max_player_level``, and food
    that is not at the edge and at least 3 steps from other food; where none of the cells is left, the episode has less food. The
    highest level of food is the sum of the three lowest levels of agents. With `-coop` all food has it, otherwise levels are
    uniform from 1 to it, or to one below it.

    An agent observes row, column and level of each piece of food, of itself, and of the other agents; -1, -1, 0 stand at the end
    for what is gone or out of sight. With a limited sight, rows and columns count from the corner of what it sees; as in the
    package, near the upper and left edge other agents are seen up to twice as far.

    Equal to `lbforaging` 1.1.1 (ids `-v2`) and 2.0.0 (`-v3`) step by step. Starts are drawn from torch's global generator and follow
    the package's distribution, but for one thing: after its first episode, it keeps agents off the cells on which those placed later
    ended the episode before.

    Args:
        runtime: device and seed.
        map: name of the map, `{rows}x{columns}-{agents}p-{food}f`, `-coop` for food that takes several agents. An id of the package
            such as `Foraging-2s-8x8-3p-3f-v3` says also sight and rule of levels.
        num_envs: number of grids B.
        max_steps: steps after which an episode is truncated.
        sight: how many cells agents see in each direction; `null`: what the map's name says, or else the whole grid.
        food_level_inclusive: whether food may have the highest level, as in `-v3`, which is harder; `null`: what the map's name says,
            or else not, as in `-v2`. Without effect on `-coop`.
        min_player_level: lowest level of an agent.
        max_player_level: highest level of an agent.
        max_food_level: highest level of food in place of the sum of the three lowest levels of agents; 1: everyone can eat alone.
        observe_agent_levels: whether agents see the levels of agents, their own among them.
        normalise_reward: whether the rewards of a team add up to 1; otherwise food pays its level times the agent's.
        penalty: what loading in vain costs an agent.
        reward: each agent's own, or the mean or sum over the team for every agent.

    Raises:
        OptionError: there is no such map, it has no room for its food, or its name and another option disagree.
    """

    contract = Contract(
        writes=WRITES,
        traits=("discrete", *POOLED),
        check="marlkit.envs._foraging.maps:check",
    )

    def __init__(
        self,
        runtime: Runtime,
        *,
        map: str = "8x8-2p-2f-coop",
        num_envs: PositiveInt = 64,
        max_steps: PositiveInt = 50,
        sight: PositiveInt | None = None,
        food_level_inclusive: bool | None = None,
        min_player_level: Level = 1,
        max_player_level: Level = 2,
        max_food_level: Level | None = None,
        observe_agent_levels: bool = True,
        normalise_reward: bool = True,
        penalty: NonNegativeFloat = 0.0,
        reward: Pooling = "individual",
    ) -> None:
        super().__init__(runtime, num_envs=num_envs, max_steps=max_steps, reward=reward)
        for option, message in maps.check(self.options):
            raise OptionError(option, message)
        self.map = maps.read(map, sight, food_level_inclusive)
        self.name = f"foraging map `{map}`"
        self._player_levels = (min_player_level, max_player_level)
        self._max_food_level = max_food_level
        self._agent_features = 3 if observe_agent_levels else 2
        self._normalises, self._penalty = normalise_reward, penalty
        self.prepare(
            TeamSpec(
                n_agents=self.map.agents,
                observation=3 * self.map.food + self._agent_features * self.map.agents,
                action=Discrete(6),
                horizon=max_steps,
                team_reward=self.pools_reward,
            )
        )
        self._lay_out()
        with rng.isolated(runtime.seed):
            self._refuse_overcrowded(map)
            self._grids = self._spawned(num_envs)
        self._view = self._seen(self._grids)

    def _lay_out(self) -> None:
        """What stays the same on all grids: the board's cells, its inside, and the agents in the order in which each sees them."""
        rows, columns, agents = self.map.rows, self.map.columns, self.map.agents
        width = columns + 2
        cells = torch.arange((rows + 2) * width, device=self.device)
        row, column = cells // width - 1, cells % width - 1
        self._place = torch.stack([row, column], -1).float()
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        self._inside = cells[inside]
        self._fertile = (row > 0) & (row < rows - 1) & (column > 0) & (column < columns - 1)
        self._moves = torch.tensor([0, -width, width, -1, 1, 0], device=self.device)
        self._directions = self._moves[NORTH:LOAD]
        self._open = inside[(cells.unsqueeze(-1) + self._directions).clamp(0, len(cells) - 1)]
        everyone = range(agents)
        order = [[one, *(other for other in everyone if other != one)] for one in everyone]
        self._order = torch.tensor(order, device=self.device)
        self._another = ~torch.eye(agents, dtype=torch.bool, device=self.device)

    def _refuse_overcrowded(self, name: str) -> None:
        found = int((self._spawned(TRIALS).food_levels > 0).sum(-1).max())
        if found < self.map.food:
            most = f"at most {found} had a place in {TRIALS} starts (not at the edge, 3 steps from other food, not under an agent)"
            raise OptionError("map", f"`{name}` has no room for {self.map.food} pieces of food: {most}; take fewer or a larger grid")

    # --- the start of an episode ---------------------------------------------------------------------------------------------

    def _spawned(self, count: int) -> Grids:
        """The start of ``count`` grids."""
        lowest, highest = self._player_levels
        n_agents, device = self.map.agents, self.device
        chosen = torch.rand(count, len(self._inside), device=device).topk(n_agents).indices
        agents = self._inside[chosen]
        levels = torch.randint(lowest, highest + 1, (count, n_agents), device=device).float()
        food, food_levels = self._grown(agents, self._highest_food(levels))
        return Grids(agents, levels, food, food_levels, food_levels.sum(-1, keepdim=True))

    def _highest_food(self, levels: Tensor) -> Tensor:
        """The highest level of food among agents of ``levels`` ``[G, N]``: ``[G]``."""
        if self._max_food_level is not None:
            return torch.full_like(levels[:, 0], self._max_food_level)
        return levels.topk(min(3, self.map.agents), largest=False).values.sum(-1)

    def _grown(self, agents: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """Cells and levels ``[G, F]`` of new food, piece after piece among the cells that are left."""
        left = self._fertile.repeat(len(agents), 1).scatter_(1, agents, False)
        if not (self.map.coop or self.map.inclusive):
            highest = (highest - 1).clamp(min=1)
        pieces = []
        for _ in range(self.map.food):
            drawn, cell = torch.where(left, torch.rand(left.shape, device=self.device), -1.0).max(-1)
            level = highest if self.map.coop else (torch.rand_like(highest) * highest).floor().clamp(max=highest - 1) + 1
            pieces.append(torch.stack([cell, level.long()]).masked_fill(drawn < 0, 0))
            left = left & ((self._place - self._place[cell].unsqueeze(1)).abs().sum(-1) > 2)
        food, food_levels = torch.stack(pieces, -1)
        food, order = food.sort(-1)
        return food, food_levels.gather(-1, order).float()

    # --- the episode ---------------------------------------------------------------------------------------------------------

    def restart(self) -> View:
        """New food and places on every grid."""
        self._grids = self._spawned(self.num_envs)
        self._view = self._seen(self._grids)
        return self._view

    def simulate(self, action: Tensor) -> Outcome[View]:
        """Move, then load, with actions ``[B, N]``; what is not available is `NONE`."""
        grids = self._grids
        able = self._view.available.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        action = action.masked_fill(~able, NONE)
        reward, food_levels = self._loaded(grids, action == LOAD)
        self._grids = grids._replace(agents=self._moved(grids.agents, action), food_levels=food_levels)
        self._view = self._seen(self._grids)
        eaten = (food_levels == 0).all(-1, keepdim=True)
        return Outcome(self._view, reward.unsqueeze(-1), eaten, self._none)

    def _moved(self, agents: Tensor, action: Tensor) -> Tensor:
        """The agents' cells ``[B, N]`` after their moves; who would share a cell with another stays."""
        target = agents + self._moves[action]
        meets = (target.unsqueeze(-1) == target.unsqueeze(-2)) & self._another
        return torch.where(meets.any(-1), agents, target)

    def _loaded(self, grids: Grids, loads: Tensor) -> tuple[Tensor, Tensor]:
        """The reward ``[B, N]`` of those who load (``[B, N]`` bool), and the levels ``[B, F]`` of the food that is left."""
        carried = (self._view.beside & loads.unsqueeze(-1)).float()
        strength = (carried * grids.levels.unsqueeze(-1)).sum(1)
        lifted = (strength >= grids.food_levels) & (strength > 0)
        worth = torch.where(lifted, grids.food_levels, 0.0)
        shares = strength * grids.total if self._normalises else torch.ones_like(strength)
        worth_of_own, shares_of_own = (carried @ torch.stack([worth, shares], -1)).unbind(-1)
        reward = grids.levels * worth_of_own / shares_of_own.clamp(min=1)
        if self._penalty:
            reward = torch.where(loads & (worth_of_own == 0), -self._penalty, reward)
        return reward, torch.where(lifted, 0.0, grids.food_levels)

    def proceed(self, seen: View, done: Tensor, finished: Tensor) -> View:
        """Start the grids ``finished`` ``[F]`` anew; what is seen where the next step starts."""
        if finished.numel() == self.num_envs:
            return self.restart()
        if finished.numel():
            grids = self._spawned(finished.numel())
            self._grids = Grids(*(old.index_copy(0, finished, new) for old, new in zip(self._grids, grids, strict=True)))
            fresh = self._seen(grids)
            self._view = View(*(old.index_copy(0, finished, new) for old, new in zip(seen, fresh, strict=True)))
        return self._view

    # --- what is seen --------------------------------------------------------------------------------------------------------

    def observation(self, seen: View) -> Tensor:
        """``[B, N, O]``."""
        return seen.observation

    def available(self, seen: View) -> Tensor:
        """``[B, N, 6]``."""
        return seen.available

    def _seen(self, grids: Grids) -> View:
        present = grids.food_levels > 0
        ahead = (grids.food.unsqueeze(1) - grids.agents.unsqueeze(2)).unsqueeze(-1) == self._directions
        ahead &= present[:, None, :, None]
        beside = ahead.any(-1)
        free = self._open[grids.agents] & ~ahead.any(2)
        loadable = beside.any(-1, keepdim=True)
        available = torch.cat([torch.ones_like(loadable), free, loadable], -1)
        return View(self._observed(grids, present), available, beside)

    def _observed(self, grids: Grids, present: Tensor) -> Tensor:
        """Food, oneself and the others as each agent sees them, ``[G, N, O]``."""
        place, agent_place = self._place[grids.food].unsqueeze(1), self._place[grids.agents]
        levels = grids.levels[:, self._order].unsqueeze(-1)
        others, shape = agent_place[:, self._order], (*grids.agents.shape, -1)
        food_levels = grids.food_levels[:, None, :, None]
        if self.map.sight is None:
            food = _packed(torch.cat([place, food_levels], -1), present.unsqueeze(1)).expand(*shape, 3)
        else:
            centre = agent_place.unsqueeze(2)
            near = ((place - centre).abs() <= self.map.sight).all(-1)
            corner = (centre - self.map.sight).clamp(min=0)
            food = torch.cat([place - corner, food_levels.expand(*shape, 1)], -1)
            food = _packed(food, near & present.unsqueeze(1))
            others = others - corner
            near = ((others >= 0) & (others <= 2 * self.map.sight)).all(-1)
            others = _packed(torch.cat([others, levels], -1), near)
            others, levels = others[..., :2], others[..., 2:]
        if self._agent_features == 3:
            others = torch.cat([others, levels], -1)
        return torch.cat([food.flatten(2), others.flatten(2)], -1)

    # --- saving and drawing --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of the grids but the global random generators."""
        grids = {name: tensor.clone() for name, tensor in self._grids._asdict().items()}
        return {"map": self.map.name, "steps": self._steps.clone(), "grids": grids}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the global random generators are put back as well.

        Raises:
            MarlkitError: it was saved from another map or another number of grids.
            CheckpointError: an entry is not what these grids have there; names it.
        """
        steps = Kind("the numbers of steps", lambda value: isinstance(value, Tensor) and value.dim() == 1)
        refuse_misfit(state, {"map": TEXT, "steps": steps, "grids": Kind("the grids", lambda value: True)}, "state")
        saved = (state["map"], len(state["steps"]))
        if saved != (self.map.name, self.num_envs):
            here = f"{self.num_envs} of `{self.map.name}`"
            raise MarlkitError(f"the saved grids are {saved[1]} of `{saved[0]}`, these are {here}")
        refuse_misfit(state["steps"], self._steps, "steps")
        refuse_misfit(state["grids"], self._grids._asdict(), "grids")
        last = len(self._place) - 1
        cells = Kind(f"cells from 0 to {last}", lambda value: bool(((value >= 0) & (value <= last)).all()))
        for name in ("agents", "food"):
            refuse_misfit(state["grids"][name], cells, f"grids.{name}")
        self._steps = state["steps"].to(self.device, copy=True)
        self._grids = Grids(**{name: tensor.to(self.device, copy=True) for name, tensor in state["grids"].items()})
        self._view = self._seen(self._grids)

    def draw(self, index: int = 0) -> Any:
        """Picture of grid ``index``, ``[height, width, 3]`` uint8: agents are discs, food squares, each with its level."""
        grids = self._grids
        agents = torch.cat([self._place[grids.agents[index]], grids.levels[index].unsqueeze(-1)], -1)
        food = torch.cat([self._place[grids.food[index]], grids.food_levels[index].unsqueeze(-1)], -1)
        shown = (food[food[:, 2] > 0], agents)
        return draw_grid(self.map.rows, self.map.columns, *(rows.int().tolist() for rows in shown))


def _packed(entries: Tensor, shown: Tensor) -> Tensor:
    """The entries ``[*, K, 3]`` that are ``shown`` ``[*, K]``, in their order; -1, -1, 0 in place of the others, at the end."""
    behind = entries.shape[-2]
    index = torch.where(shown, shown.cumsum(-1) - 1, behind).unsqueeze(-1).expand_as(entries)
    nothing = entries.new_tensor([-1.0, -1.0, 0.0]).repeat(*entries.shape[:-2], behind + 1, 1)
    return nothing.scatter(-2, index, entries)[..., :behind, :]
