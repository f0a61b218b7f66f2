from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...blocks.choose.inputs import Norms
from ...blocks.weight.pruned import Chosen
from ...core.errors import RecipeError
from ...core.method import setting
from ...core.site import Place, Site
from ._pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruning):
    """Wanda: the entries of frozen weights that matter least to what they are given are zero.

    ``W' = M * W``, score ``|W_ij| |x_j|_2``: |x_j|_2 is the norm of input feature j over the tokens
    of a calibration sample, the root of its mean square over samples
    (``tune(..., calibration=batches)``). Of the inputs of each output ``floor(ratio in)`` with the
    lowest score go; with ``mask="2:4"`` two of every four.

    With `by_block` the blocks are pruned one after the other, each by what the pruned ones before
    it pass on, as published: a forward over the data for each block. Without, one for all.

    Holds: the weight's own bytes, zeros included. Trains: nothing; what is added on top (a LoRA) is
    dense, and a merge with it is; ``sparse_peft`` keeps the zeros. Step 0 is the pruned model. The
    file holds the mask, one bit an entry: a load needs no data.
    """

    paper: ClassVar[str] = ("A Simple and Effective Pruning Approach for Large Language Models "
                            "(2023), arXiv:2306.11695")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    by_block: bool = setting(True, "prune block by block, each by its pruned inputs")
    samples: int = setting(128, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise RecipeError(f"{self.name}: samples={self.samples}: expected at least 1")

    def observe(self, place: Place) -> Norms | None:
        if place.role == "head":
            return None
        self.fits(place)
        return Norms(place.inp, "blocks" if self.by_block else "once")

    def score(self, W: Tensor, seen: Norms) -> Tensor:
        """(out, in), of a weight in fp32 at least."""
        return W.abs() * seen.norm.to(W)

    def storage(self, site: Site) -> Chosen | None:
        if site.place.role == "head":
            return None
        if site.seen is None:                            # a file brings it, or nothing has values
            return Chosen(site.weight)
        W = site.place.view(site.weight)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        return Chosen(site.weight, self.keep(self.score(W, site.seen), site))
