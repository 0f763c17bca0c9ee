"""Edits of a real checkpoint at random: each is refused by the name of an entry, or trains on; nothing ends in a traceback."""

from __future__ import annotations

import copy
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small, states

import marlkit
from marlkit import run
from marlkit.errors import CheckpointError
from marlkit.recipe import load_recipe
from marlkit.run.checkpoint_io import INVENTORY
from marlkit.run.checkpoints import BEST, LAST

EDITS = 40
STRANGE: list[Any] = [
    None, -1, 10**30, float("nan"), "word", [], {}, {"a": 1}, [1, 2], True, -5.5, torch.zeros(3), b"x", (1,), torch.zeros(0),
    torch.tensor(float("nan")),
]  # fmt: skip
RESHAPED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.float() if t.dtype is torch.float64 else t.double(),
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten()[:0],
    lambda t: t.to_sparse(),
    lambda t: torch.full_like(t, float("nan"), dtype=torch.float32),
    lambda t: t.expand(2, *t.shape),
]
Place = tuple[Any, ...]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has an iteration left to train."""
    return made("mappo", tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def replaying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another, that learns from stored steps."""
    return made("maddpg", tmp_path_factory.mktemp("runs"))


def made(name: str, root: Path) -> Path:
    given = small(name, "trainer.iterations=2", "trainer.evaluation_interval=0")
    folder = run.train(load_recipe(name, given), root, progress=False)
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    (folder / "recipe.yaml").write_text(text.replace("  iterations: 2\n", "  iterations: 3\n"), encoding="utf-8")
    return folder


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every entry, and what it holds."""
    if place:
        yield place
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*place, key))
    elif isinstance(value, list) and len(value) < 40:
        for key in range(len(value)):
            yield from places(value[key], (*place, key))


def at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def edited(saved: dict[str, Any], found: list[Place], draw: random.Random) -> tuple[dict[str, Any], str]:
    """A copy with one random edit, and what was done."""
    by_part: dict[Place, list[Place]] = {}
    for place in found:
        by_part.setdefault(place[:3], []).append(place)
    changed, place = copy.deepcopy(saved), draw.choice(by_part[draw.choice(sorted(by_part, key=str))])
    parent, key = at(changed, place[:-1]), place[-1]
    value, kind = parent[key], draw.choice(["drop", "strange", "add", "tensor", "swap"])
    if kind == "drop":
        del parent[key]
    elif kind == "add":
        value.update(surplus=1) if isinstance(value, dict) else parent.__setitem__(key, [value])
    elif kind == "tensor" and isinstance(value, torch.Tensor):
        parent[key] = draw.choice(RESHAPED)(value)
    elif kind == "swap":
        other = draw.choice([each for each in found if each[: len(place)] != place and place[: len(each)] != each])
        parent[key], at(changed, other[:-1])[other[-1]] = at(changed, other), value
    else:
        parent[key] = draw.choice(STRANGE)
    return changed, f"{kind} {place}"


def tried(use: Callable[[], Any], path: Path, edit: str) -> bool:
    """Whether something is refused by the name of the file; any other error fails the test."""
    try:
        use()
    except CheckpointError as error:
        return str(path) in str(error) or pytest.fail(f"{edit}: {error}")
    except Exception as error:
        raise AssertionError(f"{edit}: {error!r}") from error
    return False


@pytest.mark.parametrize("name", ["stopped", "replaying"])
@pytest.mark.parametrize("listed", [True, False], ids=["with its inventory", "of an older version"])
def test_an_edited_checkpoint_is_refused_by_name_or_trains(name: str, listed: bool, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    path = folder / "checkpoints" / LAST
    whole, saved = path.read_bytes(), states(folder)
    found = [place for place in places(saved) if place[0] != INVENTORY]
    if not listed:
        del saved[INVENTORY]
        # What a scenario keeps in its objects is only known to the inventory.
        found = [place for place in found if place[2:4] != ("world", "objects")]
    draw, refused, count = random.Random(0), 0, EDITS if listed else EDITS // 4
    try:
        for number in range(count):
            changed, edit = edited(saved, found, draw)
            torch.save(changed, path)
            if number % 5 == 0:
                tried(lambda: marlkit.load_policy(folder, "last"), path, edit)
            if number % 20 == 0:
                tried(lambda: run.evaluate(folder, episodes=2, checkpoint="last"), path, edit)
            is_refused = tried(lambda: run.resume(folder, progress=False), path, edit)
            assert is_refused or not listed, f"{edit}: trains on"
            refused += is_refused
    finally:
        path.write_bytes(whole)
    assert refused > count / 2


def refusal(folder: Path, change: Callable[[dict[str, Any]], Any], *, listed: bool = False) -> str:
    """The error of a resume after a change, by default of a checkpoint without inventory."""
    path = folder / "checkpoints" / LAST
    whole, saved = path.read_bytes(), states(folder)
    if not listed:
        del saved[INVENTORY]
    change(saved)
    torch.save(saved, path)
    try:
        with pytest.raises(CheckpointError) as caught:
            run.resume(folder, progress=False)
    finally:
        path.write_bytes(whole)
    return str(caught.value)


def moments(saved: dict[str, Any]) -> dict[str, Any]:
    return next(iter(saved["optimizer_states"][0]["state"].values()))


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "exp_avg` is a tensor float32 [1], where": lambda saved: moments(saved).update(exp_avg=torch.zeros(1)),
    "exp_avg_sq` is a tensor float64": lambda saved: moments(saved).update(exp_avg_sq=moments(saved)["exp_avg_sq"].double()),
    "'exp_avg']` is a sparse_coo": lambda saved: moments(saved).update(exp_avg=moments(saved)["exp_avg"].to_sparse()),
    "step` is a tensor float32 [2]": lambda saved: moments(saved).update(step=torch.zeros(2)),
    "exp_avg` holds NaN": lambda saved: moments(saved)["exp_avg"].fill_(float("nan")),
    "holds `optimizer_states[0].state[0].surplus`": lambda saved: moments(saved).update(surplus=1),
    "optimizer_states[0].state` is 1000": lambda saved: saved["optimizer_states"][0]["state"].update({1000: moments(saved)}),
    "param_groups[0].betas` is": lambda saved: saved["optimizer_states"][0]["param_groups"][0].update(betas=(5.0, 0.1)),
    "param_groups[0].lr` is": lambda saved: saved["optimizer_states"][0]["param_groups"][0].update(lr=-1.0),
    "param_groups[0].params` is a list of 1": lambda saved: saved["optimizer_states"][0]["param_groups"][0].update(params=[0]),
    "optimizer_states` is a list of 0": lambda saved: saved.update(optimizer_states=[]),
    "marlkit.iteration` is -1": lambda saved: saved["marlkit"].update(iteration=-1),
    "counts 2 iterations": lambda saved: saved["marlkit"].update(iteration=10**9),
    "marlkit.frames` is 2.5": lambda saved: saved["marlkit"].update(frames=2.5),
    "marlkit.spec.n_agents` is 7": lambda saved: saved["marlkit"]["spec"].update(n_agents=7),
    "marlkit.returns.running` is a tensor float32 [9]": lambda saved: saved["marlkit"]["returns"].update(running=torch.zeros(9)),
    "marlkit.rng.numpy[2]` is 10": lambda saved: saved["marlkit"]["rng"]["numpy"].__setitem__(2, 10**6),
    "marlkit.rng.torch` is a tensor float32 [1]": lambda saved: saved["marlkit"]["rng"].update(torch=torch.zeros(1)),
    "no state of the generators": lambda saved: saved["marlkit"]["rng"]["torch"].zero_(),
    "pytorch-lightning_version` is 'new'": lambda saved: saved.update({"pytorch-lightning_version": "new"}),
    "lacks `callbacks.Checkpoints`": lambda saved: saved["callbacks"].clear(),
    "the state of env (VmasEnvironment)": lambda saved: saved["marlkit"]["env"]["world"].update(tensors=[torch.zeros(9)] * 99),
}  # fmt: skip


@pytest.mark.parametrize("named", CHANGES)
def test_what_does_not_fit_is_named(stopped: Path, named: str) -> None:
    said = refusal(stopped, CHANGES[named])
    assert named in said
    assert said.startswith(str(stopped / "checkpoints" / LAST))


def test_stored_steps_are_held_to_the_key_table_and_the_capacity(replaying: Path) -> None:
    def agents(saved: dict[str, Any]) -> dict[str, Any]:
        return saved["marlkit"]["data"]["kept"]["agents"]

    assert "data.kept.agents.action` is a tensor float64" in refusal(
        replaying, lambda saved: agents(saved).update(action=agents(saved)["action"].double())
    )
    assert "not of as many steps" in refusal(replaying, lambda saved: agents(saved).update(action=agents(saved)["action"][:3]))
    assert "data.kept.next.agents.reward` holds NaN" in refusal(
        replaying, lambda saved: saved["marlkit"]["data"]["kept"]["next"]["agents"]["reward"][0].fill_(float("nan"))
    )
    assert "`position` is 10000" in refusal(replaying, lambda saved: saved["marlkit"]["data"].update(position=10**5))


def test_an_entry_that_another_component_would_miss_is_missed_by_the_inventory(stopped: Path) -> None:
    said = refusal(stopped, lambda saved: saved["optimizer_states"][0]["state"].pop(1), listed=True)
    assert "has been altered: `optimizer_states[0].state.1" in said or "has been altered: `optimizer_states[0].state[1]" in said


# --- bit rot and other devices ----------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_or_is_in_the_padding(stopped: Path) -> None:
    path = stopped / "checkpoints" / LAST
    whole, saved = path.read_bytes(), states(stopped)
    with zipfile.ZipFile(path) as archive:
        tensors = [part for part in archive.infolist() if "/data/" in part.filename and part.file_size > 8]
    draw = random.Random(1)
    for part in draw.sample(tensors, 20):
        rotten = bytearray(whole)
        start = whole.index(part.filename.encode(), part.header_offset) + len(part.filename)
        begin = start + int.from_bytes(whole[part.header_offset + 28 : part.header_offset + 30], "little")
        rotten[begin + draw.randrange(part.file_size)] ^= 1 << draw.randrange(8)
        path.write_bytes(rotten)
        with pytest.raises(CheckpointError, match=r"last\.ckpt: is damaged: the bytes of its part .* have changed"):
            run.resume(stopped, progress=False)
    path.write_bytes(whole)
    assert saved["marlkit"]["iteration"] == 2


def test_a_whole_checkpoint_beside_a_damaged_one_is_suggested(stopped: Path) -> None:
    path = stopped / "checkpoints" / LAST
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(CheckpointError, match=r"best\.ckpt beside it is whole: `--checkpoint best`"):
            run.resume(stopped, progress=False)
        (stopped / "checkpoints" / BEST).rename(stopped / "checkpoints" / "away")
        with pytest.raises(CheckpointError, match=r"is damaged.*Use another checkpoint of the run"):
            run.resume(stopped, progress=False)
        (stopped / "checkpoints" / "away").rename(stopped / "checkpoints" / BEST)
    finally:
        path.write_bytes(whole)


def test_a_checkpoint_of_a_gpu_is_resumed_on_a_cpu(stopped: Path, tmp_path: Path) -> None:
    path = stopped / "checkpoints" / LAST
    whole = path.read_bytes()
    marked = tmp_path / "marked.ckpt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(marked, "w", zipfile.ZIP_STORED) as new:
        for part in old.namelist():
            content = old.read(part)
            if part.endswith("data.pkl"):
                # Where each storage was: a text of three or six bytes.
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            new.writestr(part, content)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(marked, weights_only=True)
    path.write_bytes(marked.read_bytes())
    run.resume(stopped, progress=False)
    assert states(stopped)["marlkit"]["iteration"] == 3
    path.write_bytes(whole)
