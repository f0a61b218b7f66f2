from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....blocks.weight.clustered import Clustered, clusters, leading
from ....core.errors import CheckError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Adamss(Method):
    """AdaMSS: outputs that use a weight's leading directions alike share a low-rank update there.

    ``W ~ U diag(S) V`` of its `rank` leading triplets; k-means puts the outputs into `clusters`
    clusters by their rows of U. ``W'[o] = W[o] + B[o] A_c V``, c the cluster of output o: A_c
    (each, rank) is one for all of them, B[o] (each,) the output's own.

    Start: B = 0: the pre-trained function exactly; A_c the `each` leading right directions of its
    rows of U, fewer (the rest 0, and there it stays) where it has fewer rows, or, with `threshold`,
    where the square of their value is at most this share of the first's. Trains clusters each rank
    + each out per matrix. V and the clusters are in the file: rank in numbers and out more. Kept
    for backward: V x, rank numbers per token, not x. Merges exactly, and exports as plain LoRA too.
    A matrix smaller than `rank` has the rank it can.

    A sketch from `seed` finds U and V. Departures: a bias is left alone, which PEFT takes as one
    more input; subspaces are not pruned while it trains.
    """

    paper: ClassVar[str] = ("AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient "
                            "Fine-Tuning (2025)")
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"rank": 12, "clusters": 3}

    rank: int = setting(100, "leading directions of a weight", alias=("r",))
    clusters: int = setting(5, "of the outputs", alias=("num_subspaces",))
    each: int = setting(1, "rank of a cluster's update", alias=("subspace_rank",))
    threshold: float | None = setting(None, "a direction's square over the first's, at most which "
                                      "a cluster leaves it out; None: none is",
                                      alias=("svd_threshold",), other=(0.9,), beside={"each": 3})
    seed: int = setting(0, "of the sketch", alias=("random_seed",))

    def __post_init__(self) -> None:
        if min(self.rank, self.clusters, self.each) < 1:
            raise RecipeError("adamss: rank, clusters and each of at least 1 are expected")
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise RecipeError(f"adamss: threshold={self.threshold}: expected a share from 0, below "
                              "1")
        if self.threshold is not None and self.each == 1:
            raise RecipeError("adamss: threshold leaves out directions of a cluster, and with "
                              "each=1 it has one")

    def delta(self, site: Site) -> Clustered:
        place = site.place
        r, k = self._sizes(place)
        term = Clustered(place.out, place.inp, r, k, self.each).to(site.weight.device)
        if site.blank:
            return term
        if not bool(site.weight.isfinite().all()):
            raise CheckError(f"adamss: {place.name} holds inf or nan")
        U, V = leading(site.weight, self.rank, self.seed)
        term.begin(U, V, clusters(U, self.clusters), self.threshold)
        return term

    def _sizes(self, place: Place) -> tuple[int, int]:
        return min(self.rank, place.out, place.inp), min(self.clusters, place.out)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self._sizes(place)[0]

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        r, k = self._sizes(place)
        return self.each * (k * r + place.out)
