"""Pictures: every shape lands where the camera says, in its colour, and the camera holds still."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vmas")

from small_scenarios import OPTIONS
from vmas.scenarios import load
from vmas.simulator.core import Agent, Box, Landmark, Line, Sphere, World
from vmas.simulator.scenario import BaseScenario

from marlkit import rng
from marlkit.envs._vmas.drawing import Camera, draw_world
from marlkit.envs._vmas.scenarios import scenario_files

CAMERA = Camera(x=0.0, y=0.0, half_width=2.0, half_height=1.0)
RED, GREEN, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


class Still(BaseScenario):
    """A disc at (1, 0.5), a box lying across (-1, 0) and a line along the lower edge, in the second environment of two."""

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        world = World(batch_dim, device, x_semidim=1.9)
        world.add_agent(Agent("disc", shape=Sphere(0.2), color=RED))
        world.add_landmark(Landmark("box", shape=Box(length=0.8, width=0.2), color=GREEN))
        world.add_landmark(Landmark("line", shape=Line(length=2.0), color=BLUE))
        world.add_landmark(Landmark("parked", shape=Sphere(0.2), color=BLUE))
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        box, line, parked = self.world.landmarks
        places = {self.world.agents[0]: (1.0, 0.5), box: (-1.0, 0.0), line: (0.0, -0.8), parked: (-900.0, 3.0)}
        for entity, (x, y) in places.items():
            entity.set_pos(torch.tensor([[-9.0, -9.0], [x, y]]), batch_index=None)
        box.set_rot(torch.tensor([[0.0], [torch.pi / 2]]), batch_index=None)

    def observation(self, agent: Agent) -> torch.Tensor:
        return agent.state.pos

    def reward(self, agent: Agent) -> torch.Tensor:
        return agent.state.pos[:, 0]


@pytest.fixture
def scenario() -> Still:
    still = Still()
    still.env_make_world(2, torch.device("cpu"))
    still.env_reset_world_at(None)
    return still


def pixel(picture: Any, x: float, y: float) -> tuple[int, ...]:
    """The colour at a point of the world, with 480 pixels for four units of length."""
    return tuple(int(part) for part in picture[round((1 - y) * 120), round((x + 2) * 120)])


def test_shapes_lie_where_they_are_turned_as_they_are_and_coloured_as_they_are(scenario: Still) -> None:
    picture = draw_world(scenario, 1, CAMERA)
    assert picture.shape == (240, 480, 3)
    assert picture.dtype == np.uint8
    background = pixel(picture, 0.0, 0.0)
    assert min(background) > 240
    assert pixel(picture, 1.0, 0.5) == pixel(picture, 1.15, 0.5) == (255, 0, 0)
    assert pixel(picture, 1.25, 0.5) == pixel(picture, 1.0, 0.25) == background
    # The box is 0.8 long and turned by a quarter, so that it is tall and narrow.
    assert pixel(picture, -1.0, 0.35) == pixel(picture, -1.0, -0.35) == (0, 255, 0)
    assert pixel(picture, -0.7, 0.0) == pixel(picture, -1.0, 0.45) == background
    assert pixel(picture, 0.9, -0.8)[2] > 200 > pixel(picture, 0.9, -0.8)[0]
    assert pixel(picture, 1.1, -0.8) == background


def test_what_is_not_shown_is_not_drawn(scenario: Still) -> None:
    scenario.world.agents[0].is_rendering[:] = False
    assert min(pixel(draw_world(scenario, 1, CAMERA), 1.0, 0.5)) > 240


def test_the_camera_sees_everything_but_what_was_parked_far_away(scenario: Still) -> None:
    scenario.viewer_zoom = 1.0
    camera = Camera.over(scenario, 1)
    # x: the bounds of the world at 1.9 and 5 % more; y: VMAS' own view, since everything lies inside it.
    assert camera.half_width == pytest.approx(1.05 * 1.9)
    assert camera.half_height == pytest.approx(1.05 * 1.9 / 2 if 1.05 * 1.9 / 2 > 1 else 1.0)
    assert Camera.over(scenario, 0).half_height == pytest.approx(9 + 1.05 * 0.4, abs=0.3)


@pytest.mark.parametrize("name", scenario_files())
def test_every_scenario_can_be_drawn(name: str) -> None:
    with rng.isolated(0):
        scenario = load(str(scenario_files()[name])).Scenario()
        scenario.env_make_world(1, torch.device("cpu"), **OPTIONS.get(name, {}))
        scenario.env_reset_world_at(None)
    picture = draw_world(scenario, 0)
    assert max(picture.shape[:2]) == 480
    assert all(side % 2 == 0 for side in picture.shape[:2])
    # Somewhere there is an agent: colours far from the light background.
    assert (picture.min(-1) < 128).any()


def test_a_position_that_is_not_a_number_does_not_stop_the_video(scenario: Still) -> None:
    scenario.world.agents[0].state.pos[1] = float("nan")
    assert draw_world(scenario, 1, CAMERA).shape == (240, 480, 3)
