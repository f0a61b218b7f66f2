from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.kronecker import Kronecker
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout


@dataclass(frozen=True, kw_only=True)
class Lokr(Method):
    """LoKr: an update that is one Kronecker product, its second factor of low rank.

    ``y = x W^T + b + s x (C (x) B)^T``, C (o1, i1), B (o2, i2), o1 o2 = out, i1 i2 = in, s = alpha
    / rank. o1 and i1 are the divisors nearest to the square root, or at most `factor` (the smaller
    number is C's). B = B_a B_b, (o2, rank) and (rank, i2), where rank < max(o2, i2) / 2, else it is
    whole; ``decompose_both`` treats C alike; with both whole s is 1.

    Convolutions: B has the kernel, (o2, i2 k) with k entries of it and o2, i2 from the channels;
    `tucker` makes a B of low rank ``U T V``, U (o2, rank), T (rank, rank, k), V (rank, i2).

    Start: C, B_a (U, T) Kaiming-uniform, B_b (V, or B) 0: the pre-trained function exactly. Trains
    o1 i1 + rank (o2 + i2 k) per matrix, o1 i1 + o2 i2 k with a whole B, o1 i1 + rank (o2 + i2 +
    rank k) with `tucker`. rank(Delta) = rank(C) rank(B). Kept for backward: x; the path runs again
    there. Merges exactly. No weight decay. KronA is this with a rank that makes both whole, but
    that its C is normal and its s is not 1. A side that is prime leaves nothing to split and is
    refused when both are. In training `rank_dropout` leaves outputs out of a forward, each with
    that probability (`rank_dropout_scale`: the others are scaled by what is left), and
    `module_dropout` a whole matrix, as LyCORIS and PEFT have them.
    """

    paper: ClassVar[str] = ("Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to "
                            "Model Evaluation (2023), arXiv:2309.14859; KronA (2022), "
                            "arXiv:2212.10650")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    rank: int = setting(8, "rank of B", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    factor: int = setting(-1, "largest first factor of both sides; -1: near the square root",
                          alias=("decompose_factor",), other=(4,))
    decompose_both: bool = setting(False, "C of low rank too, where it is large enough",
                                   beside={"rank": 1})

    tucker: bool = setting(
        False, "kernels by a core of their own, where B is not whole",
        alias=("use_effective_conv2d", "use_effective_conv", "use_tucker"),
        unseen="no kernel is among the default targets: tests/methods/test_lokr.py")

    rank_dropout: float = setting(0.0, "probability that an output gets no update in a forward")
    rank_dropout_scale: bool = setting(False, "the outputs that get one get more for it",
                                       beside={"rank_dropout": 0.5})
    module_dropout: float = setting(0.0, "probability that a matrix gets none in a forward")

    def __post_init__(self) -> None:
        check_dropout("lokr", self.rank_dropout, "rank_dropout")
        check_dropout("lokr", self.module_dropout, "module_dropout")
        if self.rank < 1 or self.factor == 0 or self.factor < -1:
            raise RecipeError("lokr: rank >= 1 and factor -1 (near the square root) or at least 1 "
                              "are expected")

    def shapes(self, place: Place) -> tuple[tuple[int, int], tuple[int, int], tuple[bool, bool]]:
        """(o1, i1), (o2, i2), and whether C and B are whole."""
        (o1, o2), (i1, i2) = (split(n, self.factor) for n in (place.out, place.inp // place.kernel))
        if o1 == i1 == 1:
            raise RecipeError(f"lokr: {place.name} ({place.out} x {place.inp}) has no sides to "
                              "split (they are prime, or factor is 1); use lora there")
        return (o1, i1), (o2, i2), (not (self.decompose_both and self.rank < max(o1, i1) / 2),
                                    self.rank >= max(o2, i2) / 2)

    def delta(self, site: Site) -> Kronecker:
        outer, inner, whole = self.shapes(site.place)
        term = Kronecker(outer, inner, self.rank, whole, 1.0 if all(whole) else
                         self.alpha / self.rank, site.place.kernel, self.tucker)
        term.rank_dropout, term.rescale = self.rank_dropout, self.rank_dropout_scale
        term.module_dropout = self.module_dropout
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        (o1, i1), (o2, i2), whole = self.shapes(place)
        r, k = self.rank, place.kernel
        C = o1 * i1 if whole[0] else r * (o1 + i1)
        if whole[1]:
            return C + o2 * i2 * k
        return C + (r * (o2 + i2 + r * k) if self.tucker and k > 1 else r * (o2 + i2 * k))


def split(n: int, factor: int) -> tuple[int, int]:
    """n = m (n / m): `factor` itself where it divides n, else the largest divisor that is at most
    the root of n and, if given, at most `factor`."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor < 0 else min(math.isqrt(n), factor)
    m = next(d for d in range(most, 0, -1) if n % d == 0)
    return m, n // m
