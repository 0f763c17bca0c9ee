"""The wheel: the package and its recipes, which need nothing of the checkout beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import marlkit
from marlkit.recipe import shipped

CHECKOUT = Path(__file__).parents[1]
FIND = "import marlkit; from marlkit.recipe import shipped; print(marlkit.__file__, *shipped().values(), sep='\\n')"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, unpacked; built without network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=CHECKOUT, check=True, capture_output=True, timeout=60)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def said_by(site: Path, folder: Path, *arguments: str) -> list[str]:
    """The lines that Python writes which runs in ``folder`` and finds marlkit in ``site``."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, check=True, capture_output=True, text=True, timeout=60
    )
    return done.stdout.splitlines()


def test_a_checkout_finds_the_recipes_at_its_top() -> None:
    assert Path(marlkit.__file__) == CHECKOUT / "marlkit" / "__init__.py"
    assert sorted(shipped().values()) == sorted((CHECKOUT / "recipes").glob("*.yaml"))
    assert "mappo" in shipped()


def test_a_wheel_brings_the_same_recipes(installed: Path, tmp_path: Path) -> None:
    package, *recipes = map(Path, said_by(installed, tmp_path, "-c", FIND))
    assert package == installed / "marlkit" / "__init__.py"
    assert {file.stem: file.read_text() for file in recipes} == {name: file.read_text() for name, file in shipped().items()}
    assert {file.parent for file in recipes} == {installed / "marlkit" / "recipes"}


def test_a_wheel_lists_and_checks(installed: Path, tmp_path: Path) -> None:
    listed = "\n".join(said_by(installed, tmp_path, "-m", "marlkit", "list"))
    assert all(name in listed for name in (*shipped(), "ppo_clip", "centralised"))
    assert said_by(installed, tmp_path, "-m", "marlkit", "check", "mappo")


def test_a_folder_of_recipes_beside_an_installed_package_is_somebody_elses(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed / "marlkit", site / "marlkit")
    (site / "recipes").mkdir()
    (site / "recipes" / "apple_pie.yaml").write_text("flour: 300\n")
    package, *recipes = map(Path, said_by(site, tmp_path, "-c", FIND))
    assert package.is_relative_to(site)
    assert sorted(file.stem for file in recipes) == sorted(shipped())


def test_a_wheel_trains(installed: Path, tmp_path: Path) -> None:
    tiny = [
        "env.num_envs=4",
        "data.steps=8",
        "env.max_steps=8",
        "actor.hidden=[8]",
        "critic.hidden=[8]",
        "update.minibatch_size=16",
    ]
    short = ["update.epochs=1", "trainer.iterations=1", "trainer.evaluation_episodes=2", "trainer.video=false"]
    *_, folder = said_by(installed, tmp_path, "-m", "marlkit", "train", "mappo", *tiny, *short, "--no-progress")
    assert (tmp_path / folder / "checkpoints" / "last.ckpt").is_file()
