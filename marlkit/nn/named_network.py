"""Networks that are named by the dotted path of their class: of torch, tensordict, TorchRL or of a user.

No text is evaluated. Only classes that extend :class:`torch.nn.Module` are accepted, so that a recipe cannot call what it likes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key_list
from torch import Tensor, nn

from marlkit import keys
from marlkit.errors import OptionError
from marlkit.keys import Key
from marlkit.spec import TeamSpec

OUTPUTS = "F"
"""Stands for the number of outputs per agent, as ``N``, ``O``, ``S``, ``A`` and ``D`` stand for the sizes of the key table."""
ROWS = 2
"""Rows of the batch that a new network is tried out on."""


class NamedNetwork(nn.Module):
    """A module of the user, evaluated for every agent: keys of a batch ``[*]`` to ``[*, N, F]``.

    A module of tensordict reads its ``in_keys``, and the key that it writes is the result. Any other module is given one tensor
    ``[*, N, I]``: what each agent observes, or the state once for each agent.

    In ``options``, the words ``N``, ``O``, ``S``, ``A``, ``D`` and ``F`` stand for sizes, and ``{path: torch.nn.Tanh}`` for the
    class of that path, anywhere inside lists and mappings too.

    Args:
        spec: the team.
        network: dotted path of a class.
        options: its arguments.
        outputs: F.
        reads: the keys that it may read, first the one that a module without ``in_keys`` is given.

    Raises:
        OptionError: ``network`` names no class of modules; or one that refuses ``network_options``, cannot be evaluated on a
            batch of zeros, reads other keys, or gives a tensor of another shape.
    """

    def __init__(self, spec: TeamSpec, network: str, options: Mapping[str, Any], *, outputs: int, reads: Sequence[Key]) -> None:
        super().__init__()
        self.path = network
        self.n_agents = spec.n_agents
        self.sizes = spec.sizes() | {OUTPUTS: outputs}
        self.module: Any = _built(network, options, self.sizes)
        self.given = reads[0]
        self.is_tensordict_module = isinstance(self.module, TensorDictModuleBase)
        if self.is_tensordict_module:
            self._refuse_keys(reads)
        self._refuse_result(self._zeros(reads, discrete=spec.discrete))

    def forward(self, batch: TensorDictBase) -> Tensor:
        """``[*, N, F]``."""
        if self.is_tensordict_module:
            seen = batch.select(*self.module.in_keys)
            result: Tensor = self.module(seen)[self.module.out_keys[0]]
            return result
        features = batch[self.given]
        if self.given == keys.STATE:
            features = features.unsqueeze(-2).expand(*features.shape[:-1], self.n_agents, -1)
        result = self.module(features)
        return result

    def mixes_agents(self) -> bool:
        """Whether an agent's output depends on what another one observes; found out by changing what the first one does."""
        batch = self._zeros([keys.OBSERVATION, keys.ACTION_MASK, keys.ACTION_DIMS], discrete=True)
        before = self._evaluated(batch)
        batch[keys.OBSERVATION][:, 0] = 1
        return not torch.allclose(before[:, 1:], self._evaluated(batch)[:, 1:], rtol=1e-5, atol=1e-6)

    def _zeros(self, reads: Sequence[Key], *, discrete: bool) -> TensorDict:
        batch = TensorDict({}, batch_size=[ROWS])
        for key in reads:
            info = keys.describe(key)
            shape = [self.sizes[name] for name in info.dimensions(discrete=discrete)]
            batch.set(key, torch.zeros(ROWS, *shape, dtype=getattr(torch, info.dtype)))
        return batch

    @torch.no_grad()
    def _evaluated(self, batch: TensorDictBase) -> Any:
        # As in play, so that layers with running statistics take none from here.
        training = self.training
        found = self.eval()(batch)
        self.train(training)
        return found

    def _refuse_keys(self, reads: Sequence[Key]) -> None:
        strange = [key for key in unravel_key_list(self.module.in_keys) if key not in reads]
        if strange:
            message = f"reads {_listed(strange)}, but here a network may read {_listed(reads)} only"
            raise OptionError("network_options", f"`{self.path}` {message}")
        if len(self.module.out_keys) != 1:
            found = _listed(self.module.out_keys)
            raise OptionError("network_options", f"`{self.path}` must write one key, which is the result; it writes {found}")

    def _refuse_result(self, batch: TensorDictBase) -> None:
        try:
            found = self._evaluated(batch)
        except Exception as error:  # whatever the module does
            message = f"`{self.path}` cannot be evaluated on a batch of zeros: {type(error).__name__}: {error}"
            raise OptionError("network_options", message) from error
        wanted = [ROWS, self.n_agents, self.sizes[OUTPUTS]]
        if not isinstance(found, Tensor) or list(found.shape) != wanted:
            what = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise OptionError("network_options", f"`{self.path}` must give [rows, N, F] = {wanted}, gave {what}")


def _built(network: str, options: Mapping[str, Any], sizes: Mapping[str, int]) -> nn.Module:
    make = _module_class("network", network)
    arguments = {name: _meant(value, sizes) for name, value in options.items()}
    try:
        module: nn.Module = make(**arguments)
    except Exception as error:  # whatever a constructor does
        message = f"`{network}` cannot be built with {arguments}: {type(error).__name__}: {error}"
        raise OptionError("network_options", message) from error
    return module


def _meant(value: Any, sizes: Mapping[str, int]) -> Any:
    """What an entry of ``network_options`` stands for."""
    if isinstance(value, str):
        return sizes.get(value, value)
    if isinstance(value, Mapping):
        if set(value) == {"path"}:
            return _module_class("network_options", value["path"])
        return {name: _meant(inner, sizes) for name, inner in value.items()}
    return [_meant(inner, sizes) for inner in value] if isinstance(value, (list, tuple)) else value


def _module_class(option: str, path: Any) -> type[nn.Module]:
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module does
        raise OptionError(option, f"`{path}` cannot be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise OptionError(option, f"`{path}` must be a class that extends torch.nn.Module")
    return found


def _listed(found: Sequence[Key]) -> str:
    return ", ".join(f"`{keys.name(key)}`" for key in found) or "none"
