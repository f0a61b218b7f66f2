from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ....blocks.weight.between import Between, Shifted
from ....core.method import Method
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Svdiff(Method):
    """SVDiff: every singular value of a weight may shift, none below zero.

    ``W = U diag(sigma) V^T``, ``W' = U diag(relu(sigma + delta)) V^T``, delta (min(out, in),);
    convolutions see W as (out, in * kernel). Realised as ``W + U diag(relu(sigma + delta) - sigma)
    V^T``, so the base is left alone.

    Start: delta = 0: the pre-trained function exactly. Trains min(out, in) per matrix. Kept for
    backward: x V (min(out, in) numbers per token), not x. The frozen factors take (in + out)
    min(out, in) numbers, more than W, in memory and in the file. Merges exactly. No weight decay;
    the authors' learning rate is a thousand times that of full tuning.
    """

    paper: ClassVar[str] = ("SVDiff: Compact Parameter Space for Diffusion Fine-Tuning (2023), "
                            "arXiv:2303.11305")
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    def delta(self, site: Site) -> Between:
        place = site.place
        term = Shifted(place.out, place.inp, min(place.out, place.inp))
        return term.read(site, lambda W: torch.linalg.svd(W, full_matrices=False))

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return min(place.out, place.inp)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return min(place.out, place.inp)
