from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ....blocks.choose.budget import allocate
from ....blocks.choose.observe import Spectrum
from ....blocks.linalg import svd
from ....blocks.weight.cored import Cored, Freezing
from ....blocks.weight.start import decomposed
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site

if TYPE_CHECKING:
    from ....engine.tuned import Tuned

#: of a share of ||W||^2, in fp32
ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True)
class Lamda(Method):
    """LaMDA: a small square core between a frozen down- and a gradually frozen up-projection.

    ``y = x W^T + b + s ((x A^T) C^T) B^T``, A (rank, in) frozen, C (rank, rank), B (out, rank), s =
    alpha / rank. After t of T updates the first ``floor(rank min(1, t / t_i))`` columns of B, t_i =
    (1 - cooldown) T, are frozen: they leave the optimizer with their moments and stay bit for bit
    as they are. (The authors' code clears their gradients alone, so that momentum and decay move
    them on, and counts so that at most three ever freeze.) Without the number of steps nothing
    freezes.

    Start: ``init="random"``, as in the authors' code: A uniform in +-1/sqrt(in), C in
    +-1/sqrt(rank), B = 0: the pre-trained function exactly. ``"svd"``: A, B the leading singular
    vectors of W and ``s C`` their values, which leave the base, ``W + s (B C - B0 C0) A``; that is
    also exact. (unconfirmed: what the paper does with the residual.)

    LaMDA++, ``rho > 1``: among matrices of one role and shape a flatter spectrum gets more rank. By
    how much the share of ``||W||^2`` that `rank` singular values leave is above the least of them
    divides the rank above rank / rho, none above rho x rank; the ranks sum to rank x matrices, s
    is the same. (unconfirmed: the paper's mapping.) No data are read; a simulation takes `rank`.

    Trains rank^2 + rank out per matrix, rank^2 in the end. Kept for backward: rank numbers per
    token, not x; what leads to B is made again. Merges exactly. The file holds A. No decay.
    """

    paper: ClassVar[str] = ("LaMDA: Large Model Fine-Tuning via Spectrally Decomposed "
                            "Low-Dimensional Adaptation (2024), arXiv:2406.12832")
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    relies_on: ClassVar[tuple[str, ...]] = ("resize",)

    rank: int = setting(32, "rank of the update, with rho > 1 on average", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    cooldown: float = setting(0.7, "share of the run with all of B frozen; the paper's 1 - t_i / T")
    init: Literal["random", "svd"] = setting("random", "A and B drawn, or singular vectors of W")
    rho: float = setting(1.0, "a matrix gets rank / rho to rho x rank (LaMDA++: 2); 1: all alike",
                         other=(2.0,))

    def __post_init__(self) -> None:
        if not 0 <= self.cooldown < 1:
            raise RecipeError(f"lamda: cooldown={self.cooldown}: expected a share of the run, "
                              "below 1: B = 0 has to train first")
        if not 1 <= self.rho < math.inf:
            raise RecipeError(f"lamda: rho is at least 1 (all alike), got {self.rho}")
        if self.init == "svd" and not 0 < self.alpha < math.inf:
            raise RecipeError(f"lamda: init='svd' divides by the scale; alpha={self.alpha} is none")

    def observe(self, place: Place) -> Spectrum | None:
        fits = self.rank <= min(place.out, place.inp)      # if not, `delta` says so
        return Spectrum(self.rank) if self.rho > 1 and fits else None

    def settle(self, seen: Mapping[Place, Any]) -> Mapping[Place, dict[str, Any]]:
        alike: dict[tuple[str, int, int], list[Place]] = {}
        for p in seen:
            alike.setdefault((p.role, p.out, p.inp), []).append(p)
        out = {}
        for (_, rows, columns), places in alike.items():
            left = [float(seen[p].value) for p in places]
            # what is below ROUNDING tells nothing apart, and the least of them shares in a rest
            scores = [round((v - min(left)) / ROUNDING) + 1 for v in left]
            low = math.ceil(self.rank / self.rho)
            most = min(int(self.rank * self.rho), rows, columns)
            more = allocate((self.rank - low) * len(places), scores, [most - low] * len(places))
            out.update({p: {"rank": low + n} for p, n in zip(places, more, strict=True)})
        return out

    def delta(self, site: Site) -> Cored:
        site.place.check_rank(self.rank, "lamda")
        rank, svds = site.settled.get("rank", self.rank), self.init == "svd"
        scale = self.alpha / self.rank
        term = Cored(site.place, rank, scale, site.settled.get("frozen", 0), svds)
        if svds and not site.blank:
            U, S, Vt = decomposed(site, lambda W: svd(W, rank))
            term.begin(U, S / scale, Vt)
        return term

    def controller(self, tuned: Tuned) -> Freezing:
        return Freezing(dict(tuned.terms(Cored)), tuned.resize, 1 - self.cooldown)

    def per_token(self, place: Place, rank: int | None = None) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank if rank is None else rank

    def count(self, place: Place, rank: int | None = None, frozen: int = 0) -> int:
        """Trainable parameters on one matrix (default: at the start, of the mean rank)."""
        r = self.rank if rank is None else rank
        return r * r + (r - frozen) * place.out
