from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....blocks.linalg import sketched
from ....blocks.weight.start import LessStart, begin, split
from ....core.method import Method, setting
from ....core.site import Place, Site


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

    ``iterations=0`` takes the exact SVD; larger values that many subspace iterations from a fixed
    sketch: nothing is drawn. Use a learning rate far below LoRA's (2e-5 in the paper).
    """

    paper: ClassVar[str] = "PiSSA (2024), arXiv:2404.02948"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "principal directions that train", alias=("r",))
    alpha: float | None = setting(None, "numerator of the scale; None means rank (s = 1)",
                                  other=(8.0,))
    iterations: int = setting(0, "0: exact SVD; else subspace iterations of the approximate one")

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, Tensor]:
        U, S, Vt = sketched(W, rank, self.iterations) if self.iterations else \
            torch.linalg.svd(W, full_matrices=False)
        return split(U[:, :rank], S[:rank], Vt[:rank], s)

    def delta(self, site: Site) -> LessStart:
        site.place.check_rank(self.rank, "pissa")
        s = 1.0 if self.alpha is None else self.alpha / self.rank
        return begin(LessStart(site.place, self.rank, s), site, self.start)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)
