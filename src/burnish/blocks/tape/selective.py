"""What a block has computed at a price is kept, the rest is made again: products, convolutions and
attention are answered from the first run when backward runs the block a second time.

    first     h = norm(x)   q = h W_q^T   ...    o = attention(q, k, v)      kept: q, k, v, o, ...
    second    h = norm(x)   q: as it was  ...    o: as it was                norms, activations,
                                                                             dropout run again

Operators are seen below autograd, so the second run builds the graph of a whole run. Kept is what
depends on the tokens: a product that only makes a weight is made again, as its block does anyway.

A product that only sums have read (the block's last one, which goes into the residual) is kept by
nobody: no backward asks for its numbers, so the second run is answered with its shape.

A product that is changed in place before anybody reads it (``y.addmm_(...)``, an activation in
place) is kept as it ends, and the changes are answered with it; one that is changed after it was
read is made again.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .functions import storage_of

#: operators whose results are kept
COSTLY = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "convolution", "_convolution",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable"})


_KEPT = object()
_LSE = "compute_log_sumexp"
_OTHERWISE = ("a block did something else when it ran again, so what its first run made does "
              "not fit; take checkpoint(mode='whole')")
#: what reads a tensor without its backward asking for it, and changes of that kind
_SUMS, _SUMMED = frozenset({"add", "sub"}), frozenset({"add_", "sub_", "addmm_", "baddbmm_"})


class Answers:
    """The costly results of one block, in the order they were made."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    def first(self, given: Sequence[Tensor]) -> _First:
        """The mode of the first run. given: what depends on the tokens."""
        return _First(self, given)

    def kept(self) -> list[Tensor]:
        """What backward has to keep, without the ways it came about."""
        out = []
        for call in self.calls:
            tensors = [t for t in call.made if isinstance(t, Tensor)]
            if call.wanted and not call.again:
                out += [t.detach() for t in tensors]
            call.made = [v if not isinstance(v, Tensor) else _KEPT if call.wanted else
                         (v.size(), v.stride(), v.dtype, v.device) for v in call.made]
        return out

    def second(self, given: Sequence[Tensor], kept: Sequence[Tensor]) -> _Second:
        """The mode of a further run."""
        return _Second(self, given, kept)


class _Call:
    """One operator. made, spec: its results (tensors while the first run lasts); a change in place
    has none of its own. again: it runs again, as what draws random numbers must. wanted: are its
    numbers (attention's backward reads its own results)?"""

    __slots__ = ("func", "shapes", "made", "spec", "again", "wanted")

    def __init__(self, func: Any, args: tuple, kwargs: dict, out: Any = None):
        self.func, self.shapes = func, _shapes(args, kwargs)
        self.made, self.spec = pytree.tree_flatten(out)
        self.again = bool(dict(_named(func, args, kwargs)).get("dropout_p"))
        self.wanted = _name(func).startswith("_scaled")


