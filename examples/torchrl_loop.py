"""An actor and a critic of marlkit in a plain TorchRL program: environment, collector, GAE, clipped loss and Adam are TorchRL's.

Run it by `python examples/torchrl_loop.py --iterations 30`.
"""

from __future__ import annotations

import argparse

import torch
from torchrl.collectors import Collector
from torchrl.envs import VmasEnv
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from marlkit import keys
from marlkit.actors.stochastic import StochasticActor
from marlkit.critics.local import LocalCritic
from marlkit.spec import Continuous, TeamSpec

ENVS, STEPS, AGENTS, EPOCHS = 64, 50, 2, 20


def main() -> None:
    """Collect, estimate, update."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=10)
    length = ENVS * STEPS * parser.parse_args().iterations
    torch.manual_seed(0)
    # Samples of a normal policy are not squashed: VMAS is to clamp them to [-1, 1].
    task = {"n_agents": AGENTS, "collisions": False, "max_steps": STEPS, "seed": 0}
    env = VmasEnv("navigation", num_envs=ENVS, clamp_actions=True, **task)
    # Components are built for a team: 2 agents with as many features as they observe, and 2 forces in [-1, 1] as actions.
    features = env.full_observation_spec[keys.OBSERVATION].shape[-1]
    spec = TeamSpec(AGENTS, features, Continuous(2, ((-1.0, -1.0),) * AGENTS, ((1.0, 1.0),) * AGENTS))
    actor, critic = StochasticActor(spec), LocalCritic(spec, value_norm=False)

    # TorchRL's keys are marlkit's: everything of an agent is under "agents", with the agents on an axis behind the batch.
    ends = {name: ("agents", name) for name in ("done", "terminated")}
    values = {"value": keys.STATE_VALUE, "advantage": keys.ADVANTAGE, "value_target": keys.VALUE_TARGET}
    team = {**values, **ends, "reward": ("agents", "reward")}
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    advantage.set_keys(**team)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.0, normalize_advantage=True, normalize_advantage_exclude_dims=(-2,))
    loss.set_keys(**team, action=keys.ACTION, sample_log_prob=keys.LOG_PROB)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)

    frames = {"frames_per_batch": ENVS * STEPS, "total_frames": length}
    for number, batch in enumerate(Collector(env, actor, auto_register_policy_transforms=False, **frames)):
        for name, key in ends.items():  # GAE wants them for each agent: [B, T, N, 1]
            batch.set(("next", *key), batch["next", name].unsqueeze(-1).expand_as(batch[keys.REWARD]))
        with torch.no_grad():
            advantage(batch)
        for _ in range(EPOCHS):
            found = loss(batch)
            optimizer.zero_grad()
            (found["loss_objective"] + found["loss_critic"]).backward()
            optimizer.step()
        print(f"{number:4}  reward per step {batch[keys.REWARD].mean():8.4f}  critic's loss {found['loss_critic']:8.3f}")


if __name__ == "__main__":
    main()
