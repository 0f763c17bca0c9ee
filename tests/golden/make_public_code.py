"""Make ``public_code.json``: what public implementations compute on small fixed batches, in double precision.

    python tests/golden/make_public_code.py --on-policy FOLDER --harl FOLDER --mat FOLDER --pymarl FOLDER --epymarl FOLDER

The folders are checkouts of marlbenchmark/on-policy, PKU-MARL/HARL, PKU-MARL/Multi-Agent-Transformer, oxwhirl/pymarl and
uoe-agents/epymarl at the commits of :data:`COMMITS`. Their functions and methods are called unchanged; in place of a network
stand its outputs as parameters, whose gradients are the result. Nothing of them is part of marlkit;
`tests/theory/test_public_code.py` reads numbers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

COMMITS = {
    "on_policy": "de66d7a4b23fac2513f56f96f73b3f5cb96695ac",
    "harl": "d539bad20f677bc4ce9fa200fa5de31b5f0b9d37",
    "mat": "be3ff49c8264d454c1fe2c41582aa2bfc98498c8",
    "pymarl": "c971afdceb34635d31b778021b0ef90d7af51e86",
    "epymarl": "cbc38c09588064eab978501d0f12c2cf58fa7fc2",
}
DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}
ROWS, STEPS, ENVS, AGENTS, MOVES, DIMS = 12, 6, 4, 3, 4, 2
DRAW = np.random.default_rng(0)

Arrays = dict[str, Any]


def bare(cls: Any, **attributes: Any) -> Any:
    """An object of a class without its constructor."""
    made = object.__new__(cls)
    if isinstance(made, nn.Module):
        nn.Module.__init__(made)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def parameter(values: np.ndarray) -> nn.Parameter:
    """An output of a network, whose gradient is looked at."""
    return nn.Parameter(torch.from_numpy(values.copy()))


def still(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    """An optimiser that leaves parameters, and their gradients, as they are."""
    return torch.optim.SGD(parameters, lr=0.0)


def gae() -> tuple[Arrays, Arrays]:
    """Advantages and returns of MAPPO's buffer, and advantages of MAT's, where no episode is truncated."""
    reward, value = DRAW.normal(size=(STEPS, ENVS, AGENTS, 1)), DRAW.normal(size=(STEPS + 1, ENVS, AGENTS, 1))
    mask = np.broadcast_to(DRAW.random((STEPS + 1, ENVS, 1, 1)) > 0.25, value.shape).astype(float)
    buffer = bare(
        importlib.import_module("onpolicy.utils.shared_buffer").SharedReplayBuffer,
        rewards=reward, value_preds=value.copy(), masks=mask, returns=np.zeros_like(value), advantages=np.zeros_like(reward),
        gamma=0.99, gae_lambda=0.95, algo="mappo",
        _use_gae=True, _use_popart=False, _use_valuenorm=False, _use_proper_time_limits=False,
    )  # fmt: skip
    buffer.compute_returns(value[-1])
    mappo = buffer.returns[:-1].copy()
    buffer.algo = "mat"
    buffer.compute_returns(value[-1])
    return {"reward": reward, "value": value, "mask": mask}, {"returns": mappo, "team_advantage": buffer.advantages}


def value_norm() -> tuple[Arrays, Arrays]:
    """The averages after each of some batches, and what they make of the last."""
    batches = DRAW.normal(3.0, 2.0, size=(4, ROWS, 1))
    norm = importlib.import_module("onpolicy.utils.valuenorm").ValueNorm(1)
    norm.tpdv = DOUBLE
    for name in ("running_mean", "running_mean_sq", "debiasing_term"):
        single = getattr(norm, name)
        delattr(norm, name)
        setattr(norm, name, single.detach().double())
    means, variances = [], []
    for batch in batches:
        norm.update(torch.from_numpy(batch))
        mean, variance = norm.running_mean_var()
        means.append(mean.item())
        variances.append(variance.item())
    normalised = norm.normalize(torch.from_numpy(batches[-1]))
    found = {"mean": means, "variance": variances, "normalised": normalised, "back": norm.denormalize(normalised)}
    return {"batches": batches}, found


def ppo() -> tuple[Arrays, Arrays]:
    """MAPPO's losses and their gradients: clipped policy, clipped Huber value, agents that are not alive."""
    given = {
        "log_prob": DRAW.normal(size=(ROWS, 1)), "old_log_prob": DRAW.normal(size=(ROWS, 1)),
        "advantage": DRAW.normal(size=(ROWS, 1)), "alive": (DRAW.random((ROWS, 1)) > 0.2).astype(float),
        "value": DRAW.normal(0.0, 3.0, (ROWS, 1)), "old_value": DRAW.normal(0.0, 3.0, (ROWS, 1)),
        "target": DRAW.normal(0.0, 3.0, (ROWS, 1)),
    }  # fmt: skip
    log_prob, value = parameter(given["log_prob"]), parameter(given["value"])
    policy = SimpleNamespace(
        evaluate_actions=lambda *_: (value, log_prob, torch.zeros(())),
        actor=nn.ParameterList([log_prob]), critic=nn.ParameterList([value]),
        actor_optimizer=still(log_prob), critic_optimizer=still(value),
    )  # fmt: skip
    trainer = bare(
        importlib.import_module("onpolicy.algorithms.r_mappo.r_mappo").R_MAPPO,
        policy=policy, tpdv=DOUBLE, clip_param=0.2, huber_delta=1.0, entropy_coef=0.0, value_loss_coef=1.0, max_grad_norm=1e9,
        value_normalizer=None, _use_max_grad_norm=True, _use_policy_active_masks=True, _use_value_active_masks=True,
        _use_huber_loss=True, _use_clipped_value_loss=True, _use_popart=False, _use_valuenorm=False,
    )  # fmt: skip
    sample = [None, None, None, None, None, given["old_value"], given["target"], None, given["alive"]]
    value_loss, _, policy_loss, *_ = trainer.ppo_update((*sample, given["old_log_prob"], given["advantage"], None))
    return given, {
        "policy_loss": policy_loss, "policy_gradient": log_prob.grad, "value_loss": value_loss, "value_gradient": value.grad,
    }  # fmt: skip


