from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....core.method import setting
from ._from import Starting


@dataclass(frozen=True, kw_only=True)
class Olora(Starting):
    """OLoRA: a low-rank update that starts from an orthonormal basis of the weight's columns.

    ``W = Q R`` (not pivoted), ``B0 = Q_r`` (out, rank), ``A0 = R_r`` (rank, in), the first r of
    each; ``W' = (W - s B0 A0) + s B A``, s = alpha / rank. Only the first r columns are decomposed:
    ``Q_r`` from ``W[:, :r]``, ``A0 = Q_r^T W``, out in r operations. With s = 1 the first r
    columns of the residual are 0. Which directions train depends on the order of the columns: it
    is no best approximation of W (see pissa).

    Start: the pre-trained function exactly (up to rounding over a storage, which holds the
    residual). Trains rank (in + out) per matrix. Kept for backward as LoRA. Merges exactly;
    exports as plain LoRA of twice the rank. The file holds A0 and B0. No weight decay.
    """

    paper: ClassVar[str] = ("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models "
                            "(2024), arXiv:2406.01775")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(32, "columns that span what trains", alias=("r",))

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, Tensor]:
        Q = torch.linalg.qr(W[:, :rank]).Q
        return Q.t() @ W, Q
