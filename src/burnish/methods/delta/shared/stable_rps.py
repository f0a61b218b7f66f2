from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ....blocks.weight.hashed import Hashed, Lengths, Map
from ....blocks.weight.shared import Seeded
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class StableRps(Method):
    """STABLE-RPS: every entry of every update is a number of one small memory, found by a hash.

        W_l' = W_l + Delta_l,   Delta_i = lam_l g(i) psi[h(i)] / d[h(i)]

    i counts the n entries of all targets, psi (dimension,) trains, g(i) = +-1 is hashed, lam_l =
    1 / sqrt(in) is the scale that a layer of its width starts at. ``mode="stable"``: the row of all
    entries is folded into partitions of `dimension`, in each the chunks of `piece` entries are
    shifted by a hash: every number is read n / dimension times or once more, and at dimension = n
    once: then training is that of the dense updates. d_j^2 = sum lam^2 over what reads j makes the
    step of psi the one that its entries would take (the gradient scaler: for plain descent the same
    as dividing psi's step by that sum). ``mode="roast"`` (ROAST): each chunk is read at a hashed
    place, so some numbers serve many and some none, and d = 1.

    Start: psi = 0: the pre-trained function exactly. Trains `dimension` numbers, whatever the
    model; their gradients and moments are as small. Kept for backward: x; the update is gathered
    again panel by panel, where it is used. Files hold psi alone. Merges exactly. No weight decay,
    which would pull one number at many places.

    Departures: a store of updates beside a frozen model, where the paper compresses a model that
    trains from nothing; the form of the gradient scaler and the hashes are ours.
    """

    paper: ClassVar[str] = ("In defense of parameter sharing for model-compression (Desai and "
                            "Shrivastava, 2023), arXiv:2310.11611; ROAST: Efficient model "
                            "compression with Random Operation Access Specific Tile hashing "
                            "(2022), arXiv:2207.10702")
    tier: ClassVar[str] = "from the text"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"dimension": 240, "piece": 8}

    dimension: int = setting(65536, "numbers that all matrices are made of")
    piece: int = setting(32, "Z, entries that are read side by side", other=(4,))
    mode: Literal["stable", "roast"] = setting("stable", "folded evenly, or hashed chunk by chunk")
    seed: int = setting(0, "of the hashes")

    def __post_init__(self) -> None:
        if self.piece < 1 or self.dimension < 1 or self.dimension % self.piece:
            raise RecipeError(f"stable_rps: dimension={self.dimension} is no whole number of "
                              f"chunks of {self.piece}")
        if self.seed < 0:
            raise RecipeError(f"stable_rps: seed={self.seed}: expected at least 0")

    def repeats(self) -> int | None:
        return None                              # no two matrices are read alike

    @property
    def map(self) -> Map:
        return Map(self.dimension, self.piece, self.seed, self.mode == "stable")

    def shared(self, places: Sequence[Place]) -> Mapping[str, Tensor | Seeded]:
        total = sum(p.out * p.inp for p in places)
        if self.dimension > total:
            raise RecipeError(f"stable_rps: dimension={self.dimension} is more than the {total} "
                              "entries of its targets")
        psi = nn.Parameter(torch.zeros(self.dimension))
        psi.burnish_decay = False                         # type: ignore[attr-defined]
        if self.mode == "roast":
            return {"psi": psi}
        spans = tuple((p.out * p.inp, 1 / p.inp) for p in places)
        return {"psi": psi, "inverse": Lengths((self.dimension,), map=self.map, spans=spans)}

    def delta(self, site: Site) -> Hashed:
        before = site.places[: list(site.places).index(site.place)]
        return Hashed(site.place, self.map, sum(p.out * p.inp for p in before), site.shared)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters of one matrix alone: none, psi is the recipe's."""
        return 0