def happo() -> tuple[Arrays, Arrays]:
    """HAPPO's loss of one agent with continuous actions, weighted with the factor of the agents before, and its gradient."""
    given = _of_one_agent()
    log_prob = parameter(DRAW.normal(size=(ROWS, DIMS)))
    given["log_prob"] = log_prob.detach().clone()
    agent = bare(
        importlib.import_module("harl.algorithms.actors.happo").HAPPO,
        evaluate_actions=lambda *_: (log_prob, torch.zeros(()), None),
        actor=nn.ParameterList([log_prob]), actor_optimizer=still(log_prob), tpdv=DOUBLE, action_aggregation="prod",
        clip_param=0.2, entropy_coef=0.0, max_grad_norm=1e9, use_max_grad_norm=True, use_policy_active_masks=True,
    )  # fmt: skip
    loss, *_ = agent.update(_sample(given))
    return given, {"loss": loss, "gradient": log_prob.grad}


class LinearPolicy(nn.Module):
    """``N(W o, exp(s))``."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight, self.log_deviation = parameter(weight), parameter(np.zeros(DIMS))

    def evaluate_actions(self, observation: Any, _: Any, action: Any, *__: Any) -> tuple[Tensor, Tensor, Normal]:
        """Log-probabilities by dimension, an entropy, the distribution."""
        policy = Normal(torch.from_numpy(observation) @ self.weight, self.log_deviation.exp())
        return policy.log_prob(torch.from_numpy(action)), torch.zeros(()), policy


def hatrpo() -> tuple[Arrays, Arrays]:
    """HATRPO's whole step of one agent: gradient, conjugate gradients, step to the edge, line search."""
    given = _of_one_agent()
    given |= {"observation": DRAW.normal(size=(ROWS, 5)), "action": DRAW.normal(size=(ROWS, DIMS))}
    given["weight"] = DRAW.normal(size=(5, DIMS))
    module = importlib.import_module("harl.algorithms.actors.hatrpo")
    policy = LinearPolicy(given["weight"])
    module.StochasticPolicy = lambda *_: LinearPolicy(given["weight"])  # type: ignore[attr-defined]
    given["old_log_prob"] = policy.evaluate_actions(given["observation"], None, given["action"])[0].detach().numpy()
    agent = bare(
        module.HATRPO, actor=policy, evaluate_actions=policy.evaluate_actions, tpdv=DOUBLE, device=DOUBLE["device"],
        action_aggregation="prod", use_policy_active_masks=True, kl_threshold=0.01, ls_step=10, accept_ratio=0.5,
        backtrack_coeff=0.8, args=None, obs_space=None, act_space=None,
    )  # fmt: skip
    divergence, gain, *_ = agent.update(_sample(given))
    found = {"weight": policy.weight, "log_deviation": policy.log_deviation, "divergence": divergence, "gain": gain}
    return given, found


