from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...blocks.weight.grids import WholeProvider
from ...blocks.weight.quantise import Quantiser
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Site


@dataclass(frozen=True, kw_only=True)
class Rtn(Method):
    """RTN: frozen weights in whole numbers of a few bits, each rounded to the nearest.

    ``W'_oi = s_og (q_oi - z_og)``, ``q = clip(round(W / s) + z, 0, 2^bits - 1)``, one s (fp32) and
    z (a byte) for `group` inputs of an output; group 0: for all of them. The grid spans the least
    and the largest entry of its run, and zero: ``s = (max - min) / (2^bits - 1)``,
    ``z = round(-min / s)``. With `symmetric` it lies around zero, ``s = max|W| / (2^(bits-1) - 1)``
    and no z. With `clipped` spans of 50 to 100 % of that are tried in steps of 2.5 %, and each run
    takes the one with the least squared error.

    Holds: bits + 40 / group per weight (32 / group with `symmetric`), packed without gaps at 3, 5,
    6 and 7 bits too. Trains: nothing. Step 0 is the rounded model. Reads no data: a file says
    nothing of the codes, they are made again from the same base. Forward and backward decode a
    weight anew, a temporary. The head stays as it is. Merge: what was added to the decoded weight
    stays in the model's dtype; rounding the sum again would lose it. With ``peqa`` of the same
    `group` beside it, that method's own integers. `int8`: 8 bits, one symmetric grid an output.

    At 4 bits nf4 is as close to weights of a normal law in half a bit less; take this one for other
    widths, for convolutions, or where whole numbers are what is deployed. Below 4 bits begin with
    `loftq`.
    """

    paper: ClassVar[str] = ("ZeroQuant: Efficient and Affordable Post-Training Quantization for "
                            "Large-Scale Transformers (Yao et al., 2022), arXiv:2206.01861")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "experts"})
    small: ClassVar[dict[str, int]] = {"group": 8}

    bits: int = setting(4, "bits of a code, 2 to 8")
    group: int = setting(64, "inputs of one output that share a scale; 0: all")
    symmetric: bool = setting(False, "a grid around zero, without a zero point")
    clipped: bool = setting(False, "try narrower spans, and keep what has the least error")

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"rtn: bits={self.bits}: expected 2 to 8")
        if self.group < 0:
            raise RecipeError(f"rtn: group={self.group}: expected the inputs that share a scale, "
                              "or 0 for all of an output")

    def storage(self, site: Site) -> WholeProvider | None:
        if site.place.role == "head":
            return None
        rule = "search" if self.clipped else "absmax"
        return WholeProvider(site.weight, site.place,
                             Quantiser(self.bits, self.group, self.symmetric, rule))

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights",)
