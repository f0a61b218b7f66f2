from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....blocks.linalg import sketched
from ....blocks.weight.start import LessStart, decomposed, split
from ....core.errors import RecipeError
from ....core.followed import is_fake
from ....core.method import setting
from ....core.site import Site
from ._from import Starting


class Alternated(LessStart):
    """``W' = q(W - s B0 A0) + s B A``: the storage has absorbed other factors than those that the
    update begins with. Beside W as it was that is no product of low rank."""

    def low_rank(self) -> None:                          # type: ignore[override]
        return None


@dataclass(frozen=True, kw_only=True)
class Loftq(Starting):
    """LoftQ: codes and a low-rank update that begin where both together are closest to the weight.

    q(W): what the storage beside it makes of W (``nf4 + loftq``, ``rtn(bits=2) + loftq``). From
    ``B_0 A_0 = 0``, T times:

        Q_t = q(W - s B_{t-1} A_{t-1}),   s B_t A_t = the best approximation of W - Q_t of that rank

    the singular values shared by both factors. The t with the least ``|W - Q_t - s B_t A_t|_F``
    counts (the error does not always fall): ``W' = Q_t + s B A`` from ``A = A_t``, ``B = B_t``.
    A (rank, in), B (out, rank), s = alpha / rank, 1 by default.

    Start: nearer to the pre-trained function than the codes alone; after one alternation the best
    correction of q(W), after more never worse. Trains rank (in + out) per matrix; kept for backward
    as LoRA. No weight decay. Merges into the model's dtype. The file holds A_{t-1} and B_{t-1}
    beside what trains: with them the same codes are made again from the base, bit by bit. No PEFT
    folder: beside the weight as it was W' is no product of low rank.

    ``iterations=0`` takes the exact SVD, else that many subspace iterations from a fixed sketch,
    which is enough above 4096 inputs. Needs a storage that decides without data; without one, with
    pruning by data, or where the storage leaves a weight as it is, it is refused (take `pissa`).
    """

    paper: ClassVar[str] = ("LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models "
                            "(Li et al., 2023), arXiv:2310.08659")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})
    shown_beside: ClassVar[str] = "rtn(bits=3, group=8)"
    excused: ClassVar[dict[str, str]] = {
        "every_kind_of_place":
            "rtn, which it is shown beside, holds whole weights: rows of a fused one are no target "
            "of it; tests/methods/test_loftq.py has each kind",
        "bf16_is_near_fp32":
            "by chance: a base in bf16 lies on the other side of some borders, so other codes are "
            "left to other factors; tests/methods/test_loftq.py holds gradients in float64"}

    rank: int = setting(8, "rank of the update", alias=("r",))
    alternations: int = setting(5, "T, between rounding and decomposing", alias=("loftq_iter",))
    iterations: int = setting(0, "0: exact SVD; else subspace iterations of the approximate one")

    def __post_init__(self) -> None:
        if self.alternations < 1:
            raise RecipeError(f"loftq: alternations={self.alternations}: expected at least 1")

    def delta(self, site: Site) -> Alternated:
        site.place.check_rank(self.rank, self.name)
        term = Alternated(site.place, self.rank, self.scale)
        term.A.burnish_decay = term.B.burnish_decay = False
        if site.blank and not is_fake(site.weight):      # a file has what this would find
            return term
        if site.rounded(site.weight) is None:
            raise RecipeError(f"loftq: nothing in the recipe rounds {site.place.name}: put a "
                              "storage that reads no data beside it (nf4 + loftq), give both the "
                              "same targets, or take pissa")
        if not site.blank:
            term.to(site.weight.device)
            A0, B0, A, B = decomposed(site, lambda W: self.closest(term, site, W))
            term.begin(A, B)
            term.A0, term.B0 = A0, B0
            term.A.burnish_decay = term.B.burnish_decay = False
        return term

    def closest(self, term: Alternated, site: Site, W: Tensor) -> tuple[Tensor, ...]:
        """(A_{t-1}, B_{t-1}, A_t, B_t) of the best t."""
        best, least = (), float("inf")
        for _ in range(self.alternations):
            off = W - site.rounded(term.less(site.weight)).to(W.dtype)       # type: ignore
            A, B = self.start(off, None, self.rank, self.scale)
            error = float(torch.linalg.matrix_norm(off - self.scale * B @ A))
            if error < least:
                best, least = (term.A0, term.B0, A, B), error
            term.A0, term.B0 = A, B
        return best

    def start(self, W: Tensor, seen: object, rank: int, s: float) -> tuple[Tensor, Tensor]:
        U, S, Vt = sketched(W, rank, self.iterations) if self.iterations else \
            torch.linalg.svd(W, full_matrices=False)
        return split(U[:, :rank], S[:rank], Vt[:rank], s)
