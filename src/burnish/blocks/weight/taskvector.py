"""Task vectors: tau = tuned - base, over whole checkpoints and never whole in memory.

A :class:`TaskVector` streams the pairs in pieces, so statistics over *all* merged entries (a
threshold, a deviation) need no flat copy; :func:`combine` writes the merged checkpoint one tensor
at a time (checkpoints.py says what a checkpoint is).

Differences and sums are taken in fp64 and rounded once to the dtype of the base: subtracting
bf16 checkpoints in bf16 would destroy tau, and theta_0 + (theta_1 - theta_0) is theta_1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ..choose.quantile import radix
from .checkpoints import PIECE, STATISTICS, Checkpoint, blended, facts

Rule = Callable[[Tensor, str, int], Tensor]


class TaskVector:
    """What training changed, as a stream.

    names: the tensors that are merged, in the order of the base: floating point, in both, of one
    shape. skipped: every other name -> why. Tied tensors count once (`tied`: name -> its first).
    """

    def __init__(self, base: Checkpoint, tuned: Checkpoint):
        self.base, self.tuned = base, tuned
        self.skipped: dict[str, str] = {}
        self.tied: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}
        owners: dict[tuple[int | str, torch.Size, tuple[int, ...]], str] = {}
        for name in base:
            b = facts(base, name)
            if name not in tuned:
                self.skipped[name] = "not in the tuned checkpoint"
            elif not b.is_floating_point():
                self.skipped[name] = f"{b.dtype} is copied, not averaged"
            elif name.rpartition(".")[2] in STATISTICS:
                self.skipped[name] = "statistics of the data are measured again, not averaged"
            elif (other := facts(tuned, name).shape) != b.shape:
                self.skipped[name] = f"{list(other)} beside {list(b.shape)}"
            else:
                # only tensors that stay in memory have an address of their own
                key = (b.data_ptr() if isinstance(base, dict) else name, b.shape, b.stride())
                if owners.setdefault(key, name) != name and _same(tuned, owners[key], name):
                    self.tied[name] = owners[key]
                else:
                    self.shapes[name] = b.shape
        for name in tuned:
            if name not in base:
                self.skipped[name] = "not in the base"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def numel(self) -> int:
        return sum(s.numel() for s in self.shapes.values())

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """tau of one tensor."""
        return (self.tuned[name].double() - self.base[name].double()).to(dtype)

    def pieces(self, piece: int = PIECE) -> Iterator[Tensor]:
        """All of tau, flat, in fp32 pieces of at most `piece` entries."""
        for name in self.names:
            b, t = self.base[name].reshape(-1), self.tuned[name].reshape(-1)
            for i in range(0, b.numel(), piece):
                yield (t[i : i + piece].double() - b[i : i + piece].double()).float()

    def threshold(self, keep: float) -> float:
        """The magnitude t such that ``|tau| >= t`` keeps the ceil(keep n) largest entries, over
        all merged tensors together (more only where magnitudes tie)."""
        return threshold(self.pieces, self.numel, keep)

    def std(self) -> float:
        """Standard deviation (over n, not n - 1) of all entries, two passes."""
        mean = math.fsum(float(p.sum(dtype=torch.float64)) for p in self.pieces()) / self.numel
        return math.sqrt(math.fsum(float((p.double() - mean).square().sum())
                                   for p in self.pieces()) / self.numel)


def _same(tuned: Checkpoint, one: str, two: str) -> bool:
    a, b = tuned[one], tuned[two]
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def threshold(pieces: Callable[[], Iterable[Tensor]], n: int, keep: float) -> float:
    """:meth:`TaskVector.threshold` for any stream of fp32 pieces.

    Exact, by histograms over the bits of the magnitudes (``choose/quantile.py``). Raises
    ConfigError for inf or nan in the stream.
    """
    if not 0 <= keep <= 1:
        raise ConfigError(f"keep is a fraction between 0 and 1, not {keep}")
    k = min(n, math.ceil(round(keep * n, 6)))
    return math.inf if k == 0 else float(radix(lambda: _sizes(pieces), n, n - k)[0])


def _sizes(pieces: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
    for piece in pieces():
        if not piece.isfinite().all():
            raise ConfigError("a task vector holds inf or nan; it has no threshold")
        yield piece.detach().abs()


def combine(base: Checkpoint, tasks: Sequence[TaskVector], rule: Rule,
            piece: int = PIECE) -> Iterator[tuple[str, Tensor]]:
    """The merged checkpoint, tensor by tensor: ``theta = theta_0 + rule(tau_1 ... tau_T)``.

    rule: ((T, n) fp64 piece of all task vectors, tensor name, first entry) -> (n,) to add.
    Tensors that some task skips are the base's; tied ones stay tied.
    """
    merged = {n for n in base if all(n in t.shapes or n in t.tied for t in tasks)}
    tied = {n: t.tied[n] for t in tasks for n in merged if n in t.tied}
    written: dict[str, Tensor] = {}
    for name in base:
        if name not in merged:
            yield name, base[name]
        elif name in tied and tied[name] in written:
            yield name, written[tied[name]]
        else:
            out = blended([base[name], *(t.tuned[name] for t in tasks)],
                          lambda rows, i, n=name: rows[0] + rule(rows[1:] - rows[0], n, i), piece)
            if name in tied.values():
                written[name] = out
            yield name, out
