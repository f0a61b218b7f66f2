from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.path import Path
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Kronecker(Path):
    """``Delta = s C (x) B``: C (o1, i1), B (o2, i2); either may be a product of rank r.

    With x as (i1, i2): ``Delta x = s C x B^T``; neither Delta nor a full B is ever formed.
    """

    def __init__(self, outer: tuple[int, int], inner: tuple[int, int], rank: int,
                 whole: tuple[bool, bool], scale: float):
        super().__init__()
        self.outer, self.inner, self.scale = outer, inner, scale
        self.inp = outer[1] * inner[1]
        self.C = nn.ParameterList(_factors(*outer, rank, whole[0]))
        self.B = nn.ParameterList(_factors(*inner, rank, whole[1]))
        for p in (*self.C, *self.B):
            nn.init.kaiming_uniform_(p, a=math.sqrt(5))
            p.burnish_decay = False
        nn.init.zeros_(self.B[-1])

    def path(self, h: Tensor) -> Tensor:
        z = h.view(-1, self.outer[1], self.inner[1])
        *up, last = (b.to(h.dtype) for b in self.B)          # inputs first: r or o2 wide
        z = z @ last.t()
        for c in reversed(self.C):
            z = torch.einsum("oi,nir->nor", c.to(h.dtype), z)
        for b in up:
            z = z @ b.t()
        return z.reshape(h.shape[0], -1) * self.scale


def _factors(out: int, inp: int, rank: int, whole: bool) -> list[nn.Parameter]:
    shapes = [(out, inp)] if whole else [(out, rank), (rank, inp)]
    return [nn.Parameter(torch.empty(s)) for s in shapes]


@dataclass(frozen=True, kw_only=True)
class Lokr(Method):
    """LoKr: an update that is one Kronecker product, its second factor of low rank.

    ``y = x W^T + b + s x (C (x) B)^T``, C (o1, i1), B (o2, i2), o1 o2 = out, i1 i2 = in, s = alpha
    / rank. o1 and i1 are the divisors nearest to the square root, or at most `factor` (the smaller
    number is C's). B = B_a B_b, (o2, rank) and (rank, i2), where rank < max(o2, i2) / 2, else it is
    whole; ``decompose_both`` treats C alike; with both whole s is 1.

    Start: C and B_a Kaiming-uniform, B_b (or B) 0: the pre-trained function exactly. Trains
    o1 i1 + rank (o2 + i2) per matrix, o1 i1 + o2 i2 with a whole B. rank(Delta) = rank(C) rank(B).
    Kept for backward: x; the path runs again there. Merges exactly. No weight decay.
    A side that is prime leaves nothing to split and is refused when both are. Convolutions are
    left to other methods.
    """

    paper: ClassVar[str] = ("Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to "
                            "Model Evaluation (2023), arXiv:2309.14859; KronA (2022), "
                            "arXiv:2212.10650")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})

    rank: int = setting(8, "rank of B", alias=("r",))
    alpha: float = setting(8.0, "numerator of the scale", alias=("lora_alpha",))
    factor: int = setting(-1, "largest first factor of both sides; -1: near the square root",
                          alias=("decompose_factor",), other=(4,))
    decompose_both: bool = setting(False, "C of low rank too, where it is large enough",
                                   beside={"rank": 1})

    def __post_init__(self) -> None:
        if self.rank < 1 or self.factor == 0 or self.factor < -1:
            raise RecipeError("lokr: rank >= 1 and factor -1 (near the square root) or at least 1 "
                              "are expected")

    def shapes(self, place: Place) -> tuple[tuple[int, int], tuple[int, int], tuple[bool, bool]]:
        """(o1, i1), (o2, i2), and whether C and B are whole."""
        (o1, o2), (i1, i2) = split(place.out, self.factor), split(place.inp, self.factor)
        if o1 == i1 == 1:
            raise RecipeError(f"lokr: {place.name} ({place.out} x {place.inp}) has no sides to "
                              "split (they are prime, or factor is 1); use lora there")
        return (o1, i1), (o2, i2), (not (self.decompose_both and self.rank < max(o1, i1) / 2),
                                    self.rank >= max(o2, i2) / 2)

    def delta(self, site: Site) -> Kronecker:
        outer, inner, whole = self.shapes(site.place)
        return Kronecker(outer, inner, self.rank, whole,
                         1.0 if all(whole) else self.alpha / self.rank)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        outer, inner, whole = self.shapes(place)
        return sum(a * b if w else self.rank * (a + b)
                   for (a, b), w in zip((outer, inner), whole, strict=True))


def split(n: int, factor: int) -> tuple[int, int]:
    """n = m (n / m): `factor` itself where it divides n, else the largest divisor that is at most
    the root of n and, if given, at most `factor`."""
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = math.isqrt(n) if factor < 0 else min(math.isqrt(n), factor)
    m = next(d for d in range(most, 0, -1) if n % d == 0)
    return m, n // m
