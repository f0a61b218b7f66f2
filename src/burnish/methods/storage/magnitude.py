from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...blocks.weight.pruned import Pruned
from ...core.site import Site
from ._pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruning):
    """Magnitude pruning: the smallest entries of every frozen weight are zero.

    ``W' = M * W``, M (out, in) of zeros and ones: of the n entries that compete ``floor(ratio n)``
    with the lowest |W| go; with ``mask="2:4"`` two of every four inputs. Of equal ones the first.

    Holds: the weight's own bytes, zeros included. Trains: nothing; what is added on top (a LoRA) is
    dense, and a merge with it is; ``sparse_peft`` keeps the zeros. Reads no data. Step 0 is the
    pruned model. A file says nothing of the mask: it is found again from the same base.
    """

    paper: ClassVar[str] = ("Learning both Weights and Connections for Efficient Neural Networks "
                            "(2015), arXiv:1506.02626")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "experts"})

    def storage(self, site: Site) -> Pruned | None:
        if site.place.role == "head":
            return None
        score = site.place.view(site.weight).abs()
        wide = torch.promote_types(score.dtype, torch.float32)
        return Pruned(site.weight, self.keep(score.to(wide), site))
