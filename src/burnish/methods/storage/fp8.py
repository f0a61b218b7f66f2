from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.weight.grids import Fp8Provider
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Site


@dataclass(frozen=True, kw_only=True)
class Fp8(Method):
    """FP8: frozen weights in 8-bit floating point, with a scale for a run of inputs.

    ``W'_oi = s_og q_oi``, ``q = fp8(W / s)`` to the nearest, ``s = max|W| / F`` in fp32 over
    `group` inputs of an output (0: all of them), F the largest number of the format: 448 of
    ``e4m3`` (4 bits of exponent, 3 of mantissa, no infinities), 57344 of ``e5m2``. An entry is off
    by 1/16 of itself at most in e4m3 and by 1/8 in e5m2, but for those below 1/28672 (1e-9) of
    their run's largest.

    Holds: 8 + 32 / group bits per weight. Trains: nothing. Step 0 is the rounded model. Reads no
    data, and a file says nothing of the codes. Products are made in the model's dtype: the weight
    is decoded when used, a temporary. The head stays as it is. Merge: the update is added to the
    decoded weight in the model's dtype.

    Whole numbers (`int8`) are as small and closer where the entries of a run are alike in size;
    this is for weights with outliers, and for models that are deployed in FP8.
    """

    paper: ClassVar[str] = ("FP8 Formats for Deep Learning (Micikevicius et al., 2022), "
                            "arXiv:2209.05433")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "experts"})

    format: Literal["e4m3", "e5m2"] = setting("e4m3", "bits of exponent and mantissa")
    group: int = setting(0, "inputs of one output that share a scale; 0: all", other=(8,))

    def __post_init__(self) -> None:
        if self.group < 0:
            raise RecipeError(f"fp8: group={self.group}: expected the inputs that share a scale, "
                              "or 0 for all of an output")

    def storage(self, site: Site) -> Fp8Provider | None:
        return None if site.place.role == "head" else \
            Fp8Provider(site.weight, site.place, self.group, self.format)

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights",)
