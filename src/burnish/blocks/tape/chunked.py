"""Cross-entropy over a vocabulary whose logits never exist whole.

For rows x_n of a hidden state, logits ``z_n = head(x_n)`` over V words, ``s_n = log sum_v e^z_nv``:

    l_n = a_n s_n - sum_v c_nv z_nv + k s_n^2,      loss = sum_n r_n l_n

with c_n the weighted target (class weights, smoothing; ``a_n = sum_v c_nv``), k the z-loss and
r_n = 1, or 1 over the total weight of the labels for a mean. Rows are taken `chunk` at a time. A
chunk's logits become their own gradient in place,

    dl_n / dz_n = r_n ((a_n + 2 k s_n) softmax(z_n) - c_n),

which goes through the head at once: the same products as a loss on whole logits, no second forward.
Kept until backward, which multiplies by what arrives: dx (rows, in), and in fp32 the gradient of
what trains in the head. Rows without a label are never made.

Memory beside that: ``chunk * V * 4`` bytes in fp32 (8 in fp64, 6 in half precision: the head's
result and its fp32 copy). Sums, exponentials and accumulated gradients are in fp32 or wider.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from ...core.errors import ConfigError, nearest
from .cast import uncast
from .functions import once_differentiable

CHUNK = 256


@dataclass(frozen=True)
class Head:
    """How rows become logits.

    run: (rows, in) -> (rows, V), differentiable.  reads: the tensors it reads that may train.
    stock: gives (weight (V, in), bias or None) where ``x W^T + b`` is all that `run` does, else
    None; W may be one that is decoded for the occasion.
    dtype: that of the product; None: the rows' own.
    keeps: may the graph of `run` read its result again, so that it must not be changed in place?
    """

    run: Callable[[Tensor], Tensor]
    reads: tuple[Tensor, ...] = ()
    stock: Callable[[], tuple[Tensor, Tensor | None] | None] = lambda: None
    dtype: torch.dtype | None = None
    keeps: bool = False


def linear_head(weight: Tensor, bias: Tensor | None = None) -> Head:
    """The head ``x W^T + b`` with W (V, in)."""
    reads = (weight,) if bias is None else (weight, bias)
    return Head(lambda x: F.linear(x, weight, bias), reads, lambda: (weight, bias))


class Shard(NamedTuple):
    """This process's part of a vocabulary: the rows of the head from `first` on, and the group
    (of torch.distributed) whose processes hold the others."""

    group: Any
    first: int

    def all(self, t: Tensor, how: str) -> Tensor:
        import torch.distributed as dist

        dist.all_reduce(t, getattr(dist.ReduceOp, how), group=self.group)
        return t


def cross_entropy(x: Tensor, head: Head, target: Tensor, weight: Tensor | None = None, *,
                  ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
                  z_loss: float = 0.0, chunk: int = CHUNK, dtype: torch.dtype | None = None,
                  shard: Shard | None = None) -> Tensor:
    """``F.cross_entropy(head(x), target, ...)``, a chunk of rows at a time.

    x: (rows, in).  target: (rows,) labels, or (rows, V) probabilities (of a shard: its columns).
    weight: (V,) of the classes.  z_loss: k above.  dtype: of the result; None: the wider of x's
    and fp32. With reduction="none" the rows' gradients cannot be made before they are weighed:
    backward runs the head again.
    """
    job = _Job(head, target, weight, ignore_index, reduction, label_smoothing, z_loss, chunk,
               dtype or _wide(x.dtype), shard)
    return _applied(job, x)


def logsumexp(x: Tensor, head: Head, *, chunk: int = CHUNK,
              dtype: torch.dtype | None = None) -> Tensor:
    """``head(x).logsumexp(-1)`` for x (rows, in), a chunk at a time; backward runs it again."""
    job = _Job(head, None, None, -100, "none", 0.0, 0.0, chunk, dtype or _wide(x.dtype), None)
    return _applied(job, x)


@torch.no_grad()
def argmax(x: Tensor, head: Head, *, chunk: int = CHUNK) -> Tensor:
    """``head(x).argmax(-1)`` for x (rows, in)."""
    return torch.cat([head.run(part).argmax(-1) for part in x.split(chunk)])


def spans(n: int, size: int) -> Iterator[tuple[int, int]]:
    """``[start, stop)`` of each chunk of n rows."""
    return ((start, min(start + size, n)) for start in range(0, n, size))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _applied(job: _Job, x: Tensor) -> Tensor:
    if job.reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"reduction={job.reduction!r}: expected mean, sum or none"
                          f"{nearest(job.reduction, ('mean', 'sum', 'none'))}")
    reads = job.head.reads
    if not torch.is_grad_enabled():
        return job.reduced(job.run(x, [False] * (1 + len(reads))), len(x))
    function = _Rows if job.reduction == "none" else _Loss
    return function.apply(job, x, *reads)


class _Made(NamedTuple):
    """rows: l_n of the rows that count. places: which they are; None: all. grads: of x, reads."""

    rows: Tensor
    places: Tensor | None
    total: Tensor | None
    grads: list[Tensor | None]


@dataclass(frozen=True)
class _Job:
    """One loss: what :func:`cross_entropy` was asked for."""

    head: Head
    target: Tensor | None
    weight: Tensor | None
    ignore: int
    reduction: str
    smoothing: float
    z: float
    chunk: int
    dtype: torch.dtype
    shard: Shard | None

    # -- which rows, and what they weigh --------------------------------------------------------
    @property
    def hard(self) -> bool:
        return self.target is not None and not self.target.is_floating_point()

    def places(self) -> Tensor | None:
        """The rows with a label; None where all of them have one, or nobody can know."""
        if not self.hard:
            return None
        try:
            found = (self.target != self.ignore).nonzero().squeeze(1)
        except DynamicOutputShapeException:          # fake labels: as if all were asked
            return None
        return None if len(found) == len(self.target) else found

    def total(self, places: Tensor | None, width: int) -> Tensor | None:
        """The weight of all labels, by which a mean divides; None for a sum."""
        if self.reduction != "mean":
            return None
        t, wide = self.target, _wide(self.dtype)
        if not self.hard or self.weight is None:
            n = len(t) if places is None else len(places)
            return torch.tensor(float(n), dtype=wide, device=t.device)
        t = t if places is None else t[places]
        return self._of_label(self.weight.to(wide), t, width).sum()

    def _of_label(self, by_class: Tensor, t: Tensor, width: int) -> Tensor:
        """by_class[t], over all shards."""
        if self.shard is None:
            return by_class[t]
        mine, at = self._mine(t, width)
        return self.shard.all(by_class[at] * mine, "SUM")

    def _mine(self, t: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """(is it a row of this shard?, which; 0 where it is none)."""
        at = t - self.shard.first
        mine = (at >= 0) & (at < width)
        return mine, at * mine

    def wide(self, x: Tensor) -> torch.dtype:
        """In which l_n and what weighs it are held."""
        return torch.promote_types(_wide(x.dtype), self.dtype)

    # -- all rows -------------------------------------------------------------------------------
    def run(self, x: Tensor, wanted: Sequence[bool], by: Tensor | None = None) -> _Made:
        """wanted: of x and of each of the head's reads, is a gradient asked for? by: what weighs
        each row's; None: what the reduction says."""
        places = self.places()
        n = len(x) if places is None else len(places)
        with uncast(x), _kept_as_it_is():
            stock = self.head.stock()
            through: Any = _General(self.head, wanted) if stock is None else \
                _Stock(self.head, stock, wanted, self.chunk)
            rows = x.new_empty(n, dtype=self.wide(x))
            dx = None
            if wanted[0]:
                dx = torch.empty_like(x) if places is None else torch.zeros_like(x)
            total = None
            for start, stop in spans(n, self.chunk):
                which: Any = slice(start, stop) if places is None else places[start:stop]
                z = through.logits(x[which])
                if total is None:
                    total = self.total(places, z.shape[1])
                r = by[which] if by is not None else \
                    z.new_ones(()) if total is None else total.reciprocal()
                rows[start:stop] = self.rows_(z, which, r, any(wanted))
                if any(wanted) and (part := through.back(z)) is not None:
                    dx[which] = part.to(dx.dtype)
        if self.shard is not None and dx is not None:
            dx = self.shard.all(dx.to(_wide(dx.dtype)), "SUM").to(dx.dtype)
        grads = [dx, *through.grads]
        if not n:                                    # nothing counts, as torch has it
            total = rows.new_zeros(()) if self.reduction == "mean" else None
            grads = [torch.zeros_like(t) if w else None
                     for t, w in zip((x, *self.head.reads), wanted, strict=True)]
        return _Made(rows, places, total, grads)

    def rows_(self, z: Tensor, which: Any, r: Tensor, grads: bool) -> Tensor:
        """l_n of a chunk; z becomes its gradient, where there are to be some. r: () or (rows,)."""
        c = self._target(z, which)
        m = self._all(z.amax(1), "MAX")
        s = self._all(z.sub_(m[:, None]).exp_().sum(1), "SUM")
        lse = m + s.log()
        rows = c.total * lse - c.at
        if self.z:
            rows = rows + self.z * lse.square()
        if grads:
            by = c.total + 2 * self.z * lse if self.z else c.total
            z.mul_((r * by / s)[:, None])
            c.subtract(z, r)
        return rows

    def _all(self, t: Tensor, how: str) -> Tensor:
        return t if self.shard is None else self.shard.all(t, how)

    def _target(self, z: Tensor, which: Any) -> _Target:
        """c of a chunk, read while z are logits."""
        weight = None if self.weight is None else self.weight.to(z.dtype)
        even = self.smoothing / self._classes(z)
        if self.target is None:
            return _Target(1.0, 0.0, lambda z, r: None)
        if self.hard:
            return self._labels(z, self.target[which], weight, even)
        q = self.target[which].to(z.dtype)
        if self.smoothing or weight is not None:
            q = q * (1 - self.smoothing) + even
            q = q if weight is None else q.mul_(weight)
        at = torch.bmm(q[:, None], z[:, :, None]).flatten()
        return _Target(self._all(q.sum(1), "SUM"), self._all(at, "SUM"),
                       lambda z, r: z.addcmul_(q, _column(r), value=-1))

    def _labels(self, z: Tensor, t: Tensor, weight: Tensor | None, even: float) -> _Target:
        own: Any = 1 - self.smoothing
        if weight is not None:
            own = own * self._of_label(weight, t, z.shape[1])
        if self.shard is None:
            mine, at = None, t[:, None]
        else:
            mine, at = self._mine(t, z.shape[1])
            at = at[:, None]
        z_t = z.gather(1, at).squeeze(1)
        z_t = z_t if mine is None else self._all(z_t * mine, "SUM")
        total, value = own, own * z_t
        if even:
            flat = z.sum(1) if weight is None else z @ weight
            all_weights = z.new_tensor(float(z.shape[1])) if weight is None else weight.sum()
            total = total + even * self._all(all_weights.clone(), "SUM")
            value = value + even * self._all(flat, "SUM")

        def subtract(z: Tensor, r: Tensor) -> None:
            less = (-own * r).expand(len(z))
            less = less if mine is None else less * mine
            z.scatter_add_(1, at, less[:, None])
            if even and weight is None:
                z.sub_(_column(r), alpha=even)
            elif even:
                z.addcmul_(weight, _column(r), value=-even)

        return _Target(total, value, subtract)

    def _classes(self, z: Tensor) -> int:
        if self.shard is None or not self.smoothing:
            return z.shape[1]
        return int(self.shard.all(torch.tensor(z.shape[1], device=z.device), "SUM"))

    def reduced(self, made: _Made, n: int) -> Tensor:
        if self.reduction == "none":
            rows = made.rows
            if made.places is not None:
                rows = rows.new_zeros(n).index_copy_(0, made.places, rows)
            return rows.to(self.dtype)
        value = made.rows.sum()
        return (value if made.total is None else value / made.total).to(self.dtype)


