from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.pruned import Masked
from ....core.method import Method
from ....core.site import Site


@dataclass(frozen=True, kw_only=True)
class SparsePeft(Method):
    """SparsePEFT: what is added to a pruned weight passes its mask, so that a merge stays sparse.

    ``W' = M * (W + updates)``, M one where W is not zero: the zeros of a pruned checkpoint, or
    those that a part beside it makes (``wanda + lora + sparse_peft``). A function of W over all
    that is added to it. An entry that is zero by chance counts as pruned.

    Start: that of the parts beside it. Trains nothing. Kept for backward: x; W' is formed anew in
    forward and backward. Holds one bit an entry, which the file has too. Merges exactly: the zeros
    of the merged weight are those of W. Dropout on an update has no form here.
    """

    paper: ClassVar[str] = ("SQFT: Low-cost Model Adaptation in Low-precision Sparse Foundation "
                            "Models (2024), arXiv:2410.03750")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False                     # that of the parts beside it
    shown_beside: ClassVar[str] = "magnitude + lora(rank=4)"
    excused: ClassVar[dict[str, str]] = {
        "every_kind_of_place":
            "magnitude, which it is shown beside, holds whole weights: rows of a fused one are no "
            "target of it; tests/methods/test_sparse_peft.py has a checkpoint without it",
        "bf16_is_near_fp32 on mixtral":
            "a token whose best experts are nearly level is routed otherwise in bf16, which moves "
            "the gradient by a seventh; tests/methods/test_sparse_peft.py holds gradients in fp64"}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Masked:
        return Masked(site.weight)