def _of_one_agent() -> Arrays:
    return {
        "old_log_prob": DRAW.normal(size=(ROWS, DIMS)), "advantage": DRAW.normal(size=(ROWS, 1)),
        "alive": (DRAW.random((ROWS, 1)) > 0.2).astype(float), "factor": np.exp(DRAW.normal(0.0, 0.3, (ROWS, 1))),
    }  # fmt: skip


def _sample(given: Arrays) -> tuple[Any, ...]:
    """A batch as HARL hands it on."""
    first = (given.get("observation"), None, given.get("action"), None, given["alive"])
    return (*first, given["old_log_prob"], given["advantage"], None, given["factor"])


def coma() -> tuple[Arrays, Arrays]:
    """COMA's targets, and the gradient of its policy loss, with unavailable actions and an episode that ends early."""
    ended = np.zeros((ENVS, STEPS, 1))
    ended[0, 3] = ended[1, -1] = 1.0
    available = DRAW.random((ENVS, STEPS + 1, AGENTS, MOVES)) > 0.2
    available[..., 0] = True
    given = {
        "reward": DRAW.normal(size=(ENVS, STEPS, 1)), "terminated": ended, "available": available.astype(float),
        "logits": DRAW.normal(size=(ENVS, STEPS + 1, AGENTS, MOVES)),
        "action": (DRAW.random((ENVS, STEPS + 1, AGENTS, MOVES)) * available).argmax(-1)[..., None],
        "q": DRAW.normal(size=(ENVS, STEPS + 1, AGENTS, MOVES)), "target_q": DRAW.normal(size=(ENVS, STEPS + 1, AGENTS, MOVES)),
    }  # fmt: skip
    logits, q, target_q = parameter(given["logits"]), parameter(given["q"]), torch.from_numpy(given["target_q"])
    counted = 1.0 - np.concatenate([np.zeros((ENVS, 1, 1)), ended[:, :-1].cumsum(1)], 1)
    longer = {"reward": given["reward"], "terminated": ended, "filled": counted}
    held = {"actions": given["action"], "avail_actions": given["available"]}
    held |= {name: np.concatenate([value, np.zeros((ENVS, 1, 1))], 1) for name, value in longer.items()}
    batch = bare(Batch, held={name: torch.from_numpy(value) for name, value in held.items()})
    mac = SimpleNamespace(init_hidden=lambda _: None, forward=lambda _, t: logits[:, t].softmax(-1))
    arguments = {
        "gamma": 0.99, "td_lambda": 0.8, "grad_norm_clip": 1e9, "target_update_interval": 1e9, "learner_log_interval": 1e9,
    }  # fmt: skip
    learner_module = importlib.import_module("learners.coma_learner")
    learner = bare(
        learner_module.COMALearner, args=SimpleNamespace(**arguments), n_agents=AGENTS, n_actions=MOVES, mac=mac,
        critic=lambda _, t: q[:, t : t + 1], target_critic=lambda _: target_q, agent_params=[logits], critic_params=[q],
        agent_optimiser=still(logits), critic_optimiser=still(q), critic_training_steps=0,
        last_target_update_step=0, log_stats_t=0,
    )  # fmt: skip
    learner.args.n_agents = AGENTS
    learner.train(batch, 0, 0)
    targets = learner_module.build_td_lambda_targets(
        torch.from_numpy(given["reward"]), torch.from_numpy(ended), torch.from_numpy(counted),
        target_q.gather(-1, torch.from_numpy(given["action"])).squeeze(-1), AGENTS, 0.99, 0.8,
    )  # fmt: skip
    return given | {"counted": counted}, {"targets": targets, "policy_gradient": logits.grad}


