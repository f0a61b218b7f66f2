"""bf16: see :class:`Bf16`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...blocks.weight.quantise import Bf16Provider
from ...core.method import Method
from ...core.site import Site


@dataclass(frozen=True, kw_only=True)
class Bf16(Method):
    """bfloat16 storage -- frozen weights rounded to 16 bits, computing stays in the model's dtype.

    W' = bfloat16(W): 8 bits of mantissa, relative error at most 2^-9. A weight of a module that
    computes in fp32 is widened when used, a temporary.

    Holds: 16 bits per weight. Trains: nothing. Step 0 is the rounded model. Merge: the update is
    added to the rounded weight in the model's dtype.
    """

    paper = "A Study of BFLOAT16 for Deep Learning Training (2019), arXiv:1905.12322"
    identity = False
    kinds = frozenset({"linear", "conv1d", "conv", "embedding", "experts"})

    def storage(self, site: Site) -> Bf16Provider | None:
        return None if site.weight.dtype == torch.bfloat16 else Bf16Provider(site.weight)

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights",)
