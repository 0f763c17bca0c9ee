"""Several processes that train together take the steps that one would take on the batches of all."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from ranks_of_gloo import SIZE, WithStream, learn_all, learner_of, learnt, played, ranks_run, tiny
from small_runs import VARIANTS
from tensordict import TensorDict
from torch import Tensor

from marlkit import keys, run
from marlkit.errors import CheckpointError, LostRankError, RecipeError, RunError
from marlkit.functional.reduce import standardise
from marlkit.nn.normalisers import ValueNormaliser
from marlkit.ranks import Ranks, rank_seed
from marlkit.recipe import load_recipe, shipped
from marlkit.run.checkpoint_io import load_checkpoint, save_checkpoint
from marlkit.run.checkpoints import LAST
from marlkit.run.ddp import RanksStrategy
from marlkit.run.metrics_file import read_metrics
from marlkit.run.start import can_be_started_again, new_trainer
from marlkit.run.use import EVALUATION_SEED
from marlkit.training.episode_returns import EpisodeReturns

RECIPES = sorted(shipped()) + [" ".join([name, *options]) for name, options in VARIANTS]

# --- what is learnt -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learnt_apart(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Batches, and what two ranks have learnt from their halves."""
    folder = tmp_path_factory.mktemp("ranks")
    batches = {name: played(tiny(name)) for name in RECIPES}
    for name, batch in batches.items():
        torch.save(batch, folder / f"{name}.batch")
    return batches, ranks_run(learn_all, folder, RECIPES, folder)


def flat(state: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor and number of a state."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    nested = {f"{name}.{key}": value[key] for name, value in state.items() if isinstance(value, dict) for key in value}
    return tensors | {name: torch.as_tensor(value) for name, value in nested.items()}


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_learn_what_one_learns_from_the_joined_batch(
    name: str, learnt_apart: tuple[dict[str, Any], list[dict[str, Any]]]
) -> None:
    batches, apart = learnt_apart
    batch, spec = batches[name]
    joined = flat(learnt(tiny(name), spec, batch, WithStream(5)))
    start = flat(learner_of(tiny(name), spec, Ranks()).state_dict())
    assert sum(not torch.equal(start[key], value) for key, value in joined.items()) > len(joined) / 4
    first, second = (flat(found[name]) for found in apart)
    assert first.keys() == second.keys() == joined.keys()
    for key, value in joined.items():
        assert torch.allclose(first[key], value, rtol=1e-7, atol=1e-9), key
        assert torch.equal(first[key], second[key]), key


# --- averages and draws ---------------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
VALUES = torch.randn(SIZE, 6, 3, 1, generator=GENERATOR, dtype=torch.float64)
ALIVE = torch.rand(VALUES.shape, generator=GENERATOR) < torch.tensor([0.9, 0.3]).reshape(-1, 1, 1, 1)
ENDED = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 0, 0], [0, 1, 0]]], dtype=torch.bool)
"""By rank, environment and step."""


def rollout(rank: int) -> TensorDict:
    """Two environments, three steps and two agents with the same reward."""
    reward = torch.arange(6.0).reshape(2, 3) + 10 * rank
    batch = TensorDict({}, batch_size=[2, 3])
    batch.set(keys.REWARD, reward.reshape(2, 3, 1, 1).expand(2, 3, 2, 1).clone())
    return batch.set(keys.DONE, ENDED[rank].unsqueeze(-1))


