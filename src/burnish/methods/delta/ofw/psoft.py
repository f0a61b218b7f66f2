from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ....blocks.linalg import sketched
from ....blocks.weight.between import Between, Turned
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Psoft(Method):
    """PSOFT: the principal subspace of a weight is turned, what is outside it stays.

    ``W = U S V^T``, its `rank` leading triplets: ``W' = W + U_r S_r (diag(b) T diag(a) - I) V_r^T``
    with T = ``(I + Q)(I - Q)^-1`` (Cayley), Q skew (rank, rank), a and b (rank,): inside the
    subspace angles and lengths of the columns of W stay where a = b = 1, which the gains relax.
    ``terms=n`` takes n terms of the series of T instead of the solve, and `bound` then keeps
    ``||Q||_F`` below it, where the series holds; ``free=True`` trains T as any matrix;
    ``balanced=True`` puts roots of S on both sides (PiSSA's factors), which turns no more.

    PEFT divides S by a scale alpha / rank and multiplies by it again behind: it cancels, in either
    form, and there is no alpha here. The vectors are the base's own, but a sign or an order of
    theirs may fall otherwise on another machine: our file holds both factors, rank (in + out)
    numbers; a folder of PEFT's holds none and means those that the reader finds.

    Start: Q = 0, a = b = 1, the pre-trained function exactly. Trains rank (rank - 1) / 2 + 2 rank
    per matrix. Kept for backward: V_r^T x (rank numbers per token), not x. Merges exactly, and
    exports as plain LoRA too. No weight decay, which would pull gains to zero instead of one.
    """

    paper: ClassVar[str] = ("Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation "
                            "(2025), arXiv:2505.11235")
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(32, "leading triplets that are turned", alias=("r",))
    gain_in: bool = setting(True, "a gain before the turn", alias=("psoft_mag_a",))
    gain_out: bool = setting(True, "a gain behind it", alias=("psoft_mag_b",))
    free: bool = setting(False, "any matrix in the place of a turn")
    balanced: bool = setting(False, "the values on both sides of it")
    terms: int = setting(0, "0: exact; n: the first n terms of the series",
                         alias=("num_cayley_neumann_terms",), other=(5,))
    bound: float | None = setting(None, "largest norm of Q, in a series; None: free",
                                  other=(0.01,), beside={"terms": 5})
    iterations: int = setting(0, "0: exact SVD; else subspace iterations of the approximate one")

    def __post_init__(self) -> None:
        if self.rank < 2:
            raise RecipeError(f"psoft: rank={self.rank}: nothing turns in less than 2 dimensions")
        if self.terms < 0 or self.terms == 1:
            raise RecipeError("psoft: terms 0 (exact) or at least 2 are expected")
        if self.bound is not None and not (self.bound > 0 and self.terms):
            raise RecipeError("psoft: bound > 0 is the largest norm of Q in a series (terms >= 2)")
        if self.free and self.terms:
            raise RecipeError("psoft: terms are of a turn, and free=True is none")

    def delta(self, site: Site) -> Between:
        place = site.place
        place.check_rank(self.rank, "psoft")
        term = Turned(place.out, place.inp, self.rank, terms=self.terms, bound=self.bound,
                      free=self.free, gain_in=self.gain_in, gain_out=self.gain_out,
                      balanced=self.balanced)
        return term.read(site, lambda W: sketched(W, self.rank, self.iterations)
                         if self.iterations else torch.linalg.svd(W, full_matrices=False))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        turn = self.rank**2 if self.free else self.rank * (self.rank - 1) // 2
        return turn + self.rank * (self.gain_in + self.gain_out)
