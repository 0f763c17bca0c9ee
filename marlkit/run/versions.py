"""The environment of a run: versions, machine and commit, without importing the packages."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("marlkit", "torch", "tensordict", "torchrl", "vmas", "lightning", "omegaconf", "numpy")


def versions() -> dict[str, str | int]:
    """Versions of Python and of the installed packages, processors, threads and, in a checkout, the commit, as plain data."""
    installed = {name: version for name in PACKAGES if (version := _installed(name))}
    machine: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    commit = commit_of(Path(__file__).parent)
    return {**installed, **machine} | ({"commit": commit} if commit else {})


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that tracks ``folder``, with ``-dirty`` where files differ from it; ``None`` elsewhere.

    An installed copy inside the checkout of another project is not tracked by it and does not have its commit.
    """
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", ".")
        return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