def _named(func: Any, args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
    names = [a.name for a in func._schema.arguments]
    return [*zip(names, args, strict=False), *kwargs.items()]


def _shapes(args: tuple, kwargs: dict) -> list[Any]:
    return [v.shape if isinstance(v, Tensor) else v for v in pytree.tree_leaves((args, kwargs))]


def _tensors(value: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]


class _Mode(TorchDispatchMode):
    """Follows what depends on the tokens, by storage."""

    def __init__(self, given: Sequence[Tensor]):
        super().__init__()
        self.of_tokens: dict[int, Any] = {}
        self.spread(given)

    def spread(self, tensors: Sequence[Tensor]) -> None:
        for t in tensors:
            if (key := storage_of(t)) is not None:
                self.of_tokens[key] = weakref.ref(t.untyped_storage())

    def depends(self, tensors: Sequence[Tensor]) -> bool:
        return any((ref := self.of_tokens.get(storage_of(t) or 0)) is not None
                   and ref() is not None for t in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        if func.namespace == "prim" or not self.depends(given):     # where it is, is no reading
            return func(*args, **kwargs)
        written = {a.name for a in func._schema.arguments
                   if a.alias_info is not None and a.alias_info.is_write}
        changed = _tensors([v for name, v in _named(func, args, kwargs) if name in written])
        out = self.run(func, args, kwargs, given, changed)
        self.spread(_tensors(out))
        return out

    def run(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor],
            changed: list[Tensor]) -> Any:
        raise NotImplementedError


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


class _Held:
    """A storage of the first run. calls: what has made it; sums: what else has gone into it. read:
    has somebody read it?"""

    def __init__(self, t: Tensor, calls: list[_Call], sums: list[_Call]):
        self.storage = weakref.ref(t.untyped_storage())
        self.calls, self.sums, self.read = calls, sums, False

    def want(self) -> None:
        for call in (*self.calls, *self.sums):
            call.wanted = True


class _First(_Mode):
    def __init__(self, answers: Answers, given: Sequence[Tensor]):
        super().__init__(given)
        self.answers = answers
        self.held: dict[int, _Held] = {}

    def _of(self, tensors: Sequence[Tensor]) -> list[_Held]:
        found = {storage_of(t) or 0: self.held.get(storage_of(t) or 0) for t in tensors}
        return [h for h in found.values() if h is not None and h.storage() is not None]

    def run(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor],
            changed: list[Tensor]) -> Any:
        if _LSE in (names := [name for name, _ in _named(func, args, kwargs)]):
            args = (*args[:(k := names.index(_LSE))], True, *args[k + 1:])   # backward will want it
        out = func(*args, **kwargs)
        made = {storage_of(t) for t in _tensors(out)}
        if not changed and made and made <= set(map(storage_of, given)):
            return out                               # a view reads nothing
        summed = not changed and _name(func) in _SUMS
        read = self._of([t for t in given if not any(t is c for c in changed)])
        for h in read:
            h.read = True
            if not summed:
                h.want()
        for h in self._of(changed):
            call = _Call(func, args, kwargs)
            self.answers.calls.append(call)
            h.calls.append(call)
            if h.read:                               # it was wanted as it had been
                for c in h.calls:
                    c.again = True
            if _name(func) not in _SUMMED:
                h.want()
        if not changed and _name(func) in COSTLY:
            call = _Call(func, args, kwargs, out)
            self.answers.calls.append(call)
            for t in _tensors(out):
                self.held[storage_of(t) or 0] = _Held(t, [call], [])
        elif summed and read:
            sums = [c for h in read for c in (*h.calls, *h.sums)]
            self.held[storage_of(out) or 0] = _Held(out, [], sums)
        return out


class _Second(_Mode):
    def __init__(self, answers: Answers, given: Sequence[Tensor], kept: Sequence[Tensor]):
        super().__init__(given)
        self.calls, self.kept = iter(answers.calls), iter(kept)
        self.lost = False                            # it does something else than the first
        self.held: dict[int, Any] = {}               # storages of what the first run made

    def run(self, func: Any, args: tuple, kwargs: dict, given: list[Tensor],
            changed: list[Tensor]) -> Any:
        mine = [t for t in changed if (ref := self.held.get(storage_of(t) or 0)) is not None
                and ref() is not None]
        if self.lost or not mine and (changed or _name(func) not in COSTLY):
            if mine:
                raise RuntimeError(_OTHERWISE)
            return func(*args, **kwargs)
        call = next(self.calls, None)
        if call is None or call.func is not func or call.shapes != _shapes(args, kwargs):
            self.lost = True                         # from here on everything runs again
            return self.run(func, args, kwargs, given, changed)
        if changed:
            return func(*args, **kwargs) if call.again else args[0]
        out = func(*args, **kwargs) if call.again else pytree.tree_unflatten(
            [self._answer(v) for v in call.made], call.spec)
        for t in _tensors(out):
            self.held[storage_of(t) or 0] = weakref.ref(t.untyped_storage())
        return out

    def _answer(self, v: Any) -> Any:
        if v is _KEPT:
            return next(self.kept).detach()
        return torch.empty_strided(v[0], v[1], dtype=v[2], device=v[3]) \
            if isinstance(v, tuple) else v
