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
from marlkit.saved import MAPPING, TEXT, Kind, refuse_misfit
from marlkit.spec import Discrete, TeamSpec

NONE, NORTH, SOUTH, WEST, EAST, LOAD = range(6)
"""The actions of every agent."""

Level = Annotated[int, Range(at_least=1, at_most=100)]
TRIALS = 200
"""Starts that are tried at construction, to see whether a map has room for its food."""


class Grids(NamedTuple):
    """What G grids hold: the F pieces of food, then the N agents. The grids come last, so that one operation serves them all.

    Cells are numbered row by row on a board with a wall around the grid. Food that is gone lies in the last cell, a corner of the
    wall, and so behind all other food.

    Attributes:
        cells: where they are, food in ascending order, ``[F + N, G]`` int64.
        levels: their levels, 0 for food that is gone, ``[F + N, G]`` float32.
        total: the level of all food at the start, ``[G]`` float32.
    """

    cells: Tensor
    levels: Tensor
    total: Tensor


class View(NamedTuple):
    """What the agents of G grids see and can do.

    Attributes:
        observation: ``[G, N, O]``.
        available: `NONE`, and the actions that have an effect, ``[G, N, 6]`` bool.
        beside: whether an agent stands beside a piece of food, ``[N, F, G]`` bool; it never does beside two.
    """

    observation: Tensor
    available: Tensor
    beside: Tensor


