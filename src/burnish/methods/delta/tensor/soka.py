from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ....blocks.choose.budget import elbow
from ....blocks.linalg import svd
from ....blocks.weight.kronecker_sum import LessKronecker, rearranged
from ....blocks.weight.start import decomposed
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from .lokr import split


@dataclass(frozen=True, kw_only=True)
class Soka(Method):
    """SoKA: the principal Kronecker products of W train, their number read off its spectrum.

    W (m1 m2, n1 n2), its blocks (m2, n2) as rows of R(W) (m1 n1, m2 n2), ``R(W) = U S V^T``:
    ``W = sum_k S_k mat(u_k) (x) mat(v_k)``. ``W' = W_res + sum_{k <= r} sigma_k A_k (x) B_k``,
    A_k (m1, n1), B_k (m2, n2), ``W_res = W - the start``; realised as an update on W, so the base
    is never written; a storage in the recipe (``nf4 + soka``) holds W_res instead, made in fp32.

    m1 and n1 are the divisors nearest to the square root, or at most `factor`, as in `lokr`. r is
    `rank`, or the smallest with ``sum_{k <= r} S_k^2 >= energy |W|^2``, at most `max_rank`, cut
    where the curve of the `max_rank` leading S_k is farthest from its chord (`elbow`, that term
    included). The r of every matrix is in the file.

    Start: A_k = mat(u_k), sigma_k = S_k, B_k = mat(v_k): the pre-trained function exactly. Trains
    r (m1 n1 + m2 n2 + 1) per matrix, 8,193 a term at 4096 x 4096. Kept for backward: x; the path
    runs again there. The file holds the start too. Merges exactly. No weight decay.

    The paper speaks of components of the update, of which there are none at step 0: that W is taken
    apart, as PiSSA does, is our reading; so are the defaults, which it does not give, and a
    truncated decomposition (the chord spans what was decomposed, not the whole spectrum). Its total
    of 0.99M on LLaMA-2-7B takes targets and ranks that are not given.
    """

    paper: ClassVar[str] = ("Singular Value Decomposition on Kronecker Adaptation for Large "
                            "Language Model (2025)")
    tier: ClassVar[str] = "from the text"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    by_data: ClassVar[bool] = True

    rank: int | None = setting(None, "products that train; None: by the spectrum", alias=("r",),
                               other=(2,))
    energy: float = setting(0.9, "share of the spectrum's squares that they are to have",
                            other=(0.01,))
    max_rank: int = setting(32, "most products, and how many are looked at", other=(1,))
    elbow: bool = setting(True, "no more than to the bend of the spectrum")
    factor: int = setting(-1, "largest first factor of both sides; -1: near the square root",
                          alias=("decompose_factor",), other=(4,))

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1 or self.max_rank < 1 or self.rank is not None and self.rank < 1:
            raise RecipeError("soka: rank and max_rank of at least 1 and an energy in (0, 1] are "
                              "expected")
        if self.factor == 0 or self.factor < -1:
            raise RecipeError("soka: factor is -1 (near the square root) or at least 1")
        idle = [n for n in ("energy", "max_rank", "elbow") if n in self.changed()]
        if self.rank is not None and idle:
            raise RecipeError(f"soka: {idle[0]} does nothing where rank={self.rank} is given")

    def shapes(self, place: Place) -> tuple[tuple[int, int], tuple[int, int]]:
        """(m1, n1) and (m2, n2)."""
        (m1, m2), (n1, n2) = split(place.out, self.factor), split(place.inp, self.factor)
        if m1 == n1 == 1:
            raise RecipeError(f"soka: {place.name} ({place.out} x {place.inp}) has no sides to "
                              "split (they are prime, or factor is 1); use pissa there")
        return (m1, n1), (m2, n2)

    def most(self, place: Place) -> int:
        """The rank of a matrix before its values are known."""
        (m1, n1), (m2, n2) = self.shapes(place)
        top = min(m1 * n1, m2 * n2)
        if self.rank is not None and self.rank > top:
            raise RankError(f"soka: rank {self.rank} does not fit {place.name}, which is a sum of "
                            f"{top} Kronecker products")
        return min(self.max_rank, top) if self.rank is None else self.rank

    def chosen(self, S: Tensor, energy: float) -> int:
        """r of the leading singular values and of the sum of all their squares."""
        if self.rank is not None:
            return self.rank
        reached = S.square().cumsum(0) >= self.energy * energy
        r = int(reached.int().argmax()) + 1 if bool(reached.any()) else S.numel()
        return min(r, elbow(S)) if self.elbow else r

    def delta(self, site: Site) -> LessKronecker:
        place, known = site.place, site.settled.get("rank")
        outer, inner = self.shapes(place)
        most = self.most(place)
        if known is not None and not 1 <= known <= most:
            raise RankError(f"soka: a file says rank {known} of {place.name}, whose recipe allows "
                            f"{most}")
        if site.blank:
            return self._made(most if known is None else known, site, outer, inner)
        U, S, Vt = decomposed(site, lambda W: svd(rearranged(W, outer), most))
        total = float(torch.linalg.vector_norm(site.weight.detach().double())) ** 2
        term = self._made(self.chosen(S.double(), total), site, outer, inner)
        r = term.sigma.numel()
        term.begin(U[:, :r], S[:r], Vt[:r])
        return term

    def _made(self, r: int, site: Site, outer: tuple[int, int], inner: tuple[int, int]
              ) -> LessKronecker:
        term = LessKronecker(r, outer, inner).to(site.weight.device)
        term.counted = {"rank": r}
        return term

    def per_token(self, place: Place, rank: int | None = None) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place, rank: int | None = None) -> int:
        """Trainable parameters on one matrix; before its values are known: the most."""
        (m1, n1), (m2, n2) = self.shapes(place)
        return (rank or self.most(place)) * (m1 * n1 + m2 * n2 + 1)