def facts(ranks: Ranks) -> dict[str, Any]:
    """The results on one of two ranks."""
    values, alive = VALUES[ranks.index], ALIVE[ranks.index]
    normaliser = ValueNormaliser(enabled=True).double()
    normaliser.update(values, ranks)
    torch.manual_seed(100 + ranks.index)
    before = torch.get_rng_state()
    with ranks.common():
        drawn = [torch.randperm(50)]
    untouched = torch.equal(before, torch.get_rng_state())
    with ranks.common():
        drawn.append(torch.randperm(50))
    parameters = [torch.ones(3), torch.full((2,), 2.0 + 1e-6 * ranks.index)]
    ranks.align(parameters)
    apart = ""
    try:
        ranks.align([torch.full((2,), 1.0 + ranks.index)])
    except RunError as error:
        apart = str(error)
    mixed = [torch.full((2,), float(ranks.index)), torch.full((2, 2), 4.0 * ranks.index, dtype=torch.float64)]
    ranks.mean_(mixed)
    return {
        "standardised": standardise(values, alive, mean=ranks.masked_mean),
        "normaliser": normaliser.state_dict(),
        "returns": EpisodeReturns().take(rollout(ranks.index), ranks),
        "drawn": drawn,
        "untouched": untouched,
        "aligned": parameters,
        "apart": apart,
        "mixed": mixed,
        "gathered": ranks.gather({"rank": ranks.index, "tensor": torch.tensor([ranks.index])}),
        "from_first": ranks.from_first(("a", ranks.index)),
        "largest": ranks.largest([ranks.index, -ranks.index, float("-inf")]),
        "metrics": ranks.mean_each({"b": torch.tensor(1.0 + ranks.index), "a": torch.tensor(3.0)}),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return ranks_run(facts, tmp_path_factory.mktemp("facts"))


def test_advantages_are_standardised_over_the_agents_alive_on_all_ranks(found: list[dict[str, Any]]) -> None:
    counted = VALUES[ALIVE]
    expected = (VALUES - counted.mean()) / (counted.std(correction=0) + 1e-5) * ALIVE
    torch.testing.assert_close(torch.stack([each["standardised"] for each in found]), expected)


def test_the_value_normaliser_sees_the_targets_of_all_ranks(found: list[dict[str, Any]]) -> None:
    for each in found:
        state = each["normaliser"]
        torch.testing.assert_close(state["mean"], VALUES.mean())
        torch.testing.assert_close(state["variance"], VALUES.var(correction=0))


def test_returns_are_those_of_the_episodes_that_ended_on_any_rank(found: list[dict[str, Any]]) -> None:
    # Rank 0: returns 0 (1 step), 1 + 2 (2 steps), 3 + 4 + 5 (3 steps); rank 1: 13 + 14 (2 steps).
    expected = {"episode/count": 4.0, "episode/reward": 7.5, "episode/return": 42 / 4, "episode/length": 2.0}
    assert [each["returns"] for each in found] == [expected, expected]


def test_common_draws_are_equal_and_leave_the_ranks_own_alone(found: list[dict[str, Any]]) -> None:
    (first, again), (second, also) = (each["drawn"] for each in found)
    assert torch.equal(first, second)
    assert torch.equal(again, also)
    assert not torch.equal(first, again)
    assert all(each["untouched"] for each in found)


def test_rounding_is_undone_and_more_is_refused(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert torch.equal(torch.cat(each["aligned"]), torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0]))
        assert "differ by 1 of the largest" in each["apart"]


def test_means_keep_shape_and_type(found: list[dict[str, Any]]) -> None:
    for each in found:
        flat_one, square = each["mixed"]
        assert torch.equal(flat_one, torch.full((2,), 0.5))
        assert torch.equal(square, torch.full((2, 2), 2.0, dtype=torch.float64))
        assert {name: value.item() for name, value in each["metrics"].items()} == {"b": 1.5, "a": 3.0}


def test_plain_data_reaches_the_first_rank_and_comes_from_it(found: list[dict[str, Any]]) -> None:
    assert found[0]["gathered"] == [{"rank": r, "tensor": torch.tensor([r])} for r in range(SIZE)]
    assert found[1]["gathered"] == []
    assert [each["from_first"] for each in found] == [("a", 0), ("a", 0)]
    assert [each["largest"] for each in found] == [[1.0, 0.0, float("-inf")]] * SIZE


def test_one_rank_is_the_identity() -> None:
    ranks, value, weight = Ranks(), torch.ones(3, requires_grad=True), torch.tensor([True, False, True])
    assert ranks.weigh(weight, value) is value
    assert ranks.mean(value) is value
    assert ranks.share(weight, torch.float32) == 1.0
    assert ranks.largest([2.0, -1.0]) == [2.0, -1.0]
    torch.manual_seed(3)
    expected = torch.randperm(9)
    torch.manual_seed(3)
    with ranks.common():
        assert torch.equal(torch.randperm(9), expected)


def test_seeds_of_ranks_are_further_apart_than_those_of_evaluations() -> None:
    assert rank_seed(7, 0) == 7
    seeds = {rank_seed(seed, rank) + late for seed in range(9) for rank in range(9) for late in (0, EVALUATION_SEED)}
    assert len(seeds) == 9 * 9 * 2


# --- whole runs -----------------------------------------------------------------------------------------------------------

STOPS_EARLY = """
import sys
import marlkit
from lightning.pytorch.callbacks import EarlyStopping

enough = EarlyStopping("evaluation/return", mode="max", stopping_threshold=-1000.0, strict=False)
print(marlkit.train(marlkit.load_recipe("mappo", sys.argv[2:]), sys.argv[1], progress=False, callbacks=[enough]))
"""

