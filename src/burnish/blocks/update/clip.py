"""Clipping, also where the gradients of an update never exist together.

    entries    g <- max(-c, min(g, c))
    norm       g <- g min(1, C / (||g|| + 1e-6)),    the norm over all tensors together

Both in this order. A step inside backward knows an entry at once, but the norm only when the last
gradient is gone: LOMO makes two backwards, the first of which adds up squares and frees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ...core.errors import BurnishError, ConfigError
from ...core.processes import gathered, is_sharded


def clip_norm_(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """The gradients of an update, which are all there, cut to a norm; 0: none."""
    if norm:
        scale = getattr(optimizer, "grad_scale", None)       # a fused step unscales by itself
        cut_together_([p for g in optimizer.param_groups for p in g["params"]
                       if p.grad is not None], norm if scale is None else norm * float(scale))


def cut_together_(params: list[nn.Parameter], norm: float) -> Tensor:
    """Cut the gradients of `params` to a norm, of all together; returns what it was. Parts of
    sharded tensors count with the parts that other processes hold."""
    kinds = [[p for p in params if is_sharded(p) is k] for k in (False, True)]
    if not kinds[1]:
        return torch.nn.utils.clip_grad_norm_(params, norm)
    found = [gathered(torch.nn.utils.get_total_norm([p.grad for p in ps])) for ps in kinds if ps]
    total = torch.linalg.vector_norm(torch.stack(found))
    for ps in kinds:
        torch.nn.utils.clip_grads_with_norm_(ps, norm, total)
    return total


class Clip:
    """The clipping of one optimizer that steps inside backward.

    value: c, of the entries; norm: C, of all gradients together; 0: none. found: the norm of the
    last update, before it was cut.
    """

    def __init__(self, value: float = 0.0, norm: float = 0.0):
        self.value, self.norm = value, norm
        self.found: Tensor | None = None
        self._squares: list[Tensor] | None = None
        self._share: Tensor | None = None            # of the gradients of the pass to come

    @contextmanager
    def weighing(self) -> Iterator[None]:
        """Around the first backward of two. Raises BurnishError for a norm that is not finite."""
        self._squares = []
        try:
            yield
            self._decide(self._squares)
        finally:
            self._squares = None

    def weighs(self, g: Tensor) -> bool:
        """Is this gradient only weighed? Then it has been, and may go."""
        if self._squares is None:
            return False
        wide = self._entries(g).to(torch.promote_types(g.dtype, torch.float32))
        self._squares.append(wide.square_().sum() if wide is not g else wide.square().sum())
        return True

    def cut_(self, g: Tensor, name: str) -> None:
        """A gradient on its way into the step, in place."""
        self._entries(g)
        if not self.norm:
            return
        if self._share is None:
            raise ConfigError(
                f"{name} is stepped inside backward and max_grad_norm={self.norm:g} clips by the "
                "norm of all gradients, which takes a pass before it: call tuned.backward(batch, "
                "loss) instead of loss.backward() (or tuned.step, burnish.fit). Nothing was "
                "updated")
        g.mul_(self._share.to(g.device, torch.promote_types(g.dtype, torch.float32)))

    def over(self) -> None:
        """The update is done; the next one has a norm of its own."""
        self._share = None

    def _entries(self, g: Tensor) -> Tensor:
        return g.clamp_(-self.value, self.value) if self.value else g

    def _decide(self, squares: list[Tensor]) -> None:
        if not squares:
            return
        home = squares[0].device
        self.found = torch.stack([s.to(home, torch.float64 if home.type == "cpu" else s.dtype)
                                  for s in squares]).sum().sqrt()
        if not isinstance(self.found, FakeTensor) and not bool(self.found.isfinite()):
            raise BurnishError(f"the norm of the gradients is {float(self.found)}; nothing was "
                               "updated: the weights are those of the step before")
        self._share = (self.norm / (self.found + 1e-6)).clamp_(max=1.0)


def check_norm(norm: Any) -> float:
    """max_grad_norm as a number, 0 for none. Raises ConfigError for a negative one or NaN."""
    if norm is None:
        return 0.0
    if not isinstance(norm, int | float) or not norm >= 0:
        raise ConfigError(f"max_grad_norm is a length, 0 for no clipping; got {norm!r}")
    return float(norm)