class _Target(NamedTuple):
    """c of a chunk. total: a_n.  at: sum_v c_nv z_nv.  subtract: ``z -= r c``."""

    total: Any
    at: Any
    subtract: Callable[[Tensor, Tensor], Any]


def _column(r: Tensor) -> Tensor:
    return r[:, None] if r.dim() else r


@contextlib.contextmanager
def _kept_as_it_is() -> Iterator[None]:
    """What a chunk keeps for its own backward, a moment later, is nobody's business."""
    with saved_tensors_hooks(Tensor.detach, lambda t: t):
        yield


# -- through the head, and back -------------------------------------------------------------------
class _Stock:
    """``x W^T + b``: two products in one buffer, nothing else of the logits' size."""

    def __init__(self, head: Head, stock: tuple[Tensor, Tensor | None], wanted: Sequence[bool],
                 chunk: int):
        self.grads: list[Tensor | None] = [None] * len(head.reads)
        self.dx, self.chunk = wanted[0], chunk
        self.dtype = head.dtype or stock[0].dtype
        self.weight, self.bias = (None if t is None else t.detach().to(self.dtype) for t in stock)
        self.dW, self.db = (self._sum(t, head.reads, wanted) for t in stock)
        self.made: Tensor | None = None

    def _sum(self, t: Tensor | None, reads: Sequence[Tensor], wanted: Sequence[bool]
             ) -> Tensor | None:
        """Where the gradient of a tensor gathers, if it is asked for."""
        for i, (read, want) in enumerate(zip(reads, wanted[1:], strict=True)):
            if read is t and want:
                self.grads[i] = torch.zeros_like(read, dtype=_wide(read.dtype))
                return self.grads[i]
        return None

    def logits(self, x: Tensor) -> Tensor:
        self.x = x = x.detach().to(self.dtype)
        if self.made is None:
            self.made = x.new_empty(min(self.chunk, len(x)), len(self.weight))
            wide = _wide(self.dtype)
            self.wide = self.made if wide == self.dtype else torch.empty_like(self.made, dtype=wide)
        y = self.made[: len(x)]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=y)
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=y)
        return y if self.wide is self.made else self.wide[: len(x)].copy_(y)

    def back(self, z: Tensor) -> Tensor | None:
        y = z if self.wide is self.made else self.made[: len(z)].copy_(z)
        if self.db is not None:
            self.db += z.sum(0)
        if self.dW is not None and self.dW.dtype == y.dtype:
            self.dW.addmm_(y.t(), self.x)
        elif self.dW is not None:
            self.dW += y.t() @ self.x
        return y @ self.weight if self.dx else None