RUN = [
    "env.num_envs=4", "env.max_steps=8", "actor.hidden=[8]", "critic.hidden=[8]", "opponents.hidden=[8]", "opponents.memory=4",
    "opponents.every=2", "data.steps=10", "data.batch_size=20", "data.updates=2", "data.capacity=100", "data.warm_up=40",
    "update.epochs=2", "update.minibatch_size=20", "update.interval_mean=3", "actor.exploration=0.3", "actor.exploration_end=0.3",
    "trainer.evaluation_interval=2", "trainer.evaluation_episodes=2", "trainer.video=false", "trainer.checkpoint_seconds=0",
    "trainer.accelerator=cpu", "trainer.devices=2",
]  # fmt: skip


def overrides(name: str, *extra: str) -> list[str]:
    """Those of the options that the components of a recipe have."""
    entries = load_recipe(name).entries
    split = [(text, *text.partition("=")[0].rpartition(".")[::2]) for text in RUN]
    return [*(text for text, path, option in split if path in entries and option in entries[path].options), *extra]


def marlkit(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command, which starts the second rank itself."""
    command = [sys.executable, "-m", "marlkit", *arguments, "--no-progress"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done


def environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    return inherited | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}


def prolong(folder: Path, before: int, after: int) -> None:
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(f"iterations: {before}\n", f"iterations: {after}\n"))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, type(a)) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def last(folder: Path) -> dict[str, Any]:
    return load_checkpoint(folder / "checkpoints" / LAST)


def test_ranks_stop_together_when_a_callback_stops_the_training(tmp_path: Path) -> None:
    """Only the first rank evaluates; the others would continue, and wait for it without end."""
    (tmp_path / "script.py").write_text(STOPS_EARLY)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "runs"), *overrides("mappo", "trainer.iterations=6")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "mappo").iterdir()
    assert last(folder)["marlkit"]["iteration"] == 2  # the first evaluation


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("mappo", marks=pytest.mark.exhaustive), "f2a2_ddpg"])
def test_two_ranks_stopped_and_resumed_equal_two_that_were_not(name: str, tmp_path: Path) -> None:
    given = overrides(name, "trainer.diagnostics=[td_error]")
    whole = Path(marlkit("train", name, *given, "trainer.iterations=4", "--root", str(tmp_path / "a")).stdout.strip())
    cut = Path(marlkit("train", name, *given, "trainer.iterations=2", "--root", str(tmp_path / "b")).stdout.strip())
    prolong(cut, 2, 4)
    assert marlkit("resume", str(cut)).stdout.strip() == str(cut)
    ended, expected = last(cut), last(whole)
    for state in (ended, expected):
        state["marlkit"].pop("recipe")
    for part in ("state_dict", "optimizer_states", "marlkit"):
        assert same(ended[part], expected[part]), part
    assert not same(ended["marlkit"]["env"], ended["marlkit"]["others"][0]["env"])
    metrics = read_metrics(cut / "metrics.csv")
    assert metrics["iteration"] == [0, 1, 2, 3]
    assert metrics["frames"][-1] == SIZE * 4 * 10 * 4
    assert metrics["critic/td_error_sum"] == pytest.approx(list(itertools.accumulate(metrics["critic/td_error"])))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank whose checkpoint is marked as one of two."""
    given = overrides("mappo", "trainer.iterations=1", "trainer.devices=1")
    folder = run.train(load_recipe("mappo", given), tmp_path_factory.mktemp("runs"), progress=False)
    saved = last(folder)
    saved["marlkit"] |= {"ranks": {"size": 2, "stream": torch.get_rng_state()}, "others": []}
    save_checkpoint(saved, folder / "checkpoints" / LAST)
    return folder


def test_another_number_of_ranks_is_refused(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained by 2 ranks .*now asks for 1.*Restore the recipe.yaml"):
        run.resume(finished, progress=False)


def test_a_run_of_several_ranks_is_evaluated_like_any(finished: Path) -> None:
    assert "evaluation/return" in run.evaluate(finished, checkpoint="last")


def test_a_gpu_that_is_not_there_is_refused() -> None:
    devices = torch.cuda.device_count() + 1
    with pytest.raises(RecipeError, match=rf"GPU {devices - 1} is not there"):
        run.train(load_recipe("mappo", ["trainer.accelerator=cuda", f"trainer.devices={devices}"]), "nowhere", progress=False)


def test_torchrun_with_another_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=r"torchrun has started 2 processes, but trainer.devices x trainer.nodes is 1"):
        run.train(load_recipe("mappo", overrides("mappo", "trainer.devices=1")), tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


PROGRAM = """
import sys
import marlkit

marlkit.train(marlkit.load_recipe("mappo", {given}), "runs", progress=False)
"""


@pytest.mark.parametrize("given", ["-c", "standard input"])
def test_a_program_that_cannot_be_started_again_is_refused_before_any_folder(given: str, tmp_path: Path) -> None:
    text = PROGRAM.format(given=overrides("mappo"))
    command = [sys.executable, *(["-c", text] if given == "-c" else [])]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=120, env=environment(), cwd=tmp_path, check=False
    )
    assert "RecipeError" in done.stderr
    assert "trainer.devices: 2 ranks need a program that can be started once more" in done.stderr
    assert "a script in a file (`python train.py`), or set trainer.devices=1" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ps1", "file", "spec", "expected"),
    [
        (False, __file__, None, True),
        (False, "absent.py", None, False),
        (False, "-c", SimpleNamespace(name="marlkit.__main__"), True),
        (False, __file__, SimpleNamespace(name="__main__"), False),
        (True, __file__, None, False),
    ],
)
def test_what_can_be_started_again(
    ps1: bool, file: str, spec: SimpleNamespace | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))
    monkeypatch.setattr(sys, "argv", [file])
    if ps1:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert can_be_started_again() is expected


