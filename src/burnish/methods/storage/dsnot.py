from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...blocks.choose.inputs import Moments
from ...blocks.choose.prune import grown_and_pruned, kept, pattern
from ...blocks.weight.pruned import Chosen
from ...core.errors import RecipeError
from ...core.families import ATTENTION, CROSS
from ...core.method import setting
from ...core.site import Place, Site
from ._pruning import Pruning


@dataclass(frozen=True, kw_only=True)
class Dsnot(Pruning):
    """DSnoT: a pruned weight in which entries then change places, without training.

    ``W' = M * W``. The first mask is that of `first`: the lowest ``|W_ij| |x_j|_2`` of each output
    (as in `wanda`) or the smallest |W|. What an output loses on average is
    ``e = sum over pruned j of W_j E[x_j]``. In each of `cycles` it takes back the pruned entry with
    the largest ``sign(e) W_j E[x_j] / Var[x_j]`` and gives up, of the kept ones with the other sign
    of ``W_j E[x_j]``, the one with the lowest Wanda score; with ``mask="2:4"``, of those in the
    same run of inputs whatever their sign. It stops at ``|e| <= tolerance`` and before e changes
    its sign (that exchange is not made), and where nothing brings e nearer. Each output keeps as
    many entries as it had.

    E, Var and norms are over the tokens of calibration data (``tune(..., calibration=batches)``),
    read block by block, each by what the pruned ones before it pass on. ``refine="attention"``, as
    published: the MLP keeps its first mask. (The sign rule has a switch in the authors' code; this
    is the reading of the paper's text, unconfirmed.)

    Holds: the weight's own bytes, zeros included. Trains: nothing; what is added on top (a LoRA) is
    dense, and a merge with it is; ``sparse_peft`` keeps the zeros. Step 0 is the pruned model. The
    file holds the mask, one bit an entry: a load needs no data.
    """

    paper: ClassVar[str] = ("Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse "
                            "LLMs, ICLR 2024, arXiv:2310.08915")
    small: ClassVar[dict[str, float]] = {"tolerance": 0.0}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    needs: ClassVar[frozenset[str]] = frozenset({"attention linears"})

    first: Literal["wanda", "magnitude"] = setting("wanda", "score of the first mask")
    refine: Literal["attention", "all"] = setting(
        "attention", "weights whose entries change places")
    cycles: int = setting(50, "exchanges of an output at most", other=(1,))
    tolerance: float = setting(0.1, "|e| at which an output is left", other=(1e9,))
    samples: int = setting(128, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask == "matrix":
            raise RecipeError("dsnot: entries change places within an output: mask='row', or such "
                              "as '2:4'")
        if self.samples < 1 or self.cycles < 1 or self.tolerance < 0:
            raise RecipeError("dsnot: samples and cycles of at least 1 and tolerance >= 0 are "
                              f"expected, got {self.samples}, {self.cycles} and {self.tolerance}")

    def refined(self, place: Place) -> bool:
        return self.refine == "all" or place.role in (*ATTENTION, *CROSS)

    def observe(self, place: Place) -> Moments | None:
        if place.role == "head":
            return None
        self.fits(place)
        return Moments(place.inp, "blocks")

    def storage(self, site: Site) -> Chosen | None:
        if site.places and not any(map(self.refined, site.places)):
            raise RecipeError("dsnot: none of the targets is a matrix of attention, so nothing "
                              "would change places; refine='all' refines the others too")
        if site.place.role == "head":
            return None
        if site.seen is None:                            # a file brings it, or nothing has values
            return Chosen(site.weight)
        W = site.place.view(site.weight)
        W = W.to(torch.promote_types(W.dtype, torch.float32))
        return Chosen(site.weight, site.place.unview(self.chosen(W, site), site.weight))

    def chosen(self, W: Tensor, site: Site) -> Tensor:
        """The mask (out, in) of a weight in fp32 at least."""
        seen: Moments = site.seen
        score = W.abs() * seen.norm.to(W)
        keep = kept(score if self.first == "wanda" else W.abs(), self.mask, self.ratio)
        if not self.refined(site.place):
            return keep
        parts = pattern(self.mask)
        m = parts[1] if parts else 0
        return grown_and_pruned(W * seen.mean.to(W), score, keep, seen.variance.to(W),
                                self.tolerance, self.cycles, m)
