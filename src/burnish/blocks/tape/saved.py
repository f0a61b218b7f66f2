"""The lean tape: what backward keeps, decided tensor by tensor.

Autograd keeps the output of a norm for the linear behind it, and the input of that norm for the
norm itself: the second determines the first. The tape watches cheap operations (norms,
activations, products, widening casts, dropout). When autograd is about to keep the *output* of
one, it gets a note instead: which operation, on which inputs; those are kept anyway, or are
notes themselves. Backward reads the note, runs the operation once and shares the result with
all its readers. Gradients are exact, since the same operation runs on the same numbers.

Dropout keeps a generator state instead of a mask and draws bit for bit what the stock one draws.

Traps this file avoids: an address alone does not name a tensor (addresses are reused), so every
entry holds a weak reference to its tensor; a pack hook that returns an operation's own output
closes a reference cycle, so pass-through returns an alias.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import replay

Recompute = Callable[..., Tensor]


class _Entry:
    """How to make one tensor again: an operation on arguments, packed once somebody asks."""

    __slots__ = ("fn", "args", "kwargs", "size", "stride", "offset", "autocast", "readers",
                 "value", "settled", "__weakref__")

    def __init__(self, fn: Recompute, args: tuple, kwargs: dict, out: Tensor):
        self.fn, self.args, self.kwargs = fn, args, kwargs
        self.size, self.stride, self.offset = out.size(), out.stride(), out.storage_offset()
        self.autocast = replay.autocast_state(out.device)
        self.readers, self.value, self.settled = 0, None, False

    def settle(self, tape: Tape) -> None:
        """The first reader has come: the arguments go where kept tensors go."""
        if not self.settled:
            self.settled = True
            self.args = tuple(tape.argument(a) for a in self.args)
            self.kwargs = {k: tape.argument(v) for k, v in self.kwargs.items()}

    def make(self) -> Tensor:
        """The tensor; shared until the last reader has asked."""
        self.readers -= 1
        value = self.value
        if value is None:
            with torch.no_grad(), replay.autocast(self.autocast):
                value = self.fn(*[_open(a) for a in self.args],
                                **{k: _open(v) for k, v in self.kwargs.items()})
            if value.stride() != self.stride:
                value = torch.empty_strided(self.size, self.stride, dtype=value.dtype,
                                            device=value.device).copy_(value)
        self.value = value if self.readers > 0 else None
        return value


class _Note:
    """What autograd keeps instead of a tensor: an entry and the view that was wanted."""

    __slots__ = ("entry", "view")

    def __init__(self, entry: _Entry, t: Tensor):
        self.entry = entry
        entry.readers += 1
        same = (t.size() == entry.size and t.stride() == entry.stride
                and t.storage_offset() == entry.offset)
        self.view = None if same else (t.size(), t.stride(), t.storage_offset() - entry.offset)

    def open(self) -> Tensor:
        value = self.entry.make()
        if self.view is None:
            return value
        size, stride, shift = self.view
        return value.as_strided(size, stride, value.storage_offset() + shift)


class _Kept:
    """A tensor kept as it is, with the version autograd saw."""

    __slots__ = ("tensor", "version")

    def __init__(self, t: Tensor):
        self.tensor, self.version = t, t._version

    def open(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a tensor needed for backward was modified in place (version "
                f"{self.tensor._version}, expected {self.version}); clone it before changing it"
            )
        return self.tensor


def _open(x: Any) -> Any:
    return x.open() if isinstance(x, (_Note, _Kept)) or hasattr(x, "open") else x


#: name of a function -> may its output be made again? (output, arguments) -> bool
def _always(out: Tensor, args: tuple) -> bool:
    return True


def _widening(out: Tensor, args: tuple) -> bool:
    """A cast is worth a note only when the input is no larger than the output."""
    return isinstance(args[0], Tensor) and args[0].element_size() <= out.element_size()


CHEAP: dict[str, Callable[[Tensor, tuple], bool]] = {
    # operations whose backward keeps their input
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "gelu", "silu", "mish", "hardswish",
                     "softplus", "leaky_relu", "elu", "selu", "pow", "square"), _always),
    # products keep both factors as soon as both carry gradients; else a note costs no more
    **dict.fromkeys(("mul", "__mul__", "__rmul__", "multiply", "addcmul"), _always),
    **dict.fromkeys(("to", "float", "type_as", "_to_copy"), _widening),
}
_IN_PLACE = ("inplace", "out")


def _nothing() -> None:
    """Nobody listens for the start of a forward."""


class Policy:
    """Where a kept tensor lives until backward. The default leaves it where it is."""

    def pack(self, t: Tensor) -> Any:
        return _Kept(t if t.grad_fn is None else t.detach())

    def start(self) -> None:
        """A forward begins."""


class Tape(TorchFunctionMode):
    """Watches one forward of a model. Also the one place where functions are intercepted.

    lean: note cheap outputs instead of keeping them.
    policy: what happens to the tensors that are kept.
    intercept: function -> replacement ``f(func, args, kwargs) -> result`` (prefix attention).
    """

    def __init__(self, lean: bool = True, policy: Policy | None = None):
        super().__init__()
        self.lean, self.policy = lean, policy or Policy()
        self.intercept: dict[Any, Callable[..., Any]] = {}
        self._known: dict[int, tuple[Any, _Entry]] = {}
        self._rules: dict[Any, Any] = {}
        self._depth = 0
        self.on_start: Callable[[], None] = _nothing

    # -- watching -----------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.intercept:
            return self.intercept[func](func, args, kwargs)
        if not (self.lean and torch.is_grad_enabled()):
            return func(*args, **kwargs)
        rule = self._rule(func)
        if rule is None:
            return func(*args, **kwargs)
        if rule == "dropout":
            return self._dropout(func, args, kwargs)
        out = func(*args, **kwargs)
        if (isinstance(out, Tensor) and out.requires_grad
                and not any(kwargs.get(k) for k in _IN_PLACE) and rule(out, args)):
            self.note(out, func, args, kwargs)
        return out

    def _rule(self, func: Any) -> Any:
        try:
            return self._rules[func]
        except KeyError:
            name = getattr(func, "__name__", "")
            rule = "dropout" if func is F.dropout else CHEAP.get(name)
            self._rules[func] = rule
            return rule

    def _dropout(self, func: Any, args: tuple, kwargs: dict) -> Any:
        bound = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
        x, p = bound["input"], bound.get("p", 0.5)
        if not bound.get("training", True) or bound.get("inplace") or not x.requires_grad \
                or not 0 < p < 1:
            return func(*args, **kwargs)
        state = replay.rng_state(x.device)
        out = replay.dropout(x, p)

        def again(x: Tensor) -> Tensor:
            with replay.replay(x.device, state):
                return F.dropout(x, p, True)

        self.note(out, again, (x,), {})
        return out

    def note(self, out: Tensor, fn: Recompute, args: tuple, kwargs: dict) -> None:
        """Remember that ``fn(*args)`` makes `out`, for as long as `out` lives."""
        storage = out.untyped_storage()._cdata
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if any(a.untyped_storage()._cdata == storage for a in tensors):
            return                                  # a view or a cast that did nothing
        entry = _Entry(fn, args, kwargs, out)
        known = self._known

        def forget(ref: Any, key: int = storage) -> None:
            if known.get(key, (None,))[0] is ref:
                del known[key]

        known[storage] = (weakref.ref(out, forget), entry)

    def argument(self, a: Any) -> Any:
        """An argument of a noted operation, as backward will want it."""
        return self.pack(a) if isinstance(a, Tensor) else a

    def _find(self, t: Tensor) -> _Entry | None:
        key = t.untyped_storage()._cdata
        ref, entry = self._known.get(key, (None, None))
        if ref is None:
            return None
        alive = ref()
        if alive is None or alive.untyped_storage()._cdata != key:
            self._known.pop(key, None)
            return None
        return entry

    # -- saving -------------------------------------------------------------------------------
    def pack(self, t: Tensor) -> Any:
        entry = self._find(t) if self.lean else None
        if entry is None:
            return self.policy.pack(t)
        entry.settle(self)
        return _Note(entry, t)

    @staticmethod
    def unpack(x: Any) -> Tensor:
        return x.open()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch what runs inside; nested calls join the outermost one."""
        if self._depth:
            yield
            return
        self._depth += 1
        self.on_start()
        self.policy.start()
        try:
            with self, torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
                yield
        finally:
            self._depth -= 1
            self._known.clear()

    def __deepcopy__(self, memo: dict) -> Tape:
        new = type(self)(self.lean, self.policy)
        memo[id(self)] = new
        return new

    def __reduce__(self) -> tuple:
        return type(self), (self.lean,)