def test_a_lost_rank_has_the_same_message_in_the_exchanges_of_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[/a/b.cc:12] Connection closed by peer [127.0.0.1]:1. This may indicate more.")

    strategy = RanksStrategy()
    monkeypatch.setattr(RanksStrategy, "global_rank", 1)
    monkeypatch.setattr(RanksStrategy, "world_size", 2)
    for name, arguments in {"barrier": (), "broadcast": (3,), "setup_distributed": ()}.items():
        monkeypatch.setattr(DDPStrategy, name, fail)
        with pytest.raises(
            LostRankError, match=r"rank 1 of 2 can no longer .*stopped \(Connection closed by peer \[127.0.0.1\]:1\)\."
        ):
            getattr(strategy, name)(*arguments)


def test_lightning_takes_no_signals(tmp_path: Path) -> None:
    handlers = {signum: signal.getsignal(signum) for signum in signal.valid_signals()}
    trainer = new_trainer(load_recipe("mappo"), tmp_path, torch.device("cpu"), progress=False, profile=False, callbacks=[])
    trainer._signal_connector.register_signal_handlers()
    assert {signum: signal.getsignal(signum) for signum in signal.valid_signals()} == handlers


def children(process: int) -> Sequence[int]:
    """Ids of the processes that a process has started."""
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(text) for text in listed.read_text().split()] if listed.exists() else []


def runs(process: int) -> bool:
    """Whether a process still runs; a zombie may remain in the process table."""
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the second rank in /proc")
@pytest.mark.parametrize(
    ("victim", "signum"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGTERM), (1, signal.SIGINT)]
)
def test_what_happens_to_one_rank_ends_all(victim: int, signum: signal.Signals, tmp_path: Path) -> None:
    given = overrides("mappo", "trainer.iterations=100000", "trainer.evaluation_interval=0", "--root", str(tmp_path))
    command = [sys.executable, "-m", "marlkit", "train", "mappo", *given, "--no-progress"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else what a shell in the background ignores stays ignored
    with (tmp_path / "log").open("w") as log:
        main = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("mappo/*/checkpoints/last.ckpt")):
        time.sleep(0.1)
    ranks = [main.pid, *children(main.pid)]
    assert len(ranks) == SIZE
    os.kill(ranks[victim], signum)
    code = main.wait(60)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and runs(ranks[1]):
        time.sleep(0.1)
    assert not runs(ranks[1])
    (folder,) = (tmp_path / "mappo").iterdir()
    assert len(last(folder)["marlkit"]["others"]) == SIZE - 1
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text
    if signum == signal.SIGKILL:
        assert code == (-signum if victim == 0 else 2)
        assert "can no longer reach the others: one of them has stopped" in text
        assert f"`marlkit resume {folder}` continues" in text
    else:
        done = last(folder)["marlkit"]["iteration"]
        assert code == 128 + signum
        assert text.count(f"interrupted after iteration {done}. Go on with: marlkit resume {folder}\n") == 1
        assert read_metrics(folder / "metrics.csv")["iteration"] == list(range(done))