class Batch:
    """An episode batch as PyMARL hands it on."""

    batch_size, max_seq_length = ENVS, STEPS + 1
    held: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.held[name].clone()


def mat() -> tuple[Arrays, Arrays]:
    """Values and log-probabilities of the multi-agent transformer; the weights are part of what is given."""
    module = importlib.import_module("mat.algorithms.mat.algorithm.ma_transformer")
    network = module.MultiAgentTransformer(37, 5 + AGENTS, MOVES, AGENTS, 2, 8, 2).double()
    network.tpdv = DOUBLE
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.from_numpy(DRAW.normal(0.0, 0.3, tuple(weight.shape))))
        network.encoder.head[2].weight.fill_(1.0)  # marlkit leaves this scale and shift to the layer after it
        network.encoder.head[2].bias.zero_()
    observation = DRAW.normal(size=(ENVS, AGENTS, 5))
    seen = np.concatenate([observation, np.broadcast_to(np.eye(AGENTS), (ENVS, AGENTS, AGENTS))], -1)
    available = DRAW.random((ENVS, AGENTS, MOVES)) > 0.2
    available[..., 0] = True
    action = (DRAW.random(available.shape) * available).argmax(-1)[..., None]
    log_prob, value, _ = network(seen, seen, action, available.astype(float))
    weights = {name: weight for name, weight in network.named_parameters() if "state_encoder" not in name}
    given = {"observation": observation, "available": available.astype(float), "action": action, "weights": weights}
    return given, {"log_prob": log_prob, "value": value}


