"""Adam-mini's rule: a second moment per group of outputs instead of per weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.groups import Outputs
from .rules import Rows, Whole, accumulator
from .subspace import panels
from .sweep import strip


@dataclass(frozen=True, kw_only=True)
class MiniAdam(Whole):
    """Adam-mini (Zhang et al., 2024): its equations stand in the method of that name.

    outputs: name of a matrix -> the groups of its outputs; all others are one group. of_name: the
    tensor whose rule this is (see :meth:`of`).
    """

    name: ClassVar[str] = "adam_mini"

    betas: tuple[float, float]
    eps: float
    weight_decay: float
    outputs: Mapping[str, Outputs] = field(default_factory=dict)
    of_name: str = ""

    def hyper(self) -> dict[str, Any]:
        return {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}

    def of(self, name: str) -> MiniAdam:
        return replace(self, of_name=name)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        held = self.outputs.get(self.of_name)
        groups = sum(count for count, _ in held.runs) if held is not None else 1
        return {"exp_avg": shape, "group_sq": (groups,)}

    def rows(self, G: Tensor, weight: Rows, state: Mapping[str, Tensor], t: int,
             group: Mapping[str, Any]) -> Rows:
        """G is read twice, by strips: for the second moments, and for m."""
        b1, b2 = group["betas"]
        m, v = state["exp_avg"], state["group_sq"]
        held = self.outputs.get(self.of_name)
        v.mul_(b2).add_(self._means(G, held), alpha=1 - b2)
        root = (v / (1 - b2**t)).sqrt_().add_(group["eps"]).mul_(1 - b1**t)
        if held is not None:
            root = torch.cat([x.repeat_interleave(size) for x, size in _parts(root, held)])
            root = root if held.columns else root[:, None]

        def u(lo: int, hi: int) -> Tensor:
            mean = m[lo:hi].lerp_(G[lo:hi].to(m.dtype), 1 - b1)
            return mean / (root if held is None or held.columns else root[lo:hi])

        return u

    @staticmethod
    def _means(G: Tensor, held: Outputs | None) -> Tensor:
        """The mean square of every group."""
        wide = accumulator(G.dtype)
        columns = held is not None and held.columns
        total = torch.zeros(G.shape[1] if columns else len(G), dtype=wide, device=G.device)
        for lo, hi in panels(len(G), math.prod(G.shape[1:]), strip(G.device)):
            square = G[lo:hi].to(wide).square()
            if columns:
                total += square.sum(0)
            else:
                total[lo:hi] = square.sum(1) if square.dim() > 1 else square
        if held is None:
            return total.sum().div_(G.numel()).view(1)
        means, done, each = [], 0, G.numel() // len(total)
        for count, size in held.runs:
            part = total[done : done + count * size].view(count, size)
            means.append(part.sum(1) / (size * each))
            done += count * size
        return torch.cat(means)


def _parts(x: Tensor, held: Outputs) -> Iterable[tuple[Tensor, int]]:
    """(entries of x, width of their groups) of every run."""
    done = 0
    for count, size in held.runs:
        yield x[done : done + count], size
        done += count
