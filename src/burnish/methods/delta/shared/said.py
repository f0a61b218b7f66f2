from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.projected import Form, Projected
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Said(Method):
    """SAID: all matrices train inside one random subspace, whose size is the setting.

    ``W_i' = W_i + lam_i (P z)_i``: z (dimension,) is shared by all matrices, P (D, dimension) a
    random projection with columns of unit length, D the entries of all targets, lam_i one number
    per matrix (``scaled=False``: 1, the plain subspace). How small `dimension` may be before a
    score falls to 90 % of full fine-tuning's is the intrinsic dimension of the task: sweep it.

    P is drawn from `seed` and the places' names in pieces, and never stored: "fastfood", signs, a
    permutation, Gaussians and Walsh-Hadamard transforms, log(dimension) operations an entry;
    "dense", normal, D x dimension draws; "sparse", +-1 in one of sqrt(D) entries. Each matrix has
    blocks of its own, of the power of two from `dimension` on; all blocks of a matrix share their
    signs and their permutation, so that only Gaussians are drawn, one an entry.

    Biases, normalisations, embeddings and the head are outside: a new head trains as it does.
    Start: z = 0, lam = 1: the pre-trained function exactly. Trains dimension + one per matrix. Kept
    for backward: x; the update is made again panel by panel, on the host as far as it is drawn:
    nanoseconds an entry, so batches should be large. Files hold z and lam. Merges exactly. No
    weight decay.
    """

    paper: ClassVar[str] = ("Measuring the Intrinsic Dimension of Objective Landscapes (2018), "
                            "arXiv:1804.08838; Intrinsic Dimensionality Explains the Effectiveness "
                            "of Language Model Fine-Tuning (2020), arXiv:2012.13255")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"dimension": 24}

    dimension: int = setting(1000, "numbers that all matrices are made of",
                             alias=("d", "intrinsic_dimension"))
    projection: Form = setting("fastfood", "how P is drawn")
    scaled: bool = setting(True, "a trained scale per matrix; False: the subspace alone")
    seed: int = setting(0, "of the projection")

    def __post_init__(self) -> None:
        if self.dimension < 1:
            raise RecipeError(f"said: dimension={self.dimension}: expected at least 1")

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor]:
        total = sum(p.out * p.inp for p in places)
        if self.dimension > total:
            raise RecipeError(f"said: dimension={self.dimension} is more than the {total} entries "
                              "of its targets")
        z = nn.Parameter(torch.zeros(self.dimension))
        z.burnish_decay = False                           # type: ignore[attr-defined]
        return {"z": z}

    def delta(self, site: Site) -> Projected:
        total = sum(p.out * p.inp for p in site.places)
        return Projected(site.place, self.projection, self.dimension, total, self.scaled,
                         self.seed, site.shared)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters of one matrix alone (z is the recipe's)."""
        return int(self.scaled)
