"""Frozen weights that wait on the host and come to the device while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ...core.followed import is_fake
from .term import Provider

#: does the CPU stand for a device that has a host (in a simulation)?
_STANDS = ContextVar("stands", default=False)


@contextmanager
def standing_in(on: bool) -> Iterator[None]:
    """Inside, where `on`, the CPU stands for a device to which weights have to come."""
    token = _STANDS.set(on)
    try:
        yield
    finally:
        _STANDS.reset(token)


class Away:
    """What lies on the host (`held`) and is read on a device (`home`).

    :meth:`bring` begins to copy it there, beside what runs on CUDA, and until :meth:`leave` that
    copy answers. On a CPU there is nowhere to go.
    """

    held: Tensor
    home: torch.device
    _here: Tensor | None = None
    _ready: Any = None

    @property
    def away(self) -> bool:
        """Does it lie elsewhere than where it is read?"""
        return self.home != self.held.device or _STANDS.get()

    def bring(self) -> None:
        """Begin to bring it to the device; nothing where it comes already, or need not."""
        if self._here is not None or not self.away:
            return
        if self.home.type != "cuda" or is_fake(self.held):
            self._here = self.held.to(self.home, copy=True)
            return
        side = side_stream(self.home)
        with torch.cuda.stream(side):
            self._here = self.held.to(self.home, non_blocking=True)
            self._ready = side.record_event()

    def leave(self) -> None:
        """Let the copy on the device go."""
        self._here = self._ready = None

    def here(self) -> Tensor | None:
        """The copy on the device, whole; None where none was brought."""
        if self._ready is not None:                  # what runs from here on waits for the copy
            assert self._here is not None
            now = torch.cuda.current_stream(self.home)
            now.wait_event(self._ready)
            self._here.record_stream(now)
            self._ready = None
        return self._here


class Hosted(Away, Provider):
    """Holds a frozen weight on the host as it is; what it gives lies where the module's others lie.

    While it has not been brought each question has a copy of its own.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.home = weight.device
        self.register_buffer("held", to_host(weight.detach()))

    @property
    def dtype(self) -> torch.dtype:
        return self.held.dtype

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        self.leave()
        moved = fn(self.held if self.home == self.held.device else self.held.to(self.home))
        self.home = moved.device
        self.held = to_host(moved)
        return self

    def weight(self) -> Tensor:
        if (brought := self.here()) is not None:
            return brought
        return self.held.to(self.home, copy=True) if self.away else self.held

    def matrix(self, expert: int) -> Tensor:
        if self._here is not None:
            return self.weight()[expert]
        one = self.held[expert]
        return one.to(self.home, copy=True) if self.away else one

    def extra_repr(self) -> str:
        return f"{tuple(self.held.shape)} on the host, read on {self.home}"


def to_host(t: Tensor) -> Tensor:
    """The tensor on the host, where copies to a device need not wait for it."""
    t = t if t.device.type == "meta" else t.to("cpu")
    return t if is_fake(t) or not torch.cuda.is_available() else t.pin_memory()


_SIDES: dict[torch.device, Any] = {}


def side_stream(device: torch.device) -> Any:
    """The stream on which weights come to a device."""
    if device not in _SIDES:
        _SIDES[device] = torch.cuda.Stream(device)
    return _SIDES[device]


def hosted(modules: Iterable[nn.Module]) -> list[Hosted]:
    """What waits on the host of these modules' weights."""
    return [m for top in modules for m in top.modules() if isinstance(m, Hosted)]
