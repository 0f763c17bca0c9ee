"""Matrix products between hidden layers in bfloat16, and everything else in float32.

A layer inside a network runs its forward pass under `torch.autocast` and gives back float32. Left as they are: the first layer of
a network, because what it reads may lie far from zero (a bfloat16 has 8 significant bits: a position of 100 would be known to
within a quarter), and layers with fewer than 16 outputs, because values and small steps of a policy would be as coarse, and they
cost next to nothing. Activations, attention, distributions, losses, estimates and the simulation see nothing of it; parameters,
gradients and optimiser stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from marlkit.component import Component

Precision = Literal["float32", "bfloat16"]
"""Of the products; whatever it is, layers give and keep float32."""

WIDE = 16
"""Outputs from which on a layer is rounded."""


def unfit_precision(precision: Precision, device: torch.device) -> str:
    """Why a device cannot multiply in a precision; empty where it can."""
    if precision == "float32" or device.type == "cpu":
        return ""
    if device.type != "cuda":
        return f"bfloat16 products are for CPUs and CUDA devices, not for `{device.type}`."
    with torch.cuda.device(device):
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    return "" if has else f"{torch.cuda.get_device_name(device)} has no bfloat16 products (NVIDIA's came with Ampere)."


class Products:
    """The precision in which the networks of some components multiply.

    A network is a module inside a component that is called as a whole and is in no other one; a layer is a module with a matrix
    and without further modules.

    Args:
        components: whose networks.
        precision: `float32` leaves them as they are.
        device_type: where they run, `cpu` or `cuda`.
    """

    def __init__(self, components: Iterable[nn.Module], precision: Precision, device_type: str) -> None:
        self.layers: list[nn.Module] = []
        if precision == "float32":
            return
        for network in (network for component in components for network in _networks(component)):
            _, *further = [module for module in network.modules() if _outputs(module)] or [network]
            self.layers += [layer for layer in further if _outputs(layer) >= WIDE and layer not in self.layers]
        for layer in self.layers:
            vars(layer)["forward"] = _Rounded(layer, device_type)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Meanwhile the networks are as they were before."""
        rounded = [vars(layer).pop("forward") for layer in self.layers]
        for layer, forward in zip(self.layers, rounded, strict=True):
            vars(layer).update(forward.replaced)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, rounded, strict=True):
                vars(layer)["forward"] = forward


class _Rounded:
    """The forward pass of a layer in bfloat16; copied with the layer, as an attribute of it.

    It stands in the place of the layer's method and not in hooks, because what a hook switches on stays on after an interrupt.
    """

    def __init__(self, layer: nn.Module, device_type: str) -> None:
        self.forward: Callable[..., Any] = layer.forward
        self.replaced = {name: value for name, value in vars(layer).items() if name == "forward"}
        self.device_type = device_type

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Rounded weights must not be kept: the optimiser changes parameters between one pass and the next.
        with torch.autocast(self.device_type, torch.bfloat16, cache_enabled=False):
            return apply_to_collection(self.forward(*args, **kwargs), Tensor, _float32)


def _float32(values: Tensor) -> Tensor:
    return values.float() if values.dtype == torch.bfloat16 else values


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules below ``module`` that are called and are no components."""
    for child in module.children():
        is_called = type(child).forward is not nn.Module.forward
        if is_called and not isinstance(child, Component):
            yield child
        else:
            yield from _networks(child)


def _outputs(module: nn.Module) -> int:
    """The outputs of a layer; 0 of any other module."""
    if not all(isinstance(child, nn.ParameterList) for child in module.children()) or isinstance(module, nn.ParameterList):
        return 0
    return max((parameter.shape[0] for parameter in module.parameters() if parameter.dim() == 2), default=0)
