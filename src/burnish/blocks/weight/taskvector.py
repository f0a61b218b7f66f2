"""Task vectors: tau = tuned - base, over whole checkpoints and never whole in memory.

A :class:`TaskVector` streams the pairs in pieces, so statistics over *all* merged entries (a
threshold, a deviation) need no flat copy; :func:`combine` writes the merged checkpoint one tensor
at a time (checkpoints.py says what a checkpoint is). :class:`Changed` is one to which something
was done first. A part of a merge answers :class:`Changes` or :class:`Rules`; :func:`merged` is what
several of them make.

Differences and sums are taken in fp64 and rounded once to the dtype of the base: subtracting
bf16 checkpoints in bf16 would destroy tau, and theta_0 + (theta_1 - theta_0) is theta_1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ..choose.quantile import radix
from .checkpoints import PIECE, STATISTICS, Checkpoint, facts

#: ((T, n) fp64 piece of all task vectors, tensor name, first entry) -> (n,) to add to the base
Rule = Callable[[Tensor, str, int], Tensor]
#: (first entry, one past the last) of a flat tensor -> those entries, fp64
Reader = Callable[[int, int], Tensor]


class Task:
    """A stream of changes, whatever they come from.

    shapes: the tensors that are merged, in order.  skipped: every other name -> why.  tied: name ->
    its first.
    """

    shapes: dict[str, torch.Size]
    skipped: dict[str, str]
    tied: dict[str, str]

    def reader(self, name: str) -> Reader:
        """Entries of tau of one tensor, in fp64; what it needs is read here, once."""
        raise NotImplementedError

    def start(self, name: str) -> Reader:
        """Entries of the base's tensor, in fp64."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def numel(self) -> int:
        return sum(s.numel() for s in self.shapes.values())

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """tau of one tensor."""
        return self.reader(name)(0, self.shapes[name].numel()).view(self.shapes[name]).to(dtype)

    def pieces(self, piece: int = PIECE) -> Iterator[Tensor]:
        """All of tau, flat, in fp32 pieces of at most `piece` entries."""
        for name in self.names:
            read, n = self.reader(name), self.shapes[name].numel()
            for i in range(0, n, piece):
                yield read(i, min(i + piece, n)).float()

    def threshold(self, keep: float) -> float:
        """The magnitude t such that ``|tau| >= t`` keeps the ceil(keep n) largest entries, over
        all merged tensors together (more only where magnitudes tie)."""
        return threshold(self.pieces, self.numel, keep)

    def std(self) -> float:
        """Standard deviation (over n, not n - 1) of all entries, in two passes."""
        mean = math.fsum(float(p.sum(dtype=torch.float64)) for p in self.pieces()) / self.numel
        return math.sqrt(math.fsum(float((p.double() - mean).square().sum())
                                   for p in self.pieces()) / self.numel)


class Changed(Task):
    """``change(piece, tensor name, first entry)`` of another's stream."""

    def __init__(self, of: Task, change: Callable[[Tensor, str, int], Tensor]):
        self.of, self.change = of, change
        self.shapes, self.skipped, self.tied = of.shapes, of.skipped, of.tied

    def reader(self, name: str) -> Reader:
        read = self.of.reader(name)
        return lambda i, j: self.change(read(i, j), name, i)

    def start(self, name: str) -> Reader:
        return self.of.start(name)


