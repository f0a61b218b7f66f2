"""Chains of several adapters in one batch, each sample through its own.

    y_i = x_i W^T + b + (x_i A_a^T) B_a^T        a = the adapter of sample i; none: the base alone

The product with W is one for all samples. Adapters with as many samples and about the same rank
stand side by side in a pair of batched products, so there are a few of those however many adapters
there are. Ranks are filled up with zeros, to twice their size at most; samples never are.

Letters: S samples, M tokens of a sample, O out, I in, R rank, G adapters of one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.followed import compiling
from ..tape.cast import autocast, uncast
from ..tape.functions import transformed
from .folded import Kept, Room
from .term import Term

#: what tells a tensor from what it was, while the memory it had is not used again (the shape is
#: told by steps and count, at half the price)
_ASKED: tuple[Callable[[Tensor], Any], ...] = (
    attrgetter("_version"), Tensor.data_ptr, attrgetter("dtype"), Tensor.stride, Tensor.numel)
_PLAIN = (Tensor, nn.Parameter)
#: what one adapter adds to a weight: terms with their weights
Terms = Sequence[tuple[Term, float]]


class _Product(NamedTuple):
    """Adapters of one batched product, and the samples that are theirs, adapter by adapter."""

    samples: slice | Tensor
    A_GRI: Tensor
    B_GRO: Tensor


class Grouped:
    """What several adapters add to one weight, for the samples of one batch.

    adapters: name -> its terms, each of which has a :meth:`~burnish.blocks.weight.term.Term.pair`.
    rows: the adapter of each sample; those of another name, or None, get nothing.
    columns: where in the output it is added (rows of a fused weight); None: everywhere.
    """

    def __init__(self, adapters: dict[str, Terms], rows: Sequence[Any],
                 columns: tuple[int, int] | None = None, room: Room | None = None):
        self.given, self.rows, self.columns, self.room = adapters, rows, columns, room
        self.kept: dict[Any, Kept] = {}
        self.of: dict[str, list[int]] = {}
        for i, name in enumerate(rows):
            if name in adapters:
                self.of.setdefault(name, []).append(i)
        self.adapters = {name: adapters[name] for name in self.of}
        self.terms = [t for terms in self.adapters.values() for t, _ in terms]
        self.homes = [(own, name) for t in self.terms for own in (t._parameters, t._buffers)
                      for name, p in own.items() if p is not None]
        self.numbers = [(vars(t), itemgetter(*names)) for t in self.terms if (names := [
            k for k, v in vars(t).items() if type(v) in (int, float, bool)])]

    def __reduce__(self) -> tuple:
        return Grouped, (self.given, self.rows, self.columns, self.room)

    def trains(self) -> bool:
        return any(p.requires_grad for t in self.terms for p in t.theta())

    def let_go(self) -> None:
        """This batch is over."""
        for made in self.kept.values():
            with made.room.lock:
                made.let_go()
        self.kept.clear()

    def add(self, x_SMI: Tensor, y_SMO: Tensor) -> Tensor:
        """y with what is added; in place where no graph is wanted. Nothing here may train."""
        x = autocast(x_SMI)
        with uncast(x):
            if torch.is_grad_enabled() or transformed():
                return self._beside(x, y_SMO)
            # nobody watches what keeps no graph
            with torch._C.DisableTorchFunction() if type(x) in _PLAIN else nullcontext():
                return self._into(x, y_SMO)

    def _into(self, x: Tensor, y: Tensor) -> Tensor:
        out = y if self.columns is None else y[..., slice(*self.columns)]
        for samples, A, B in self._products(x):
            h = _through(x[samples], A)
            if isinstance(samples, slice):
                part = out[samples]
                part = part.view(len(A), -1, part.shape[-1])
                part.baddbmm_(h.to(part.dtype), B.to(part.dtype))
            else:
                made = torch.bmm(h, B).to(y.dtype)
                out.index_add_(0, samples, made.view(len(samples), *out.shape[1:]))
        return y

    def _beside(self, x: Tensor, y: Tensor) -> Tensor:
        first, end = self.columns or (0, y.shape[-1])
        for samples, A, B in self._products(x):
            index = torch.arange(len(x), device=x.device)[samples]
            made = torch.bmm(_through(x[index], A), B).to(y.dtype)
            made = F.pad(made, (first, y.shape[-1] - end))
            y = y.index_add(0, index, made.reshape(len(index), *y.shape[1:]))
        return y

    # -- the factors side by side --------------------------------------------------------------
    def _products(self, x: Tensor) -> list[_Product]:
        """Made anew, or in evaluation those of last time while nothing has changed."""
        free = torch.is_grad_enabled() or transformed() or compiling() or \
            x.is_cuda and torch.cuda.is_current_stream_capturing()
        key = x.dtype, torch.cuda.current_stream(x.device) if x.is_cuda else None
        facts = None if free or self.room is None else self._facts()
        if facts is None:
            return list(self._made(x))
        made = self.kept.get(key)
        if made is None or not made.still(facts):
            with self.room.lock:
                if made is not None:
                    made.let_go()
                made = self.kept[key] = Kept(self.room, facts, ())
            with torch.inference_mode(False), torch.no_grad():
                made.keep("products", list(self._made(x)))
                # what it was made of stays, so that no address of theirs is used again
                made.keep("of", [t.detach() for t in self._tensors()])
        return made.found("products") or list(self._made(x))

    def _tensors(self) -> list[Tensor]:
        return [own[name] for own, name in self.homes]

    def _facts(self) -> list[Any] | None:
        """All that the factors depend on; None where it cannot be told."""
        try:
            with torch._C.DisableTorchFunction():    # what is asked is no operation to be watched
                now = self._tensors()
                return [*([*map(ask, now)] for ask in _ASKED),
                        *[numbers(own) for own, numbers in self.numbers]]
        except (RuntimeError, KeyError):             # no count of changes, or no memory of its own
            return None

    def _made(self, x: Tensor) -> Iterator[_Product]:
        alike: dict[tuple[int, int], list[tuple[list[int], Tensor, Tensor]]] = {}
        for name, samples in self.of.items():
            pairs = [(A, B if s == 1 else B * s) for A, B, s in
                     ((*t.pair(), s) for t, s in self.adapters[name])]
            A, B = (torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)) \
                if len(pairs) > 1 else pairs[0]
            size = len(samples), max(1, len(A) - 1).bit_length()
            alike.setdefault(size, []).append((samples, A, B))
        for members in alike.values():
            R = max(len(A) for _, A, _ in members)
            order = [i for samples, _, _ in members for i in samples]
            yield _Product(
                _run(order, x.device),
                torch.stack([F.pad(A, (0, 0, 0, R - len(A))).to(x.dtype) for _, A, _ in members]),
                torch.stack([F.pad(B.t(), (0, 0, 0, R - len(A))).to(x.dtype)
                             for _, A, B in members]))


def _through(x_SMI: Tensor, A_GRI: Tensor) -> Tensor:
    """(G, samples M, R), from the samples of G adapters."""
    x = x_SMI.reshape(len(A_GRI), -1, x_SMI.shape[-1])
    if x.shape[1] == 1:                          # one token: twice as quick with A read row by row
        return torch.bmm(A_GRI, x.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(x, A_GRI.transpose(1, 2))


def _run(order: list[int], device: torch.device) -> slice | Tensor:
    """Samples that follow each other are a view."""
    first, n = order[0], len(order)
    return slice(first, first + n) if order == list(range(first, first + n)) else \
        torch.tensor(order, device=device)
