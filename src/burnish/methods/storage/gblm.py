from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...blocks.choose.inputs import NormsAndGradient
from ...blocks.weight.pruned import Chosen
from ...core.errors import RecipeError
from ...core.method import setting
from ...core.site import Place, Site
from ._pruning import Pruning

#: of the loss whose gradients are read: fp16 rounds small ones to zero. A power of two, so that
#: nothing else changes by it
SCALE = 1024.0


@dataclass(frozen=True, kw_only=True)
class Gblm(Pruning):
    """GBLM-Pruner: Wanda's score and the gradient's: what the loss hardly asks for is zero.

    ``W' = M * W``, score ``|W_ij| |x_j|_2 + alpha |W_ij| |g_ij|``: |x_j|_2 as in `wanda`, |g_ij|
    over the gradients of single calibration samples (``tune(..., calibration=batches)``): with
    norm="l2" the root of their mean square, with "l1" the mean of their absolute values. Of the
    inputs of each output ``floor(ratio in)`` with the lowest score go; with ``mask="2:4"`` two of
    every four. With alpha=0 it is `wanda`.

    Blocks are pruned one after the other, each by what the pruned ones before it pass on and by the
    gradients of the model as it is then: the gradients of one block wait on the host, and no more
    than one stands on the device. (Published: inputs so, gradients of the whole model beforehand,
    which all have to wait.) 100 is the paper's alpha. The mean, not the sum, over samples is our
    reading of both norms (unconfirmed).

    Holds: the weight's own bytes, zeros included. Trains: nothing; what is added on top (a LoRA) is
    dense, and a merge with it is; ``sparse_peft`` keeps the zeros. Step 0 is the pruned model. The
    file holds the mask, one bit an entry: a load needs no data.
    """

    paper: ClassVar[str] = ("Beyond Size: How Gradients Shape Pruning Decisions in Large Language "
                            "Models (2023), arXiv:2311.04902")
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    alpha: float = setting(100.0, "how much the gradient counts beside the input")
    norm: Literal["l1", "l2"] = setting("l2", "of an entry's gradients over samples")
    samples: int = setting(128, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1 or self.alpha < 0:
            raise RecipeError(f"gblm: samples >= 1 and alpha >= 0 are expected, got {self.samples} "
                              f"and {self.alpha}")

    def read_loss(self, model: nn.Module, batch: Any, run: Callable[..., Any]) -> Tensor:
        return run(batch, loss=True) * SCALE

    def observe(self, place: Place) -> NormsAndGradient | None:
        if place.role == "head":
            return None
        self.fits(place)
        return NormsAndGradient(place.out, place.inp, self.norm, SCALE, "blocks")

    def storage(self, site: Site) -> Chosen | None:
        if site.place.role == "head":
            return None
        if site.seen is None:                            # a file brings it, or nothing has values
            return Chosen(site.weight)
        W = site.place.view(site.weight)
        W = W.to(torch.promote_types(W.dtype, torch.float32)).abs()
        score = site.seen.gradient.to(W).mul_(self.alpha).add_(site.seen.norm.to(W)).mul_(W)
        return Chosen(site.weight, self.keep(score, site))
