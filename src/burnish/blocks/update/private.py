"""Sums of samples' gradients in which no sample counts much, and the noise that hides each.

    g = (sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2)) / B

The norm is over all tensors together, or group by group, each with a C of its own. A gradient that
is not finite counts as nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn


def norm(grads: Iterable[Tensor]) -> Tensor:
    """Of all together, in fp32 at least."""
    parts = [g.to(torch.promote_types(g.dtype, torch.float32)).square().sum() for g in grads]
    return torch.stack([p.to(parts[0].device) for p in parts]).sum().sqrt()


class Clipped:
    """Inside, :meth:`take` moves what is in ``.grad`` to a sum, cut to a norm; afterwards the sum
    is added to what ``.grad`` held. Where anything is raised, ``.grad`` is as it was.

    Sums are in fp32 at least, of the tensors that any sample reached.
    """

    def __init__(self, params: Iterable[nn.Parameter], bound: float):
        self.params, self.bound = list(params), bound
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.aside: list[Tensor | None] = []
        self.taken = 0

    def __enter__(self) -> Clipped:
        self.aside = [p.grad for p in self.params]
        for p in self.params:
            p.grad = None
        return self

    @torch.no_grad()
    def take(self) -> None:
        """One sample's gradients are complete."""
        self.taken += 1
        self._take(self.params, self.bound)

    def _take(self, params: Iterable[nn.Parameter], bound: float) -> None:
        found = {p: p.grad for p in params if p.grad is not None}
        if not found:
            return
        size = norm(found.values())
        by = (bound / size).clamp(max=1.0)
        for p, g in found.items():
            p.grad = None
            g = g.to(torch.promote_types(g.dtype, torch.float32)).mul_(by.to(g.device))
            g = torch.where(size.isfinite().to(g.device), g, 0.0)
            self.sums[p] = self.sums[p].add_(g) if p in self.sums else g

    @torch.no_grad()
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for p, before in zip(self.params, self.aside, strict=True):
            mine = self.sums.pop(p, None) if kind is None else None
            if mine is not None:
                mine = mine.to(p.dtype)
            elif kind is None and not self.taken:    # no sample came, and that is no fault
                mine = torch.zeros_like(p)
            p.grad = before if mine is None else mine if before is None else before.add_(mine)


class ClippedApart(Clipped):
    """Each group of tensors has a norm, and a largest one, of its own."""

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], bounds: Sequence[float]):
        super().__init__([p for group in groups for p in group], math.nan)
        self.groups, self.bounds = groups, bounds

    @torch.no_grad()
    def take(self) -> None:
        self.taken += 1
        for group, bound in zip(self.groups, self.bounds, strict=True):
            self._take(group, bound)


@torch.no_grad()
def hide(params: Iterable[nn.Parameter], size: float, batch: float) -> None:
    """``.grad`` <- (.grad + N(0, size^2)) / batch for every tensor, also where no sample reached
    it: that none did would tell of them."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        wide = torch.promote_types(p.grad.dtype, torch.float32)
        noise = torch.randn(p.grad.shape, dtype=wide, device=p.grad.device)
        p.grad.copy_(noise.mul_(size).add_(p.grad).div_(batch))