class ForagingEnvironment(AdapterEnvironment[View]):
    """Level-based foraging on B grids at once.

    In each step an agent stays (action 0), moves north, south, west or east (1 to 4), or loads the food beside it (5). Moves into
    walls and food, and loading where there is no food, are masked and do nothing. Agents whose next cell would be the same all
    stay; two may change places, and one may enter the cell of another that was held up. Food is eaten if the levels of the agents
    that load it add up to its own, and pays each of them

        reward_i = level_i · food / (levels of those who load it · levels of all food at the start),

    so that the rewards of a team add up to 1 where nothing is left. An episode terminates when all food is eaten, and is
    truncated after ``max_steps`` steps.

    An episode starts with the agents anywhere, their levels uniform from ``min_player_level`` to ``max_player_level``, and food
    that is not at the edge and at least 3 steps from other food; where none of the cells is left, the episode has less food. The
    highest level of food is the sum of the three lowest levels of agents. With `-coop` all food has it, otherwise levels are
    uniform from 1 to it, or to one below it.

    An agent observes row, column and level of each piece of food, of itself, and of the other agents; -1, -1, 0 stand at the end
    for what is gone or out of sight. With a limited sight, rows and columns count from the corner of what it sees; as in the
    package, near the upper and left edge other agents are seen up to twice as far.

    Equal to `lbforaging` 1.1.1 (ids `-v2`) and 2.0.0 (`-v3`) step by step. Starts are drawn from torch's global generator and
    follow the package's distribution, but for one thing: from its second episode on, the package keeps agents off the cells where
    those that are placed later ended the episode before.

    Args:
        runtime: device and seed.
        map: name of the map, `{rows}x{columns}-{agents}p-{food}f`, `-coop` for food that takes several agents. An id of the
            package such as `Foraging-2s-8x8-3p-3f-v3` says also sight and rule of levels.
        num_envs: number of grids B.
        max_steps: steps after which an episode is truncated.
        sight: how many cells agents see in each direction; `null`: what the map's name says, or else the whole grid.
        food_level_inclusive: whether food may have the highest level, as in `-v3`, which is harder; `null`: what the map's name
            says, or else not, as in `-v2`. Without effect on `-coop`.
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
        """What stays the same on all grids: the cells of the board, and in which order each agent sees food and agents."""
        rows, columns, n_agents, food = self.map.rows, self.map.columns, self.map.agents, self.map.food
        width = columns + 2
        cells = torch.arange((rows + 2) * width, device=self.device)
        row, column = cells // width - 1, cells % width - 1
        inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
        self._inside = cells[inside]
        self._fertile = (row > 0) & (row < rows - 1) & (column > 0) & (column < columns - 1)
        self._far = (row - row.unsqueeze(-1)).abs() + (column - column.unsqueeze(-1)).abs() > 2
        self._gone = len(cells) - 1
        self._place = torch.stack([row, column]).float()
        self._place[:, self._gone] = -1
        self._moves = torch.tensor([0, -width, width, -1, 1, 0], device=self.device)
        self._directions = self._moves[NORTH:LOAD].unsqueeze(-1)
        self._open = inside[(cells + self._directions).clamp(0, self._gone)]
        self._another = ~torch.eye(n_agents, dtype=torch.bool, device=self.device).unsqueeze(-1)
        orders = [[*range(food), food + one, *(food + i for i in range(n_agents) if i != one)] for one in range(n_agents)]
        self._order = torch.tensor(orders, device=self.device).flatten()
        told = torch.ones(food + n_agents, 3, dtype=torch.bool, device=self.device)
        told[food:, self._agent_features :] = False
        self._told = None if told.all() else told.flatten().nonzero().squeeze(-1)

    def _refuse_overcrowded(self, name: str) -> None:
        found = int((self._spawned(TRIALS).levels[: self.map.food] > 0).sum(0).max())
        if found < self.map.food:
            most = f"in {TRIALS} starts at most {found} had a place (not at the edge, 3 steps from other food, under no agent)"
            wanted = f"`{name}` has no room for {self.map.food} pieces of food"
            raise OptionError("map", f"{wanted}: {most}; take fewer or a larger grid")

    # --- the start of an episode ---------------------------------------------------------------------------------------------

    def _spawned(self, count: int) -> Grids:
        """The start of ``count`` grids."""
        lowest, highest = self._player_levels
        n_agents, device = self.map.agents, self.device
        agents = self._inside[torch.rand(count, len(self._inside), device=device).topk(n_agents).indices]
        levels = torch.randint(lowest, highest + 1, (count, n_agents), device=device).float()
        food, food_levels = self._grown(agents, self._highest_food(levels))
        cells, levels = torch.cat([food, agents], 1), torch.cat([food_levels, levels], 1)
        return Grids(cells.t().contiguous(), levels.t().contiguous(), food_levels.sum(1))

    def _highest_food(self, levels: Tensor) -> Tensor:
        """The highest level of food among agents of ``levels`` ``[G, N]``: ``[G]``."""
        if self._max_food_level is not None:
            return torch.full_like(levels[:, 0], self._max_food_level)
        return levels.topk(min(3, self.map.agents), largest=False).values.sum(-1)

    def _grown(self, agents: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """Cells and levels ``[G, F]`` of new food, piece after piece on the cells that are left."""
        if not (self.map.coop or self.map.inclusive):
            highest = (highest - 1).clamp(min=1)
        left = self._fertile.repeat(len(agents), 1).scatter_(1, agents, False)
        cells, levels = [], []
        for _ in range(self.map.food):
            drawn, cell = torch.rand(left.shape, device=self.device).masked_fill_(~left, -1.0).max(-1)
            level = highest if self.map.coop else (torch.rand_like(highest) * highest).floor().minimum(highest - 1) + 1
            cells.append(cell.masked_fill(drawn < 0, self._gone))
            levels.append(level.masked_fill(drawn < 0, 0.0))
            left = left & self._far[cell]
        return self._ordered(torch.stack(cells, 1), torch.stack(levels, 1), 1)

    def _ordered(self, food: Tensor, levels: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Food and its levels by ascending cells; what is gone comes last."""
        if self.map.food == 1:
            return food, levels
        food, order = food.sort(dim)
        return food, levels.gather(dim, order)

    # --- the episode ---------------------------------------------------------------------------------------------------------

    def restart(self) -> View:
        """New food and places on every grid."""
        self._grids = self._spawned(self.num_envs)
        self._view = self._seen(self._grids)
        return self._view

    def simulate(self, action: Tensor) -> Outcome[View]:
        """Load and move with actions ``[B, N]``; what is not available is `NONE`."""
        able = self._view.available.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        action = action.masked_fill(~able, NONE).t()
        reward, food, food_levels = self._loaded(action == LOAD)
        agents = self._moved(self._grids.cells[self.map.food :], action)
        levels = torch.cat([food_levels, self._grids.levels[self.map.food :]])
        self._grids = Grids(torch.cat([food, agents]), levels, self._grids.total)
        self._view = self._seen(self._grids)
        eaten = (food_levels == 0).all(0).unsqueeze(-1)
        return Outcome(self._view, reward.t().unsqueeze(-1), eaten, self._none)

    def _moved(self, agents: Tensor, action: Tensor) -> Tensor:
        """The agents' cells ``[N, B]`` after their moves; of those who would share a cell each stays where it is."""
        target = agents + self._moves.take(action)
        meets = (target.unsqueeze(0) == target.unsqueeze(1)) & self._another
        return torch.where(meets.any(0), agents, target)

    def _loaded(self, loads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reward ``[N, B]`` of those who load (``[N, B]`` bool), and the food ``[F, B]`` that is left, with its levels."""
        pieces = self.map.food
        food, food_levels, levels = self._grids.cells[:pieces], self._grids.levels[:pieces], self._grids.levels[pieces:]
        lifts = self._view.beside & loads.unsqueeze(1)
        strength = (lifts * levels.unsqueeze(1)).sum(0)
        lifted = strength >= food_levels
        worth = (lifts * torch.where(lifted, food_levels, 0.0)).sum(1)
        reward = levels * worth
        if self._normalises:
            reward = reward / (lifts * (strength * self._grids.total)).sum(1).clamp(min=1)
        if self._penalty:
            reward = reward.masked_fill(loads & (worth == 0), -self._penalty)
        return reward, *self._ordered(food.masked_fill(lifted, self._gone), food_levels.masked_fill(lifted, 0.0), 0)

    def proceed(self, seen: View, done: Tensor, finished: Tensor) -> View:
        """Start the grids ``finished`` ``[F]`` anew; what is seen where the next step starts."""
        if finished.numel() == self.num_envs:
            return self.restart()
        if finished.numel():
            fresh = self._spawned(finished.numel())
            view = self._seen(fresh)
            self._grids = Grids(*(old.index_copy(-1, finished, new) for old, new in zip(self._grids, fresh, strict=True)))
            self._view = View(*(old.index_copy(dim, finished, new) for old, dim, new in zip(seen, (0, 0, -1), view, strict=True)))
        return self._view

    # --- what is seen --------------------------------------------------------------------------------------------------------

    def observation(self, seen: View) -> Tensor:
        """``[B, N, O]``."""
        return seen.observation

    def available(self, seen: View) -> Tensor:
        """``[B, N, 6]``."""
        return seen.available

    def _seen(self, grids: Grids) -> View:
        food, agents = grids.cells.split([self.map.food, self.map.agents])
        ahead = (food - agents.unsqueeze(1)).unsqueeze(2) == self._directions
        beside = ahead.any(2)
        free = self._open.index_select(1, agents.flatten()).view(4, *agents.shape).transpose(0, 1) & ~ahead.any(1)
        loadable = beside.any(1, keepdim=True)
        available = torch.cat([torch.ones_like(loadable), free, loadable], 1)
        return View(self._observed(grids), available.permute(2, 0, 1).contiguous(), beside)

    def _observed(self, grids: Grids) -> Tensor:
        """Food, oneself and the others as each agent sees them, ``[G, N, O]``."""
        count, pieces, n_agents = grids.cells.shape[-1], self.map.food, self.map.agents
        place = self._place.index_select(1, grids.cells.flatten()).view(2, -1, count)
        entities = torch.stack([*place, grids.levels], 1).index_select(0, self._order).view(n_agents, -1, 3, count)
        if self.map.sight is not None:
            entities = self._in_sight(entities, entities[:, pieces : pieces + 1, :2])
        observation = entities.view(-1, count).t().contiguous().view(count, n_agents, -1)
        return observation if self._told is None else observation.index_select(-1, self._told)

    def _in_sight(self, entities: Tensor, own: Tensor) -> Tensor:
        """Of ``[N, F + N, 3, G]`` what agents at ``own`` ``[N, 1, 2, G]`` see, from the corner of what they see on."""
        assert self.map.sight is not None
        pieces, sight = self.map.food, self.map.sight
        place, level = entities.split([2, 1], 2)
        seen = place - (own - sight).clamp(min=0)
        near = ((place - own).abs() <= sight)[:, :pieces].all(2)
        within = ((seen >= 0) & (seen <= 2 * sight))[:, pieces:].all(2)
        entities = torch.cat([seen, level], 2)
        return torch.cat([_packed(entities[:, :pieces], near), _packed(entities[:, pieces:], within)], 1)

    # --- saving and drawing --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future of the grids but the global random generators."""
        return {"map": self.map.name, "steps": self._steps.clone(), "grids": self._grids._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, bit for bit if the global random generators are put back as well.

        Raises:
            MarlkitError: it was saved from another map or another number of grids.
            CheckpointError: an entry is not what these grids have there; names it.
        """
        steps = Kind("the numbers of steps", lambda value: isinstance(value, Tensor) and value.dim() == 1)
        refuse_misfit(state, {"map": TEXT, "steps": steps, "grids": MAPPING}, "state")
        saved = (state["map"], len(state["steps"]))
        if saved != (self.map.name, self.num_envs):
            here = f"{self.num_envs} of `{self.map.name}`"
            raise MarlkitError(f"the saved grids are {saved[1]} of `{saved[0]}`, these are {here}")
        refuse_misfit(state["steps"], self._steps, "steps")
        refuse_misfit(state["grids"], self._grids._asdict(), "grids")
        last = self._gone
        cells = Kind(f"cells from 0 to {last}", lambda value: bool(((value >= 0) & (value <= last)).all()))
        refuse_misfit(state["grids"]["cells"], cells, "grids.cells")
        self._steps = state["steps"].to(self.device, copy=True)
        self._grids = Grids(**{name: tensor.to(self.device) for name, tensor in state["grids"].items()})
        self._view = self._seen(self._grids)

    def draw(self, index: int = 0) -> Any:
        """Picture of grid ``index``, ``[height, width, 3]`` uint8: agents are round, food is square, each with its level."""
        place, levels = self._place[:, self._grids.cells[:, index]], self._grids.levels[:, index]
        rows = torch.cat([place, levels.unsqueeze(0)]).t().int().tolist()
        food = [row for row in rows[: self.map.food] if row[2] > 0]
        return draw_grid(self.map.rows, self.map.columns, food, rows[self.map.food :])


def _packed(entities: Tensor, shown: Tensor) -> Tensor:
    """Those of ``[N, K, 3, G]`` that are ``shown`` ``[N, K, G]``, in their order; at the end -1, -1, 0 in place of the others."""
    last = entities.shape[1]
    index = torch.where(shown, shown.cumsum(1) - 1, last).unsqueeze(2).expand_as(entities)
    nothing = entities.new_tensor([-1.0, -1.0, 0.0]).view(3, 1).expand(len(entities), last + 1, 3, entities.shape[-1])
    return nothing.scatter(1, index, entities)[:, :last]
