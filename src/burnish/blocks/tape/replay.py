"""What a second run needs to repeat the first: its random numbers, and its autocast.

Randomness is drawn again instead of kept: a generator state is 5 KB, a mask is a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .functions import transformed

#: one device, or several whose generators move together
Devices = torch.device | str | Iterable[torch.device | str]
#: the states of some generators, in the order of their devices
States = tuple[Tensor, ...]


def rng_state(devices: Devices) -> States:
    """The states of the generators that random functions on `devices` draw from."""
    return tuple(_get(d) for d in _each(devices))


def moved(devices: Devices, states: States) -> bool:
    """Has anything been drawn from these generators since they had these states?"""
    with torch._C._DisableTorchDispatch():           # states have bytes in a simulation too
        return any(bytes(now.numpy()) != bytes(then.numpy())
                   for now, then in zip(rng_state(devices), states, strict=True))


@contextmanager
def replay(devices: Devices, states: States) -> Iterator[None]:
    """Draw inside from `states` (of the same devices); outside, generators are as they were."""
    devices = _each(devices)
    now = rng_state(devices)
    try:
        for d, state in zip(devices, states, strict=True):
            _set(d, state)
        yield
    finally:
        for d, state in zip(devices, now, strict=True):
            _set(d, state)


def _each(devices: Devices) -> list[torch.device]:
    if isinstance(devices, torch.device | str):
        return [torch.device(devices)]
    return list(dict.fromkeys(torch.device(d) for d in devices))


def _accelerator(device: torch.device) -> Any:
    """The module that holds the generator of a device; None: torch's own, on the host.

    A device without a generator of its own (meta, one that is only simulated) draws nothing that
    has a value: the host's answers for it.
    """
    if device.type in ("cpu", "meta"):
        return None
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return None
    return module if hasattr(module, "get_rng_state") and module.is_available() else None


def _get(device: torch.device) -> Tensor:
    module = _accelerator(device)
    if module is None:
        return torch.get_rng_state()
    # the one device of its kind has no number to give
    return module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)


def _set(device: torch.device, state: Tensor) -> None:
    module = _accelerator(device)
    if module is None:
        torch.set_rng_state(state)
    elif device.type == "mps":
        module.set_rng_state(state)
    else:
        module.set_rng_state(state, device)


def autocast_state(device: torch.device | str) -> tuple[str, bool, torch.dtype]:
    """(device type, enabled, dtype) of autocast here and now."""
    kind = torch.device(device).type
    if not torch.amp.is_autocast_available(kind):
        kind = "cpu"
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@contextmanager
def autocast(state: tuple[str, bool, torch.dtype], cache: bool = False) -> Iterator[None]:
    """Cast inside as in `state`; backward runs outside the user's autocast context.

    cache: a weight read twice inside is cast once, as in the user's context (its gradients are
    then added before they are cast back). Never without a graph: the cache would outlive it.
    """
    kind, enabled, dtype = state
    if autocast_state(kind)[1:] == (enabled, dtype):
        yield
        return
    with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=cache):
        yield


def layout(x: Tensor) -> tuple[int, ...]:
    """Strides of what an operation makes from `x`, which is the order its mask is drawn in."""
    return x.stride() if x.is_contiguous() else torch.empty_like(x, device="meta").stride()


def laid_out(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """`t` in memory as the first draw's input was: a mask is drawn in the order of memory, so the
    same generator gives another mask on another layout."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


class Mask:
    """A dropout mask, held as the generator state it is drawn from.

    ``first(x)`` draws it, on the tensor it was made for; a call draws the same again on any tensor
    of that shape, however either lies in memory.
    """

    __slots__ = ("p", "states", "strides")

    def __init__(self, x: Tensor, p: float):
        self.p, self.states, self.strides = p, rng_state(x.device), layout(x)

    def first(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, True)

    def __call__(self, t: Tensor) -> Tensor:
        with replay(t.device, self.states):
            return F.dropout(laid_out(t, self.strides), self.p, True)


class _Dropout(torch.autograd.Function):
    """Stock dropout, bit for bit, that keeps the generator state instead of the mask."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        ctx.p, ctx.state, ctx.strides = p, rng_state(x.device), layout(x)
        return F.dropout(x, p, True)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        with replay(g.device, ctx.state):       # dropout is linear: same mask on the gradient
            return F.dropout(laid_out(g, ctx.strides), ctx.p, True), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p, True)`` with the same numbers and nothing kept for backward."""
    return F.dropout(x, p, True) if transformed() else _Dropout.apply(x, p)
