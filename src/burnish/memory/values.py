"""The ledger of a simulation: fake tensors, and the values of those that a step branches on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from .devices import COLLECTIVES
from .fakes import kernels
from .ledger import LIFT, Ledger
from .operators import leaves
from .remembered import Note, answer

#: values are followed through tensors up to this many entries
FOLLOWED = 1 << 18

_ITEM = torch.ops.aten._local_scalar_dense.default
_RANDOM = torch.Tag.nondeterministic_seeded


class FakeLedger(Ledger):
    """A ledger for fake tensors that also knows the values of ids, masks and positions.

    Models branch on such values (is anything padded? are several sequences packed?), and the
    branch decides which attention kernel runs, so a guess would be a wrong promise. Whatever is
    computed only from tensors of known value is computed on those values too. A tensor of one value
    all over is followed whatever its size.

    Models also branch on whether a state is finite (DETR's encoder clamps one that is not). A step
    is promised whose numbers are, so that is what such a question is answered (:func:`_finite`).
    """

    def __init__(self, model: nn.Module | None = None, kind: str = "cpu", **kw: Any):
        super().__init__(model, **kw)
        self.machine = kind
        self.kernels = kernels(kind)
        self.note: Note | None = None         # of the operator that ran last
        self._sharing: dict[int, list[ref[Tensor]]] = {}     # storage -> tensors of known value
        self.mode: FakeTensorMode | None = None       # in which tensors are made from no others

    def knows(self, fake: Tensor, value: Tensor | _Later) -> None:
        """Give a fake tensor its value. The attribute dies with the fake."""
        fake._burnish_value = value           # type: ignore[attr-defined]
        self._sharing.setdefault(fake.untyped_storage()._cdata, []).append(ref(fake))

    def _forgets(self, fake: Tensor) -> None:
        """What was known of it is old now, and of all that see the same storage."""
        fake.__dict__.pop("_burnish_value", None)
        for other in self._sharing.pop(fake.untyped_storage()._cdata, ()):
            if (t := other()) is not None:
                t.__dict__.pop("_burnish_value", None)

    def cost(self, func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        note = self.note
        if note is None:
            return super().cost(func, args, kwargs, out)
        if note.cost is None:
            note.cost = super().cost(func, args, kwargs, out)
        return note.cost

    def call(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.note = None
        if any(isinstance(a, torch.UntypedStorage) for a in args):
            args[0].__dict__.pop("_burnish_value", None)      # its storage has no bytes to know
            return _uncached(func, args, kwargs)
        if func.overloadpacket in COLLECTIVES:        # every process says what this one says
            return _uncached(func, args, kwargs)
        if self.mode is not None and _makes(func):
            out, self.note = answer(func, args, kwargs, self.kernels.get(func, func), self.mode)
            if self.note is not None:
                if out.numel() <= FOLLOWED:
                    self.knows(out, _Later(func, args, kwargs))
                elif func in _FILLED:
                    one = [1] * out.dim()
                    self.knows(out, _Later(func, (one, *args[1:]), kwargs, out.shape))
                return out
        values = _known(args, kwargs)
        if values is not None and func._schema.is_mutable and not all(
                map(_writable, leaves(_written(func, values[0], values[1])))):
            values = None
        if values is None or _RANDOM in func.tags:
            if func._schema.is_mutable:       # whatever was known of the target is old now
                for t in leaves((_written(func, args, kwargs), kwargs.get("out"))):
                    self._forgets(t)
            out, self.note = answer(func, args, kwargs, self.kernels.get(func, func))
            if func is LIFT and _few(args[0]):
                with no_modes():
                    self.knows(out, args[0].clone())
            elif values is None and (said := _finite(func, args)) is not None:
                with no_modes():
                    self.knows(out, torch.tensor(said).expand(out.shape))
            return out
        if func is _ITEM:
            with no_modes():
                return values[0][0].item()
        sized = True
        try:
            out = func(*args, **kwargs)
        except DynamicOutputShapeException:   # the values say how large it is
            sized = False
        given = list(leaves(values))
        even = bool(sized and given) and all(map(_even, given))
        if not sized or even or all(t.numel() <= FOLLOWED for t in leaves(out)):
            if kwargs.get("device") is not None:
                values[1]["device"] = torch.device("cpu")
            spread = even and isinstance(out, Tensor) and not func._schema.is_mutable and (
                torch.Tag.pointwise in func.tags or func in _COPIES)
            with no_modes():
                real = func(*map(_one, values[0]), **values[1]).expand(out.shape) if spread else \
                    func(*values[0], **values[1])
            if not sized:
                out = _as_fake(real, args)
            for fake, value in zip(leaves(out), leaves(real), strict=True):
                if value.numel() <= FOLLOWED or _even(value):
                    self.knows(fake, value)
        return out


class _Later:
    """The value of a tensor that was made from none, for who asks; hardly anybody does."""

    def __init__(self, func: Any, args: tuple, kwargs: dict[str, Any], shape: Any = None):
        self.func, self.args, self.kwargs, self.shape = func, args, kwargs, shape

    def now(self) -> Tensor:
        kwargs = dict(self.kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        with no_modes():
            made: Tensor = self.func(*self.args, **kwargs)
            return made if self.shape is None else made.expand(self.shape)


@cache
def _makes(func: Any) -> bool:
    """Does it make one tensor from no others, always the same?"""
    schema = func._schema
    return (func.namespace == "aten" and _RANDOM not in func.tags
            and len(schema.returns) == 1 and str(schema.returns[0].type) == "Tensor"
            and not any("Tensor" in str(a.type) or "Generator" in str(a.type)
                        for a in schema.arguments))


def _written(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes into."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return [given.get(a.name) for a in func._schema.arguments
            if a.alias_info is not None and a.alias_info.is_write]


class _Unknown(Exception):
    pass


def _finite(func: Any, args: tuple) -> bool | None:
    """What is said of numbers that are finite, where an operator asks just that: whether each
    equals itself, or an infinity, of which ``torch.isfinite`` is made."""
    if func in _ODD:
        return False
    same = func in _ALIKE and args[0] is args[1]
    infinite = func in _NUMBER and isinstance(args[1], float) and math.isinf(args[1])
    return _ALIKE[func] if same else _NUMBER[func] if infinite else None


_FILLED = (torch.ops.aten.ones.default, torch.ops.aten.zeros.default, torch.ops.aten.full.default)
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
_ODD = (torch.ops.aten.isnan.default, torch.ops.aten.isinf.default)
_ALIKE = {torch.ops.aten.eq.Tensor: True, torch.ops.aten.ne.Tensor: False}
_NUMBER = {torch.ops.aten.eq.Scalar: False, torch.ops.aten.ne.Scalar: True}


def _even(t: Tensor) -> bool:
    """Is it one number, seen at every place?"""
    return not any(s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1)


def _writable(t: Tensor) -> bool:
    return t.numel() < 2 or not _even(t)


def _one(value: Any) -> Any:
    """Of an even tensor as many dimensions, of one entry each."""
    return value[(slice(0, 1),) * value.dim()] if isinstance(value, Tensor) else value


def _uncached(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The fake mode remembers calls by their arguments: a storage among them would live on, and
    groups of processes cannot be told apart."""
    mode = next((t.fake_mode for t in leaves(args) if isinstance(t, FakeTensor)), None)
    if mode is None:
        return func(*args, **kwargs)
    before, mode.cache_enabled = mode.cache_enabled, False
    try:
        return func(*args, **kwargs)
    finally:
        mode.cache_enabled = before


def _known(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments with every tensor replaced by its value; None if one has no known value."""
    try:
        return _values(args), _values(kwargs)
    except _Unknown:
        return None


def _values(value: Any) -> Any:
    if isinstance(value, Tensor):
        found = value.__dict__.get("_burnish_value")
        if found is None:
            raise _Unknown
        if type(found) is _Later:
            found = value._burnish_value = found.now()       # type: ignore[attr-defined]
        if found._is_zerotensor():               # a tangent of zeros alone: it has no memory
            raise _Unknown
        return found
    if isinstance(value, (list, tuple)):
        return type(value)([_values(v) for v in value])
    if isinstance(value, dict):
        return {k: _values(v) for k, v in value.items()}
    return value


def _as_fake(real: Any, args: tuple) -> Any:
    like = next(t for t in leaves(args))
    if isinstance(real, Tensor):
        return torch.empty(real.shape, dtype=real.dtype, device=like.device)
    return type(real)(_as_fake(r, args) for r in real)


def _few(t: Tensor) -> bool:
    """Was it just made from Python numbers, and so few that they are followed?"""
    return type(t) is Tensor and t.device.type == "cpu" and t.numel() <= FOLLOWED


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield
