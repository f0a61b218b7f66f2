"""A gradient taken elsewhere than at the weights: move them, look, put them back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def ascent(params: Mapping[str, nn.Parameter], grads: dict[str, Tensor], rho: float,
           eta: float | None = None) -> dict[str, Tensor]:
    """The step of length `rho` that raises the loss most, by name of a tensor.

        e = rho g / ||g||                                 the norm over all tensors together
        e = rho T^2 g / ||T g||,   T = |w| + eta          with `eta`: lengths are relative

    In fp32 (fp64 for fp64 gradients), whatever the scale of g, as long as its square is a number
    there (1e-22 to 1e19). Zero where the norm is zero or not finite: such a gradient names no
    direction. Takes `grads` over: they are emptied and written on.
    """
    steps = {}
    while grads:
        name, g = grads.popitem()
        steps[name] = g.to(torch.promote_types(g.dtype, torch.float32))
    if not steps:
        return {}
    first = next(iter(steps.values())).device

    def t(name: str, g: Tensor) -> Tensor:
        return params[name].detach().to(g.dtype).abs().add_(eta)

    norm = torch.linalg.vector_norm(torch.stack([
        torch.linalg.vector_norm(g if eta is None else t(n, g).mul_(g)).to(first)
        for n, g in steps.items()]))
    fine = norm.isfinite() & (norm > 0)
    length = rho / norm
    for n, g in steps.items():
        g.mul_(length.to(g.device, g.dtype))
        if eta is not None:
            g.mul_(t(n, g).square_())
        g.masked_fill_(~fine.to(g.device), 0.0)
    return steps


@contextmanager
def elsewhere(params: Mapping[str, nn.Parameter], steps: dict[str, Tensor]
              ) -> Iterator[dict[str, Tensor]]:
    """Inside, each tensor of `steps` stands at ``w + step``; afterwards w is back bit for bit.

    Gives the copies of w, by name. A step is taken off `steps` as soon as it is done, so that
    these copies are all that is kept meanwhile.
    """
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            while steps:
                name, step = steps.popitem()
                kept[name] = params[name].detach().clone()
                params[name].add_(step)
                del step
        yield kept
    finally:
        with torch.no_grad():
            for name, was in kept.items():
                params[name].copy_(was)
