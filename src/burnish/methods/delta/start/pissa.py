from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....blocks.linalg import sketched
from ....blocks.weight.start import split
from ....core.method import setting
from ._from import Starting


@dataclass(frozen=True, kw_only=True)
class Pissa(Starting):
    """PiSSA: train the principal singular part of W, freeze the rest.

    ``W = U S V^T``, ``B0 = U_r sqrt(S_r / s)``, ``A0 = sqrt(S_r / s) V_r^T``, residual
    ``W - s B0 A0``; ``W' = residual + s B A``. A (rank, in), B (out, rank), s = alpha / rank.
    Realised as ``W + s (B A - B0 A0)``, so the base is never written; with a storage in the
    recipe (``nf4 + pissa``, QPiSSA) the storage holds the residual instead.

    Start: B = B0, A = A0: the pre-trained function exactly (up to rounding over a storage).
    Trains rank (in + out) per matrix. Kept for backward as LoRA. Merges exactly; exports as plain
    LoRA of twice the rank (``B* = [B, -B0]``, ``A* = [A; A0]``). The file holds A0 and B0 too
    (never recomputed: singular vectors differ between devices), so it is twice the trained bytes.
    No weight decay.

    ``iterations=0`` takes the exact SVD; larger values that many subspace iterations from a fixed
    sketch: nothing is drawn. Use a learning rate far below LoRA's (2e-5 in the paper).
    """

    paper: ClassVar[str] = "PiSSA (2024), arXiv:2404.02948"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "principal directions that train", alias=("r",))
    iterations: int = setting(0, "0: exact SVD; else subspace iterations of the approximate one")

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, Tensor]:
        U, S, Vt = sketched(W, rank, self.iterations) if self.iterations else \
            torch.linalg.svd(W, full_matrices=False)
        return split(U[:, :rank], S[:rank], Vt[:rank], s)
