"""Where a chain of factors begins: made from the weight, from what the data showed, or drawn.

A start is a function ``start(W, seen, rank, s) -> (A, B)``:

    W      (out, in), the weight in fp32 at least
    seen   the statistic of this place (`Method.observe`), None where the method reads no data
    A, B   (rank, in) and (out, rank); B may be None, then it is 0

A chain begins with them as they are. In a :class:`LessStart` what they add up to leaves the base,
``W' = (W - s B0 A0) + s B A``, so that step 0 is the pre-trained function whatever they are. What
a start draws comes from the adapter's seed (core/draw.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...core.errors import CheckError, RecipeError
from ...core.site import Place, Site
from .factor import Chain

Start = Callable[[Tensor, Any, int, float], tuple[Tensor, Tensor | None]]
T = TypeVar("T", bound=Chain)


class LessStart(Chain):
    """``Delta = s (B A - B0 A0) = s ((B - B0) A + B0 (A - A0))``: a chain less its start.

    The second form is what runs: at the start it is exactly nothing, in any precision, and small
    moves are not lost beside the two large products. A0, B0 are kept as buffers; the base is never
    written. Where a storage has absorbed the start into the weight it holds (`folded`), nothing is
    subtracted any more: they stay for the file, which makes the residual again from them, and for
    whoever asks for the base.
    """

    def __init__(self, place: Place, rank: int, scale: float):
        super().__init__(place, rank, scale)
        if not 0 < scale < float("inf"):
            raise RecipeError(f"a start that leaves the base has a positive scale, not {scale}")
        self.register_buffer("A0", torch.zeros_like(self.A, requires_grad=False))
        self.register_buffer("B0", torch.zeros_like(self.B, requires_grad=False))
        self.folded = False                      # does a storage hold the residual?

    def begin(self, A: Tensor, B: Tensor | None) -> None:
        if B is None:
            raise TypeError("a start that leaves the base has both factors")
        self.A, self.B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    def fold_start(self, stored: Tensor, place: Place) -> Tensor:
        """The stored weight minus the start, for a storage that will hold the residual. Product by
        product in a fixed order: the same bits on every device."""
        out = stored.clone()
        view = place.view(out)
        view.copy_(self.less(view))
        return place.unview(view, out)

    def less(self, W: Tensor) -> Tensor:
        """An (out, in) weight minus the start, in the precision of its factors."""
        left = W.to(self.A0.dtype).clone()
        for k in range(self.A0.shape[-2]):
            left -= self.B0[..., :, k, None] * self.A0[..., None, k, :] * self.scale
        return left

    def start(self) -> Tensor:
        """What a storage has absorbed, (out, in)."""
        return self.scale * (self.B0 @ self.A0)

    def absorbed(self) -> None:
        """A storage holds the residual now: nothing is left to subtract."""
        self.folded = True

    def dense(self) -> Tensor:
        if self.folded:
            return self.scale * (self.B @ self.A)
        return self.scale * ((self.B - self.B0) @ self.A + self.B0 @ (self.A - self.A0))

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.factors() if self.folded else self.low_rank()

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return (torch.cat([self.A, self.A - self.A0]),
                torch.cat([self.B - self.B0, self.B0], 1) * self.scale)

    def forward_(self, x_NI: Tensor, y_NO: Tensor, scale: float) -> tuple[object, ...]:
        if self.folded:
            return super().forward_(x_NI, y_NO, scale)
        x, y, s = x_NI.dtype, y_NO.dtype, self.scale * scale
        h_NR, move_NR = x_NI @ self.A.t().to(x), x_NI @ (self.A - self.A0).t().to(x)
        y_NO.addmm_(h_NR.to(y), (self.B - self.B0).t().to(y), alpha=s)
        y_NO.addmm_(move_NR.to(y), self.B0.t().to(y), alpha=s)
        return (h_NR if self.B.requires_grad else None, None)

    def backward_(self, g_NO: Tensor, x_NI: Tensor | None, kept: tuple[object, ...],
                  dx_NI: Tensor | None, scale: float) -> list[Tensor | None]:
        if self.folded:
            return super().backward_(g_NO, x_NI, kept, dx_NI, scale)
        grads = super().backward_(g_NO, x_NI, kept, None, scale)
        if dx_NI is not None:
            g, s = g_NO.dtype, self.scale * scale
            dx_NI.addmm_(g_NO @ (self.B - self.B0).to(g), self.A.to(g), alpha=s)
            dx_NI.addmm_(g_NO @ self.B0.to(g), (self.A - self.A0).to(g), alpha=s)
        return grads

    def tile(self, i0: int, i1: int, state: object) -> Tensor:
        if self.folded:
            return super().tile(i0, i1, state)
        A, A0 = self.A[..., i0:i1], self.A0[..., i0:i1]
        return ((self.B - self.B0) @ A).add_(self.B0 @ (A - A0)).mul_(self.scale)


@torch.no_grad()
def decomposed(site: Site, split: Callable[[Tensor], Any]) -> Any:
    """What `split` makes of a site's weight, which it is given in fp32 at least: tensors, or None
    among them.

    Raises CheckError where there is no decomposition or it is not finite.
    """
    W, where = site.weight.detach(), site.place.name
    try:
        made = split(W.to(torch.promote_types(W.dtype, torch.float32)))
    except torch.linalg.LinAlgError as e:
        raise CheckError(f"the start at {where} has no decomposition: "
                         f"{str(e).splitlines()[0]}") from e
    if not all(bool(t.isfinite().all()) for t in made if t is not None):
        raise CheckError(f"the start at {where} is not finite: the weight or what was read there "
                         "holds inf or nan")
    return made


@torch.no_grad()
def begin(term: T, site: Site, start: Start) -> T:
    """The term with the values of its start, and no weight decay on its factors; shapes alone
    where the site is `blank`.

    Raises CheckError as :func:`decomposed` does.
    """
    term.A.burnish_decay = term.B.burnish_decay = False
    if site.blank:
        return term
    A, B = decomposed(site, lambda W: start(W, site.seen, term.A.shape[-2], term.scale))
    term.begin(A, B)
    term.A.burnish_decay = term.B.burnish_decay = False
    return term


def split(U: Tensor, S: Tensor, Vt: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """(A, B) with ``s B A = U diag(S) Vt``, the singular values shared by both."""
    root = (S / s).sqrt()
    return root.unsqueeze(1) * Vt, U * root
