"""Versions: the packages listed, no import of simulators, and the right commit."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from marlkit.run.versions import commit_of, versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_it_names_the_versions_and_the_machine_as_plain_data() -> None:
    found = versions()
    assert found["torch"] == metadata.version("torch")
    assert found["lightning"] == metadata.version("lightning")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]
    assert json.loads(json.dumps(found)) == found


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = metadata.version

    def version(name: str) -> str:
        if name == "vmas":
            raise metadata.PackageNotFoundError(name)
        return genuine(name)

    monkeypatch.setattr(metadata, "version", version)
    assert "vmas" not in versions()


def test_simulators_are_not_imported() -> None:
    code = "import sys; from marlkit.run.versions import versions; versions(); print({'vmas', 'torchrl'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "set()"


def test_the_commit_is_that_of_the_checkout_that_tracks_the_folder(tmp_path: Path) -> None:
    package, installed = tmp_path / "package", tmp_path / ".venv"
    for folder in (package, installed):
        folder.mkdir()
        (folder / "module.py").write_text("x = 1\n")
    assert commit_of(package) is None
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(package) == head
    assert commit_of(installed) is None
    (package / "module.py").write_text("x = 2\n")
    assert commit_of(package) == f"{head}-dirty"