class _General:
    """Any head: autograd through one chunk at a time."""

    def __init__(self, head: Head, wanted: Sequence[bool]):
        self.head, self.wanted = head, wanted
        self.grads: list[Tensor | None] = [None] * len(head.reads)

    def logits(self, x: Tensor) -> Tensor:
        self.x = x.detach().requires_grad_(self.wanted[0])
        with torch.set_grad_enabled(any(self.wanted)):
            y = self.head.run(self.x)
        self.edge, self.dtype = get_gradient_edge(y) if y.requires_grad else None, y.dtype
        return y.detach().to(_wide(y.dtype), copy=self.head.keeps)

    def back(self, z: Tensor) -> Tensor | None:
        read = [self.x, *self.head.reads]
        some = [t for t, w in zip(read, self.wanted, strict=True) if w]
        edge, self.edge = self.edge, None
        made = iter(torch.autograd.grad([edge], some, [z.to(self.dtype)], allow_unused=True))
        dx, *grads = [next(made) if w else None for w in self.wanted]
        for i, g in enumerate(grads):
            if g is not None:
                self.grads[i] = g.to(_wide(g.dtype)) if self.grads[i] is None else \
                    self.grads[i].add_(g)
        return dx


class _Loss(torch.autograd.Function):
    """A scalar: gradients are made in forward, backward multiplies them by what arrives."""

    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, *reads: Tensor) -> Tensor:
        made = job.run(x, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*made.grads)
        ctx.dtypes = [t.dtype for t in (x, *reads)]
        return job.reduced(made, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[None if d is None else (d * g).to(t)
                       for d, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]


class _Rows(torch.autograd.Function):
    """A number per row: the head runs again once it is known what each row weighs."""

    @staticmethod
    def forward(ctx: Any, job: _Job, x: Tensor, *reads: Tensor) -> Tensor:
        ctx.job = job
        ctx.save_for_backward(x, *reads)
        return job.reduced(job.run(x, [False] * (1 + len(reads))), len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *reads = ctx.saved_tensors
        made = ctx.job.run(x, ctx.needs_input_grad[1:], g.to(ctx.job.wide(x)))
        return None, *[None if d is None else d.to(t.dtype)
                       for d, t in zip(made.grads, (x, *reads), strict=True)]
