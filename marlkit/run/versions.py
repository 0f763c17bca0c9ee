"""The environment of a run: versions, machine and commit, without importing the packages."""

from __future__ import annotations

import json
import platform
import subprocess
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("marlkit", "torch", "tensordict", "torchrl", "vmas", "lightning", "omegaconf", "numpy")


def versions(*, threads: int | None = None, device: torch.device | None = None) -> dict[str, str | int]:
    """Versions of Python and of the installed packages, processors, threads and, in a checkout, the commit, as plain data.

    Args:
        threads: of torch; ``None``: as many as it uses now.
        device: that is trained on; left out if ``None``.
    """
    import torch  # here, so that reading what a run notes does not need it

    installed = {name: version for name in PACKAGES if (version := _installed(name))}
    machine: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device is not None:
        machine["device"] = device.type
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    commit = commit_of(Path(__file__).parent)
    return {**installed, **machine} | ({"commit": commit} if commit else {})


DECISIVE = {
    "threads": "threads",
    "torch": "torch",
    "device": "device",
    "cpu_capability": "vector instructions",
    "gpu": "GPU",
}
"""What decides the last bits of a training's numbers: sums are taken in another order."""


def read_versions(path: Path) -> dict[str, Any]:
    """What ``versions.json`` of a run notes; empty, after a warning, if it cannot be read."""
    if not path.exists():
        return {}
    try:
        if not path.is_file():  # reading a pipe would wait for ever
            raise OSError("it is no file")
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        noted = error
    if isinstance(noted, dict):
        return noted
    found = noted if isinstance(noted, Exception) else f"it holds a {type(noted).__name__}"
    warnings.warn(f"{path}: is ignored, because it notes no versions ({found}). Remove it to end this warning.", stacklevel=2)
    return {}


def warn_of_other_process(path: Path, device: torch.device) -> None:
    """Warn where a run is resumed in another way than its ``versions.json`` notes, so that its last bits will differ."""
    now = versions(device=device)
    noted = read_versions(path)
    plain = {name: noted[name] for name in DECISIVE if isinstance(noted.get(name), (str, int))}
    changed = [f"{DECISIVE[name]} {was} (now {now.get(name, 'none')})" for name, was in plain.items() if now.get(name) != was]
    if changed:
        message = f"{path.parent} was trained with {', '.join(changed)}: it goes on, but not bit for bit as it would have."
        remedy = " Set trainer.threads in its recipe.yaml to continue exactly." if "threads" in changed[0] else ""
        warnings.warn(message + remedy, stacklevel=2)


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
