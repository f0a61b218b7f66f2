"""What an operator makes of fake tensors, remembered by the shapes it was given.

A step asks the same few hundred questions some thousand times: what is the result of this operator
on tensors of these shapes, strides, types and devices? The fake mode answers each by a kernel or by
a table of its own that costs as much as a kernel. Here an answer is a note (a new tensor of such a
shape, a view of the second argument, the first argument itself) that is carried out directly.

Only plain answers are noted, of operators that make a tensor of none as well. Whatever else there
is (real tensors among the arguments, subclasses,
results that share a storage among themselves, operators that change a tensor's own shape) is asked
of the fake mode every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

#: notes kept before all are forgotten
MOST = 200_000

_SELF, _VIEW, _NEW, _NONE = range(4)
#: types whose equal values mean the same whatever the position
_PLAIN = (int, str, torch.dtype, torch.device, torch.memory_format, torch.layout, type(None))
_FORGETFUL = (torch.Tag.inplace_view, torch.Tag.data_dependent_output,
              torch.Tag.dynamic_output_shape)

#: question -> (how the results are held, a note for each, what the operator costs)
_notes: dict[Any, Note] = {}
_steady: dict[Any, bool] = {}


class Note:
    """One answer. `cost` is filled in by who counts."""

    __slots__ = ("held", "results", "cost")

    def __init__(self, held: Any, results: list[tuple[Any, ...]]):
        self.held, self.results = held, results
        self.cost: Any = None


class _Odd(Exception):
    pass


def answer(func: Any, args: tuple, kwargs: dict[str, Any], run: Callable[..., Any],
           mode: Any = None) -> tuple[Any, Note | None]:
    """(what ``run(*args, **kwargs)`` returns, the note of it where there is one). mode: in which
    tensors are made from no others; None: what makes such is asked every time."""
    tensors: list[FakeTensor] = []
    try:
        if not _is_steady(func):
            raise _Odd
        key = func, run, _key(args, tensors), _key(kwargs, tensors) if kwargs else ()
        note = _notes.get(key)
    except (_Odd, TypeError):
        return run(*args, **kwargs), None
    if tensors:
        mode = tensors[0].fake_mode
    if mode is None:
        return run(*args, **kwargs), None
    if note is None:
        out = run(*args, **kwargs)
        note = _noted(out, tensors)
        if note is not None:
            if len(_notes) >= MOST:
                _notes.clear()
            _notes[key] = note
        return out, note
    made = [_made(r, tensors, mode) for r in note.results]
    return made[0] if note.held is None else note.held(made), note


def forget() -> None:
    """Drop every note."""
    _notes.clear()
    _steady.clear()
    _born.clear()


def _is_steady(func: Any) -> bool:
    """Are its results told by the shapes of its arguments, and its effects by its results?"""
    known = _steady.get(func)
    if known is None:
        known = _steady[func] = (
            func.namespace in ("aten", "prims") and not any(t in func.tags for t in _FORGETFUL)
            and not func._schema.name.endswith(("::set_", "::resize_", "::_local_scalar_dense",
                                                  "::_efficientzerotensor")))
    return known


def _key(value: Any, tensors: list[FakeTensor]) -> Any:
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None or value.layout is not torch.strided \
                or value._is_zerotensor():           # a tangent of nothing but zeros has no memory
            raise _Odd
        tensors.append(value)
        return (value.shape, value.stride(), value.dtype, value.fake_device,
                value.storage_offset())
    if kind in _PLAIN:
        return value
    if kind is tuple or kind is list:
        return (kind, *[_key(v, tensors) for v in value])
    if kind is dict:
        return tuple([(k, _key(v, tensors)) for k, v in value.items()])
    if kind is float or kind is bool:
        return kind, value
    raise _Odd


def _noted(out: Any, tensors: list[FakeTensor]) -> Note | None:
    if out is None:                           # it wrote into its arguments, and that is all
        return Note(_nothing, [])
    held = None if isinstance(out, Tensor) else type(out)
    if held not in (None, tuple, list):
        return None
    results: list[tuple[Any, ...]] = []
    owners = {t.untyped_storage()._cdata: n for n, t in reversed(list(enumerate(tensors)))}
    given = {id(t): n for n, t in reversed(list(enumerate(tensors)))}
    fresh: set[int] = set()
    for t in (out,) if held is None else out:
        if t is None:
            results.append((_NONE,))
            continue
        if type(t) is not FakeTensor or t.constant is not None or t.dtype.is_complex \
                or t.layout is not torch.strided or t.is_conj() or t.is_neg() or t.requires_grad:
            return None
        storage = t.untyped_storage()
        if id(t) in given:
            results.append((_SELF, given[id(t)]))
        elif storage._cdata in owners:
            results.append((_VIEW, owners[storage._cdata], t.shape, t.stride(),
                            t.storage_offset(), t.dtype, t.fake_device))
        else:
            if storage._cdata in fresh or storage.nbytes() != _bytes(t):
                return None
            fresh.add(storage._cdata)
            results.append((_NEW, t.shape, t.stride(), t.dtype, t.fake_device))
    return Note(held, results)


def _nothing(made: list[Any]) -> None:
    return None


def _bytes(t: Tensor) -> int:
    """Of a storage that is made for this tensor alone."""
    if t.storage_offset():
        return -1
    if not t.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def _made(result: tuple[Any, ...], tensors: list[FakeTensor], mode: Any) -> Any:
    kind = result[0]
    if kind == _SELF:
        return tensors[result[1]]
    if kind == _NONE:
        return None
    with torch._C._DisableTorchDispatch():
        if kind == _NEW:
            _, shape, stride, dtype, device = result
            bare = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            _, owner, shape, stride, offset, dtype, device = result
            bare = torch.empty(0, dtype=dtype, device="meta")
            bare.set_(tensors[owner].untyped_storage(), offset, shape, stride)
        return _faked(mode, bare, device)


#: what a fake tensor says of itself, by mode and device, but for its storage
_born: dict[Any, dict[str, Any]] = {}


def _faked(mode: Any, bare: Tensor, device: torch.device) -> FakeTensor:
    """``FakeTensor(mode, bare, device)``. Its constructor asks forty questions, of which all but
    the tensor are answered alike for one mode and device: they are asked once."""
    key = mode, device
    alike = _born.get(key)
    if alike is None:
        made = FakeTensor(mode, bare, device)
        if any(isinstance(v, Tensor) for v in made.__dict__.values()):
            return made
        if len(_born) > 8:                    # a mode lives as long as its simulation
            _born.clear()
        _born[key] = dict(made.__dict__)
        return made
    made = Tensor._make_subclass(FakeTensor, bare, False, dispatch_device=True,
                                 device_for_backend_keys=device)
    if mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(made)
    else:
        torch._C._set_throw_on_mutable_data_ptr(made)
    made.__dict__.update(alike)
    return made
