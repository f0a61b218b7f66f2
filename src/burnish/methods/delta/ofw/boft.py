from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.butterfly import Butterfly, Gained
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Boft(Method):
    """BOFT: OFT whose blocks are wired as a butterfly, so that few of them turn all inputs.

    ``W' = W R^T``, ``R = F_m .. F_1``, ``F_i = P_i blockdiag(R_i1 .. R_ik) P_i^T``, k = in / b,
    ``R_ij = (I + Q)(I - Q)^-1``, Q skew-symmetric (b, b); P_i brings half-blocks together that lie
    2^(i-1) blocks apart (butterfly.py): y = W (R^T x) + b. m = 1 is OFT; m = log2(2 k) joins
    every input with every other. Rows of W keep their norms and angles. ``terms=n`` takes n terms
    of the series of R instead of the solve: orthogonal only nearly; 0 is exact. `gains` trains a
    gain for each output too, ``W' = diag(s) W R^T``, s from ones, as the authors' code does.

    Start: Q = 0: the pre-trained function exactly. Trains m in (b - 1) / 2 per matrix, and out
    more with `gains`. Kept for backward: x, once for all layers that read it; x is turned, never W;
    the product in front of a gain is made again. Merges exactly. No weight decay. b must divide
    `in`, 2^(m-1) b too, and b must be even beyond one factor. In training `block_dropout` leaves
    that share of the blocks of one factor, drawn for each forward, where they are (see oft).
    """

    paper: ClassVar[str] = ("Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization "
                            "(2023), arXiv:2311.06243")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    block: int = setting(8, "b, inputs that turn together", alias=("boft_block_size",), other=(4,))
    factors: int = setting(2, "m, factors of the butterfly", alias=("boft_n_butterfly_factor",),
                           other=(1,))
    terms: int = setting(0, "0: exact; n: the first n terms of the series", other=(5,))
    gains: bool = setting(False, "a gain for each output trains too")

    block_dropout: float = setting(0.0, "share of blocks that do not turn in a forward",
                                   alias=("boft_dropout",))

    def __post_init__(self) -> None:
        check_dropout("boft", self.block_dropout, "block_dropout")
        if self.block < 2 or self.factors < 1 or self.terms == 1 or self.terms < 0:
            raise RecipeError("boft: block >= 2, factors >= 1 and terms 0 (exact) or at least 2 "
                              "are expected")
        if self.factors > 1 and self.block % 2:
            raise RecipeError(f"boft: block={self.block} has no halves to wire; an even one has")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    @property
    def run(self) -> int:
        """Inputs that the last factor wires together."""
        return self.block * 2 ** (self.factors - 1)

    def delta(self, site: Site) -> Butterfly:
        place = site.place
        if place.inp % self.run:
            raise RecipeError(f"boft: 2^(factors - 1) block = {self.run} does not divide the "
                              f"{place.inp} inputs of {place.name}")
        wiring = (place.inp, self.block, self.factors, self.terms)
        term = Gained(place.out, *wiring) if self.gains else Butterfly(*wiring)
        term.upper.burnish_decay, term.block_dropout = False, self.block_dropout
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input (no other delta on the weight)."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.factors * place.inp * (self.block - 1) // 2 + place.out * self.gains
