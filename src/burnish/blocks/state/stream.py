"""A mask over the channels of the residual stream, one for the whole model, and what stands behind
each matrix that writes to it.

    f(x) = v * mask * (x + B A x)

Letters: D channels of the stream, R rank of what mixes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...core.errors import CheckError
from ..tape.executor import checkpoint
from .gates import out_first, value_of


class StreamMask(nn.Module):
    """``mask = sigmoid(kappa m) + rest``, m (D,), until it is settled: ones and zeros then.

    m = 0, kappa = 1 and rest = 1/2 at the start, which is one everywhere. kappa, rest, alive (D,)
    and settled are buffers, so a file answers as the model did when it was written.
    """

    kappa: Tensor
    rest: Tensor
    alive: Tensor
    settled: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.m = nn.Parameter(torch.zeros(channels))
        self.m.burnish_decay = False                 # to zero, where nothing is decided
        self.register_buffer("kappa", torch.ones(()))
        self.register_buffer("rest", torch.full((), 0.5))
        self.register_buffer("alive", torch.ones(channels, dtype=torch.bool))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))

    def forward(self) -> Tensor:
        """(D,)"""
        soft = torch.sigmoid(self.kappa * self.m) + self.rest
        return torch.where(self.settled, self.alive.to(soft.dtype), soft)

    @torch.no_grad()
    def at(self, step: int, total: int) -> None:
        """After `step` of `total` updates: ``kappa = 1 / (1 - ln t / ln T + 1e-6)``, t at least 1,
        and ``rest = max(1/2 - t / T, 0)``."""
        self.kappa.fill_(1 / (1 - math.log(max(1, step)) / math.log(max(2, total)) + 1e-6))
        self.rest.fill_(max(0.5 - step / total, 0.0))

    @torch.no_grad()
    def settle(self, keep: int) -> None:
        """The `keep` channels of the largest m are ones from now on (of equals the first), the
        others zeros. m gets gradients of zero; once it is settled that is all that counts."""
        chosen = torch.zeros_like(self.alive)
        chosen[self.m.argsort(descending=True, stable=True)[:keep]] = True
        self.alive.copy_(torch.where(self.settled, self.alive, chosen))
        self.settled.fill_(True)

    def undecided(self, keep: int) -> Tensor:
        """``|n - keep| / keep``, n = sum [m >= 0] with the gradient of sum m."""
        hard = (self.m.detach() >= 0).to(self.m.dtype)
        n = (hard + self.m - self.m.detach()).sum()
        return (n - keep).abs() / keep

    def poles(self) -> Tensor:
        """``mean (m - 1/2)^2`` over m > 0 plus ``mean (m + 1/2)^2`` over the others."""
        above = self.m.detach() > 0
        off = (self.m - above.to(self.m.dtype) + 0.5).square()
        return sum(((off * side).sum() / side.sum().clamp_min(1) for side in (above, ~above)),
                   start=off.new_zeros(()))

    def open(self) -> Tensor:
        """1 while it is still looked for, 0 once it is settled."""
        return (~self.settled).to(self.m.dtype)


class Hybrid(nn.Module):
    """``f(x) = v * mask * (x + B A x)``: A (R, D) Kaiming-uniform, B (D, R) zeros, v (D,) ones, the
    identity at the start. Rank 0 leaves all three out: ``f(x) = mask * x``.

    owns: it holds the mask for the others, who borrow it. tied: it stands behind a table that is
    also a head, which then reads what is folded in. Kept for backward: x alone; the R numbers and
    their product are made again.
    """

    mask: StreamMask

    def __init__(self, mask: StreamMask, channels: int, rank: int, *, owns: bool, tied: bool):
        super().__init__()
        self.rank, self.tied = rank, tied
        if owns:
            self.mask = mask
        else:
            self.__dict__["mask"] = mask
        if rank:
            bound = 1 / math.sqrt(channels)
            self.A = nn.Parameter(torch.empty(rank, channels).uniform_(-bound, bound))
            self.B = nn.Parameter(torch.zeros(channels, rank))
            self.v = nn.Parameter(torch.ones(channels))
            self.v.burnish_decay = False             # to zero, and its start is one

    @property
    def borrowed(self) -> tuple[Tensor, ...]:
        """What another holds, for whoever runs this again in backward."""
        return () if "mask" in self._modules else (self.mask.m,)

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self, self.run, (x,), {})

    def run(self, x: Tensor) -> Tensor:
        gate = self.mask()
        if not self.rank:
            return x * gate.to(x.dtype)
        mixed = x + F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
        return mixed * (gate * self.v).to(x.dtype)

    def apart(self) -> Tensor:
        """``mean (A A^T - I)^2``: how far its directions are from orthonormal."""
        eye = torch.eye(self.rank, dtype=self.A.dtype, device=self.A.device)
        return (self.A @ self.A.t() - eye).square().mean()

    @torch.no_grad()
    def fold(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Write it into the rows of the module's weight (the columns of a table) and its bias."""
        gate = self.mask()
        if self.tied and bool(((gate != 0) & (gate != 1)).any()):
            raise CheckError("cannot merge: the embedding is tied to the head, which would read "
                             "the mask as well while it is neither ones nor zeros; train to the "
                             "end of the run, where it is settled, or untie them")
        for name in ("weight", "bias"):
            if getattr(module, name, None) is not None or name in values:
                old = value_of(module, values, name)
                wide = torch.promote_types(old.dtype, torch.float32)
                last = isinstance(module, nn.Embedding) or old.dim() == 1 \
                    or not out_first(module, old)
                rows = old.to(wide) if last else old.to(wide).t()
                values[name] = (self._of(rows) if last else self._of(rows).t()).to(old.dtype)

    def _of(self, x: Tensor) -> Tensor:
        """f in the precision of x, on the device it has."""
        gate = self.mask().to(x)
        if not self.rank:
            return x * gate
        return (x + x @ self.A.to(x).t() @ self.B.to(x).t()) * (gate * self.v.to(x))