def q_learning() -> tuple[Arrays, Arrays]:
    """Losses and gradients of EPyMARL's learner: no mixer, VDN and QMIX, double or not; unavailable actions, early ends."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("learners", "components", "modules", "controllers")]:
        del sys.modules[name]
    sys.path.insert(0, sys.path.pop())  # EPyMARL's modules have the names of PyMARL's
    learner_module = importlib.import_module("learners.q_learner")
    ended = np.zeros((ENVS, STEPS, 1))
    ended[0, 3] = ended[1, -1] = 1.0
    available = DRAW.random((ENVS, STEPS + 1, AGENTS, MOVES)) > 0.3
    available[..., 0] = True
    given = {
        "reward": DRAW.normal(size=(ENVS, STEPS, 1)), "terminated": ended, "available": available.astype(float),
        "action": (DRAW.random((ENVS, STEPS + 1, AGENTS, MOVES)) * available).argmax(-1)[..., None],
        "q": DRAW.normal(size=(ENVS, STEPS + 1, AGENTS, MOVES)), "target_q": DRAW.normal(size=(ENVS, STEPS + 1, AGENTS, MOVES)),
        "state": DRAW.normal(size=(ENVS, STEPS + 1, 5)),
        "counted": 1.0 - np.concatenate([np.zeros((ENVS, 1, 1)), ended[:, :-1].cumsum(1)], 1),
    }  # fmt: skip
    arguments = SimpleNamespace(  # the discount is one that single precision holds, because EPyMARL rounds it
        n_agents=AGENTS, state_shape=5, mixing_embed_dim=4, hypernet_layers=2, hypernet_embed=6, gamma=0.875, grad_norm_clip=1e9,
        target_update_interval_or_tau=1e9, learner_log_interval=0, common_reward=True, standardise_rewards=False,
        standardise_returns=False,
    )  # fmt: skip
    mixers = {name: getattr(learner_module, f"{name}Mixer") for name in ("VDN", "Q")}
    mixing = {"none": (None, None), "sum": (mixers["VDN"](), mixers["VDN"]())}
    mixing["monotone"] = (mixers["Q"](arguments), mixers["Q"](arguments))
    found = {
        f"{name}_{'double' if double else 'single'}": _step_of_q_learning(learner_module, given, arguments, *pair, double)
        for name, pair in mixing.items()
        for double in (True, False)
    }
    weights = {name: dict(mixer.named_parameters()) for name, mixer in zip(("online", "target"), mixing["monotone"], strict=True)}
    return given | weights, found


def _step_of_q_learning(module: Any, given: Arrays, arguments: Any, mixer: Any, target_mixer: Any, double: bool) -> Arrays:
    q, target_q = parameter(given["q"]), torch.from_numpy(given["target_q"])
    longer = {name: given[name] for name in ("reward", "terminated")} | {"filled": given["counted"]}
    held = {"actions": given["action"], "avail_actions": given["available"], "state": given["state"]}
    held |= {name: np.concatenate([value, np.zeros((ENVS, 1, 1))], 1) for name, value in longer.items()}
    weights = [] if mixer is None else list(mixer.parameters())
    logged: Arrays = {}
    learner = bare(
        module.QLearner, args=SimpleNamespace(**vars(arguments), double_q=double), n_agents=AGENTS, params=[q, *weights],
        mac=SimpleNamespace(init_hidden=lambda _: None, forward=lambda _, t: q[:, t]),
        target_mac=SimpleNamespace(init_hidden=lambda _: None, forward=lambda _, t: target_q[:, t]),
        mixer=mixer, target_mixer=target_mixer, optimiser=still(q, *weights), training_steps=0, last_target_update_step=0,
        log_stats_t=-1, logger=SimpleNamespace(log_stat=lambda name, value, _: logged.update({name: value})),
    )  # fmt: skip
    learner.train(bare(Batch, held={name: torch.from_numpy(value) for name, value in held.items()}), 0, 0)
    gradients = {} if mixer is None else {name: weight.grad for name, weight in mixer.named_parameters()}
    return {"loss": logged["loss"], "gradient": q.grad, "weights": gradients}


CASES: tuple[Callable[[], tuple[Arrays, Arrays]], ...] = (gae, value_norm, ppo, happo, hatrpo, coma, mat, q_learning)


def plain(value: Any) -> Any:
    """As JSON holds it; a double is read back as the same double."""
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in COMMITS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=True)
    folders = vars(parser.parse_args())
    sys.path[:0] = [str(folders["on_policy"]), str(folders["harl"]), str(folders["mat"]), str(folders["pymarl"] / "src")]
    sys.path.append(str(folders["epymarl"] / "src"))
    for absent in ("harl.envs", "harl.envs.env_wrappers"):  # environments, which are not installed and not needed
        sys.modules[absent] = ModuleType(absent)
    for wrapper in ("ShareSubprocVecEnv", "ShareDummyVecEnv"):
        setattr(sys.modules["harl.envs.env_wrappers"], wrapper, None)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    cases = {}
    for case in CASES:
        given, found = case()
        cases[case.__name__] = {"given": plain(given), "found": plain(found)}
    file = Path(__file__).with_name("public_code.json")
    file.write_text(json.dumps({"commits": COMMITS, "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
