"""Which tensors to train within a budget of backward: each costs its own gradient, and the way.

Tensors stand in the order in which backward reaches them. Training tensor k costs ``own[k]``, and
the gradient must have come so far: ``way[1] + ... + way[k]``, paid once for the deepest.

    max sum of worth over the chosen    while    way[1..deepest] + sum of own <= budget
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from ...core.protocols import Pass

#: choices that are kept side by side; up to so many the best one is found exactly
FRONT = 1000


@dataclass(frozen=True)
class Cost:
    """name of a tensor; way: FLOPs to bring the gradient to it from the tensor before; own: FLOPs
    of its own gradient."""

    name: str
    way: float
    own: float


@dataclass(frozen=True)
class _Some:
    """A choice among the tensors so far: what it costs without the way, and what it is worth."""

    own: float
    worth: float
    last: str = ""
    rest: _Some | None = None

    def names(self) -> Iterable[str]:
        some: _Some | None = self
        while some is not None and some.last:
            yield some.last
            some = some.rest


def within(costs: Sequence[Cost], worth: Mapping[str, float], budget: float) -> frozenset[str]:
    """The most valuable tensors that `budget` FLOPs of backward can train.

    By dynamic programming over depths: the best of the choices whose deepest tensor is the k-th.
    Exact while at most FRONT choices stand side by side (none of which costs less and is worth
    more); of more, the best in each of FRONT stretches of cost go on, with their exact costs, so
    that the budget is met in any case. Where nothing of worth fits, the cheapest tensor alone.
    """
    front, best, way = [_Some(0.0, 0.0)], _Some(0.0, 0.0), 0.0
    for cost in costs:
        way += cost.way
        if way > budget:
            break
        gain = worth.get(cost.name, 0.0)
        if gain <= 0:
            continue
        with_it = [_Some(s.own + cost.own, s.worth + gain, cost.name, s) for s in front
                   if s.own + cost.own + way <= budget]
        best = max([best, *with_it], key=lambda s: s.worth)
        front = _thinned(_undominated([*front, *with_it]), budget)
    if best.last:
        return frozenset(best.names())
    way, cheapest = 0.0, []
    for cost in costs:
        way += cost.way
        cheapest.append((way + cost.own, cost.name))
    return frozenset({min(cheapest)[1]} if cheapest else ())


def _undominated(choices: list[_Some]) -> list[_Some]:
    kept: list[_Some] = []
    for s in sorted(choices, key=lambda s: (s.own, -s.worth)):
        if not kept or s.worth > kept[-1].worth:
            kept.append(s)
    return kept


def _thinned(choices: list[_Some], budget: float) -> list[_Some]:
    if len(choices) <= FRONT:
        return choices
    cells: dict[int, _Some] = {}
    for s in choices:                                # in the order of cost and worth
        cells[int(s.own / budget * FRONT)] = s
    return list(cells.values())


# -- what a model costs -----------------------------------------------------------------------
def costs(model: nn.Module, tensors: Mapping[str, Tensor], run: Callable[[], Any]
          ) -> tuple[list[Cost], float]:
    """(costs of `tensors` in the order in which backward reaches them, FLOPs of forward).

    run: a forward of the model. Counted are products with weights: for n rows and a weight of s
    entries 2 n s forward, 2 n s for the gradient of the input and as much for the weight's; one
    FLOP per output for norms, biases and embeddings. (Attention's own products have no weight to
    stand at and are left out.) A tensor that is read in several modules stands at the deepest one
    and costs the gradients of all; one whose module is not called by itself (the output projection
    of `nn.MultiheadAttention`), at the nearest that is. Tensors the forward does not come by are
    left out.
    """
    rows = _rows(model, run)
    paths = list(rows)
    home: dict[str, list[str]] = {}
    for name, p in tensors.items():
        plain = ".burnish." not in f".{name}"
        read = [path for path, m in model.named_modules()
                if any(q is p for q in m._parameters.values())] if plain else \
            [f".{name}".partition(".burnish.")[0][1:]]
        home[name] = [near for path in read if (near := _near(path, rows)) is not None]
    modules = dict(model.named_modules())
    made, way, forward = [], 0.0, 0.0
    for path in reversed(paths):
        for name, read in home.items():
            if read and min(read, key=paths.index) == path:
                own = sum(_product(modules[r], tensors[name], rows[r]) for r in read)
                made.append(Cost(name, way, own))
                way = 0.0
        through = sum(_product(modules[path], p, rows[path])
                      for p in modules[path]._parameters.values() if p is not None)
        forward += through
        way += 0.0 if isinstance(modules[path], nn.Embedding) else through
    return made, forward


def _rows(model: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """Path of a module that is called and has tensors -> (rows, entries) of its outputs, in the
    order of first calls."""
    found: dict[str, tuple[float, float]] = {}

    def seen(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            y = next((t for t in (out if isinstance(out, tuple | list) else (out,))
                      if isinstance(t, Tensor)), None)
            if y is None:
                return
            n, entries = found.get(path, (0.0, 0.0))
            width = y.shape[1] if isinstance(module, nn.modules.conv._ConvNd) else y.shape[-1]
            found[path] = (n + y.numel() / width, entries + y.numel())
        return hook

    with ExitStack() as stack:
        for path, module in model.named_modules():
            if "burnish" not in path.split(".") and any(
                    p is not None for m in (module, *module.children())
                    for p in m._parameters.values()):
                stack.callback(module.register_forward_hook(seen(path)).remove)
        run()
    return found


def _near(path: str, rows: Mapping[str, Any]) -> str | None:
    while path not in rows:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def _product(module: nn.Module, p: Tensor, rows: tuple[float, float]) -> float:
    if p.dim() < 2 or isinstance(module, nn.Embedding):
        return rows[1]
    return 2 * rows[0] * p.numel()


def relieved(step: Pass, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Of the loss, how much training each tensor would take away: ``-<g1, dw>``, dw what one update
    changes and g1 the gradient after it; by name, at most 1 in size."""
    with step.updated(step.probe().grads) as before:
        after = step.probe().grads
        found = {n: _taken(tensors[n], w0, after[n]) for n, w0 in before.items() if n in after}
    top = max(map(abs, found.values()), default=0.0) or 1.0
    return {n: v / top for n, v in found.items()}


@torch.no_grad()
def _taken(p: Tensor, w0: Tensor, g1: Tensor) -> float:
    """``-<g1, w - w0>``, the first-order fall of the loss."""
    wide = torch.promote_types(p.dtype, torch.float32)
    taken = (p.to(wide) - w0.to(p.device, wide)).mul_(g1.to(wide)).sum().neg()
    value = 0.0 if isinstance(p, FakeTensor) else float(taken)
    return value if math.isfinite(value) else 0.0
