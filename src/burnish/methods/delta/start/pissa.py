from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.factor import Chain
from ....core.method import Method, setting
from ....core.site import Place, Site


class Principal(Chain):
    """``Delta = s (B A - B0 A0) = s ((B - B0) A + B0 (A - A0))``: a chain less its start.

    The second form is what runs: at the start it is exactly nothing, in any precision, and small
    moves are not lost beside the two large products. A0, B0 are kept as buffers; the base is never
    written. Where a storage has absorbed the start into the weight it holds (`folded`), nothing is
    subtracted any more: they stay for the file, which makes the residual again from them, and for
    whoever asks for the base.
    """

    def __init__(self, place: Place, A: Tensor, B: Tensor, scale: float):
        super().__init__(place, A.shape[-2], scale)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())
        self.folded = False                      # does a storage hold the residual?

    def fold_start(self, stored: Tensor, place: Place) -> Tensor:
        """The stored weight minus the start, for a storage that will hold the residual. Product by
        product in a fixed order: the same bits on every device."""
        out = stored.clone()
        view = place.view(out)
        left = view.to(self.A0.dtype).clone()
        for k in range(self.A0.shape[-2]):
            left -= self.B0[..., :, k, None] * self.A0[..., None, k, :] * self.scale
        view.copy_(left)
        return out

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


@dataclass(frozen=True, kw_only=True)
class Pissa(Method):
    """PiSSA: train the principal singular part of W, freeze the rest.

    ``W = U S V^T``, ``B0 = U_r sqrt(S_r / s)``, ``A0 = sqrt(S_r / s) V_r^T``, residual
    ``W - s B0 A0``; ``W' = residual + s B A``. A (rank, in), B (out, rank), s = alpha / rank.
    Realised as ``W + s (B A - B0 A0)``, so the base is never written; with a storage in the
    recipe (``nf4 + pissa``, QPiSSA) the storage holds the residual instead.

    Start: B = B0, A = A0: the pre-trained function exactly (up to rounding over a storage).
    Trains rank (in + out) per matrix. Kept for backward as LoRA. Merges exactly; exports as plain
    LoRA of twice the rank (``B* = [B, -B0]``, ``A* = [A; A0]``). The file holds A0 and B0 too
    (never recomputed: singular vectors differ between devices), so it is twice the trained bytes.

    ``iterations=0`` takes the exact SVD; larger values the randomised one with that many subspace
    iterations. Use a learning rate far below LoRA's (2e-5 in the paper).
    """

    paper: ClassVar[str] = "PiSSA (2024), arXiv:2404.02948"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "principal directions that train", alias=("r",))
    alpha: float | None = setting(None, "numerator of the scale; None means rank (s = 1)")
    iterations: int = setting(0, "0: exact SVD; else subspace iterations of the randomised one")

    def delta(self, site: Site) -> Principal:
        place, weight = site.place, site.weight
        place.check_rank(self.rank, "pissa")
        s = (self.alpha if self.alpha is not None else self.rank) / self.rank
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if self.iterations:
            U, S, V = torch.svd_lowrank(wide, q=self.rank, niter=self.iterations)
            Vt = V.t()
        else:
            U, S, Vt = torch.linalg.svd(wide, full_matrices=False)
        root = (S[: self.rank] / s).sqrt()
        A = (root.unsqueeze(1) * Vt[: self.rank]).contiguous()
        B = (U[:, : self.rank] * root).contiguous()
        if weight.dtype != wide.dtype and math.isfinite(s):
            # subtract what will be added: the factors are fp32, so the product is what counts
            A, B = A.float(), B.float()
        term = Principal(place, A, B, s)
        term.A.burnish_decay = term.B.burnish_decay = False
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)
