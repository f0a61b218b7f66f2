"""What a second run needs to repeat the first: its random numbers, and its autocast.

Randomness is drawn again instead of kept: a generator state is 5 KB, a mask is a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor


def rng_state(device: torch.device) -> Tensor:
    """The state of the generator that random functions on `device` draw from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replay(device: torch.device, state: Tensor) -> Iterator[None]:
    """Draw inside from `state`; the generator outside is left as it was."""
    now = rng_state(device)
    put = torch.cuda.set_rng_state if device.type == "cuda" else None
    try:
        put(state, device) if put else torch.set_rng_state(state)
        yield
    finally:
        put(now, device) if put else torch.set_rng_state(now)


def autocast_state(device: torch.device | str) -> tuple[str, bool, torch.dtype]:
    """(device type, enabled, dtype) of autocast here and now."""
    kind = torch.device(device).type
    if not torch.amp.is_autocast_available(kind):
        kind = "cpu"
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


@contextmanager
def autocast(state: tuple[str, bool, torch.dtype]) -> Iterator[None]:
    """Cast inside as in `state`; backward runs outside the user's autocast context."""
    kind, enabled, dtype = state
    if autocast_state(kind)[1:] == (enabled, dtype):
        yield
        return
    with torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False):
        yield


class _Dropout(torch.autograd.Function):
    """Stock dropout, bit for bit, that keeps the generator state instead of the mask."""

    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        ctx.p, ctx.state = p, rng_state(x.device)
        return F.dropout(x, p, True)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None]:
        with replay(g.device, ctx.state):       # dropout is linear: same mask on the gradient
            return F.dropout(g, ctx.p, True), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout(x, p, True)`` with the same numbers and nothing kept for backward."""
    return _Dropout.apply(x, p)
