"""Which networks named by a dotted path run code outside of torch; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from marlkit.contract import Code

LIBRARIES = ("torch.nn", "tensordict.nn", "torchrl.modules")
"""Their classes of modules compute; none of them runs what its arguments name."""


def code(options: Mapping[str, Any]) -> Iterator[Code]:
    """The classes that ``network`` and ``network_options`` name, less those of :data:`LIBRARIES`."""
    given = options.get("network_options") or {}
    paths = [("network", options["network"], given), *(("network_options", path, None) for path in _paths(given))]
    for option, path, arguments in paths:
        if str(path).rpartition(".")[0] not in LIBRARIES:
            yield Code(option, str(path), arguments)


def _paths(value: Any) -> Iterator[Any]:
    """Every ``{path: …}`` inside a value, as :class:`marlkit.nn.named_network.NamedNetwork` reads them."""
    if isinstance(value, Mapping):
        if set(value) == {"path"}:
            yield value["path"]
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _paths(inner)
