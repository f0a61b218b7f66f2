"""Weights that train and wait on the host, with a last move that may not have been made yet.

An optimizer that has a weight on the device once a step moves it when it comes there next. Until
then the parameter stands one move behind, and whoever reads it must not see that: its class is
swapped for a subclass of its own, under the same name, which every torch function asks. One that
asks for a shape or a flag is answered at once; any other has the move made first, on the device,
and is given the weight there where it computes with tensors of the device, else as it lies.

    wait(p)                     # p lies on the host from now on
    p.burnish_waits.later(move) # move(tensor) changes it in place, at the latest when it is read
    come_home(p)                # a plain parameter on the device again

A view that was taken before (``p.detach()``, a state dict) shows what the host holds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .hosted import Away, side_stream, to_host

Move = Callable[[Tensor], None]

#: inside, a parameter that waits is the tensor that it is
as_it_is = torch._C.DisableTorchFunctionSubclass


class Wait(Away):
    """Where one parameter lies.

    held: on the host, the parameter's own tensor.  home: where it is read.  stands: does the
    parameter read as another tensor just now (:func:`put`)?
    """

    def __init__(self, held: Tensor, home: torch.device):
        self.held, self.home, self.stands = held, home, False
        self._late: list[Move] = []
        self._moved = False                          # the copy on the device is ahead of the host
        self._written: Any = None

    def later(self, move: Move) -> None:
        """Change the weight by ``move(tensor)`` when it is on the device next, or read."""
        self._late.append(move)

    def catch_up(self) -> None:
        """Make the moves that are due on what is on the device."""
        if not self._late:
            return
        there = self.held if not self.away else self.here()
        assert there is not None
        moves, self._late = self._late, []
        with torch.no_grad(), as_it_is():
            for move in moves:
                move(there)
        self._moved = there is not self.held

    def leave(self) -> None:
        """Let the copy on the device go; the host holds what it held."""
        self._write()
        super().leave()

    def settle(self) -> None:
        """The host holds the weight as the last step has left it."""
        if self._late:
            brought = self._here is not None
            self.bring()
            self.catch_up()
            if not brought:
                self.leave()
        self._write()
        if self._written is not None:
            self._written.synchronize()
            self._written = None

    def read(self) -> Tensor:
        """The weight where it is read: what was brought, or a copy of its own."""
        if self._here is None:
            self.settle()
            return self.held.to(self.home, copy=True) if self.away else self.held
        self.catch_up()
        there = self.here()
        assert there is not None
        return there

    def _write(self) -> None:
        if not self._moved:
            return
        there, self._moved = self.here(), False
        assert there is not None
        with torch.no_grad():
            if there.device.type != "cuda":
                self.held.copy_(there)
                return
            side = side_stream(self.home)            # (what is brought next comes behind it)
            side.wait_stream(torch.cuda.current_stream(self.home))
            with torch.cuda.stream(side):
                self.held.copy_(there, non_blocking=True)
                there.record_stream(side)
                self._written = side.record_event()


class Waiting:
    """What a parameter that waits does in the place of a tensor's own."""

    __slots__ = ()
    burnish_waits: Wait

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _facts():
            given = list(_tensors((*args, *kwargs.values())))
            mine = [t for t in given if isinstance(t, Waiting) and not t.burnish_waits.stands]
            for t in mine:
                if t.burnish_waits._here is None:
                    t.burnish_waits.settle()
            if mine and not _writes(func, args):
                there = {t.device for t in given if not isinstance(t, Waiting)}
                args, kwargs = _exchanged(args, there), _exchanged(kwargs, there)
            else:
                for t in mine:
                    t.burnish_waits.settle()
        with as_it_is():
            return func(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        return self.burnish_waits.home

    @property
    def data(self) -> Tensor:
        if not self.burnish_waits.stands:
            self.burnish_waits.settle()
        return _data(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        """As of any parameter: from now on it is this tensor, and read where that lies."""
        _set(self, to_host(value))
        self.burnish_waits = Wait(_data(self), value.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        made = memo[id(self)] = nn.Parameter(self.data.clone(), self.requires_grad)
        wait(made)
        made.burnish_waits.home = self.burnish_waits.home
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return nn.Parameter(self.data, self.requires_grad).__reduce_ex__(protocol)


def wait(p: nn.Parameter) -> None:
    """Let a parameter lie on the host; it stays the same object, and is read where it lay."""
    if isinstance(p, Waiting):
        return
    home = p.device
    p.data = to_host(p.detach())
    p.burnish_waits = Wait(p.data, home)
    p.__class__ = _kind(type(p))


def come_home(p: nn.Parameter) -> None:
    """A parameter as any other, where it is read; nothing for one that does not wait."""
    if not isinstance(p, Waiting):
        return
    held = p.burnish_waits
    held.settle()
    p.__class__ = type(p).__mro__[2]
    del p.burnish_waits
    p.data = held.held.to(held.home)


def value(p: nn.Parameter) -> Tensor:
    """What a parameter is, on the device where it is read."""
    return p.burnish_waits.read() if isinstance(p, Waiting) else p.data


def put(p: nn.Parameter, tensor: Tensor) -> Tensor:
    """Let a parameter read as `tensor`; its own, which is to be put back, is the answer."""
    if not isinstance(p, Waiting):
        own, p.data = p.data, tensor
        return own
    held = p.burnish_waits
    held.stands = tensor is not held.held
    _set(p, tensor)
    return held.held


def waiting(modules: Iterable[nn.Module]) -> list[Wait]:
    """Where the parameters of these modules lie that wait, each once."""
    found = {id(p): p.burnish_waits for top in modules for p in top.parameters()
             if isinstance(p, Waiting)}
    return list(found.values())


@functools.cache
def _kind(cls: type) -> type:
    return type(cls.__name__, (Waiting, cls), {"__module__": cls.__module__})


def _data(p: Any) -> Tensor:
    with as_it_is():
        return Tensor.data.__get__(p)                # type: ignore[attr-defined]


def _set(p: Any, tensor: Tensor) -> None:
    with as_it_is():
        Tensor.data.__set__(p, tensor)               # type: ignore[attr-defined]


@functools.cache
def _facts() -> frozenset[Any]:
    """What is asked of a tensor that its entries do not tell."""
    said = ("shape", "dtype", "layout", "requires_grad", "is_leaf", "grad", "grad_fn", "ndim",
            "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "nbytes",
            "itemsize", "output_nr", "retains_grad")
    asked = ("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size",
             "is_floating_point", "is_complex", "is_signed", "is_contiguous", "requires_grad_",
             "__len__")
    return frozenset([*(getattr(Tensor, n).__get__ for n in said),
                      *(getattr(Tensor, n).__set__ for n in ("requires_grad", "grad")),
                      *(getattr(Tensor, n) for n in asked), torch.numel, torch.is_floating_point])


def _writes(func: Any, args: tuple) -> bool:
    """Does it change a parameter that waits?"""
    name = getattr(func, "__name__", "")
    return bool(args) and isinstance(args[0], Waiting) and (
        name == "__set__" or name == "__setitem__" or name.endswith("_")
        and not name.startswith("__"))


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, (list, tuple)):
            yield from _tensors(v)


def _exchanged(values: Any, there: set[torch.device]) -> Any:
    """Each parameter that waits as it lies on the device, where tensors of that are beside it."""
    if isinstance(values, Waiting):
        held = values.burnish_waits
        if held.stands or not held.away or held._here is None and held.home not in there:
            return values
        return held.read() if held._here is not None else _copied(values, held.home)
    if isinstance(values, dict):
        return {k: _exchanged(v, there) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        made = [_exchanged(v, there) for v in values]
        return type(values)(made) if type(values) in (list, tuple) else type(values)(*made)
    return values


def _copied(p: Any, home: torch.device) -> Tensor:
    with as_it_is():
        return p.to(home, copy=True)                 # (its gradient reaches the parameter)