class TaskVector(Task):
    """What training changed: tuned - base.

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

    def reader(self, name: str) -> Reader:
        b, t = self.base[name].reshape(-1), self.tuned[name].reshape(-1)
        return lambda i, j: t[i:j].to(b.device, torch.float64) - b[i:j].double()

    def start(self, name: str) -> Reader:
        b = self.base[name].reshape(-1)
        return lambda i, j: b[i:j].double()


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


def together(tasks: Sequence[Task], piece: int = PIECE) -> Iterator[tuple[str, int, Tensor]]:
    """(tensor name, first entry, (T, n) fp64 piece) over what all tasks merge."""
    for name in [n for n in tasks[0].names if all(n in t.shapes for t in tasks)]:
        yield from ((name, i, rows) for i, rows in pieces_of(tasks, name, piece))


def pieces_of(tasks: Sequence[Task], name: str, piece: int = PIECE
              ) -> Iterator[tuple[int, Tensor]]:
    """(first entry, (T, n) fp64 piece) of one tensor of all tasks."""
    readers, n = [t.reader(name) for t in tasks], tasks[0].shapes[name].numel()
    for i in range(0, n, piece):
        yield i, torch.stack([read(i, min(i + piece, n)) for read in readers])


def combine(base: Checkpoint, tasks: Sequence[Task], rule: Rule,
            piece: int = PIECE) -> Iterator[tuple[str, Tensor]]:
    """The merged checkpoint, tensor by tensor: ``theta = theta_0 + rule(tau_1 ... tau_T)``.

    Tensors that some task skips are the base's; tied ones stay tied.
    """
    shared = {n for n in base if all(n in t.shapes or n in t.tied for t in tasks)}
    tied = {n: t.tied[n] for t in tasks for n in shared if n in t.tied}
    written: dict[str, Tensor] = {}
    for name in base:
        if name not in shared:
            yield name, base[name]
        elif name in tied and tied[name] in written:
            yield name, written[tied[name]]
        else:
            start = base[name]
            out = torch.empty(start.shape, dtype=start.dtype, device=start.device)
            flat, was = out.view(-1), start.reshape(-1)
            for i, rows in pieces_of(tasks, name, piece):
                j = i + rows.shape[1]
                flat[i:j] = (was[i:j].double() + rule(rows, name, i)).to(out.dtype)
            if name in tied.values():
                written[name] = out
            yield name, out


# -- parts of a merge -----------------------------------------------------------------------------
@runtime_checkable
class Changes(Protocol):
    """What is done to each task vector before any rule."""

    def change(self, task: Task, number: int) -> Task:
        """number: of the task among those that are merged, from 0."""


@runtime_checkable
class Rules(Protocol):
    """How several task vectors become one."""

    def rule(self, tasks: Sequence[Task]) -> Rule:
        """Statistics over whole task vectors are taken here, in passes over their pieces."""


def planned(parts: Sequence[Any], tasks: Sequence[Task]) -> tuple[list[Task], Rule]:
    """(the task vectors as the parts change them, in written order; what joins them)."""
    rule = check_parts(parts)
    if not tasks:
        raise ConfigError("there is nothing to merge")
    shared = {n for n in tasks[0].names if all(n in t.shapes for t in tasks)}
    out = [_only(t, shared) for t in tasks]
    for part in parts[:-1]:
        out = [part.change(t, i) for i, t in enumerate(out)]
    return out, rule.rule(out)


def _only(task: Task, names: set[str]) -> Task:
    """What is not merged has no part in the statistics."""
    out = Changed(task, lambda tau, *_: tau)
    out.shapes = {n: s for n, s in task.shapes.items() if n in names}
    return out


def check_parts(parts: Sequence[Any]) -> Rules:
    """The rule of a merge, its last part. ConfigError where there is none, more than one, or
    something that says nothing about merging."""
    rules = [p for p in parts if isinstance(p, Rules)]
    if odd := [p for p in parts if not isinstance(p, Rules | Changes)]:
        raise ConfigError(f"{odd[0].name} says nothing about merging")
    if len(rules) != 1:
        said = " and ".join(p.name for p in rules)
        raise ConfigError(f"{said} are two rules for one merge; keep one" if rules else
                          "nothing says how task vectors are joined; add a rule, as in "
                          f"'{' + '.join([*(str(p) for p in parts), 'task_arithmetic'])}'")
    if parts[-1] is not rules[0]:
        raise ConfigError(f"{rules[0].name} joins the task vectors, so nothing can be done to them "
                          f"after it; write {parts[-1].name} before it")
    return rules[0]


def merged(base: Checkpoint, tuned: Sequence[Checkpoint], parts: Sequence[Any]
           ) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint that `parts` (of the lifecycle: changes, then a rule) make of these."""
    tasks, rule = planned(parts, [TaskVector(base, t) for t in tuned])
    return combine(base, tasks, rule)
