from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ....blocks.choose.masks import drawn
from ....blocks.weight.between import Between, Patterned
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Svft(Method):
    """SVFT: a sparse matrix between the singular vectors of a weight trains.

    ``W = U S V^T``, ``W' = U (S + M) V^T``, M (m, m), m = min(out, in), zero but for a pattern:
    "plain" (the diagonal), "banded" (the diagonal and `band` neighbours on either side of it),
    "random" (the diagonal and as many others as banded has, drawn from `seed`), "aligned" (as many
    as banded has, where ``|<u_i, v_j>|`` is largest; of square matrices alone, others are refused).
    Realised as ``W + U M V^T``: the base is left alone. (The authors compare without the absolute
    value, which depends on the signs that a decomposition happens to give.)

    Start: M = 0: the pre-trained function exactly. Trains m, or m (2 band + 1) - band (band + 1).
    Kept for backward: x V (m numbers per token), not x. The frozen factors take (in + out) m
    numbers, more than W, in memory and in the file. Merges exactly. No weight decay.
    """

    paper: ClassVar[str] = ("SVFT: Parameter-Efficient Fine-Tuning with Singular Vectors (2024), "
                            "arXiv:2405.19597")
    tier: ClassVar[str] = "checked against an independent equation"
    keeps_input: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})

    pattern: Literal["plain", "banded", "random", "aligned"] = setting(
        "banded", "which entries of M train", other=("plain", "random"))
    band: int = setting(2, "neighbours of the diagonal on either side", alias=("off_diag",),
                        other=(1,))
    seed: int = setting(0, "of the random pattern", beside={"pattern": "random"})

    def __post_init__(self) -> None:
        if self.band < 1:
            raise RecipeError(f"svft: band={self.band}: expected at least 1; pattern='plain' is "
                              "the diagonal alone")
        dead = {"band": self.pattern == "plain", "seed": self.pattern != "random"}
        if idle := [n for n, unread in dead.items() if unread and n in self.changed()]:
            raise RecipeError(f"svft: {idle[0]} does nothing beside pattern={self.pattern!r}")

    def index(self, place: Place) -> Tensor:
        """Flat positions in M, ascending; as many, where the weight says which."""
        m = self.width(place)
        at = torch.arange(m)
        if self.pattern == "aligned":
            return torch.arange(self.count(place))
        if self.pattern == "random":
            others = drawn(m * (m - 1), self.count(place) - m, self.seed, place.name)
            rows, cols = others // (m - 1), others % (m - 1)
            return torch.cat([at * (m + 1), rows * m + cols + (cols >= rows)]).sort().values
        reach = min(self.band, m - 1) if self.pattern == "banded" else 0
        lines = [at[max(0, -d) : m - max(0, d)] * (m + 1) + d for d in range(-reach, reach + 1)]
        return torch.cat(lines).sort().values

    @staticmethod
    def width(place: Place) -> int:
        """m."""
        return min(place.out, place.inp)

    def delta(self, site: Site) -> Between:
        place = site.place
        if self.pattern == "aligned" and place.out != place.inp:
            raise RecipeError(f"svft: pattern='aligned' compares u_i with v_j, and those of "
                              f"{place.name} ({place.out} x {place.inp}) differ in length; leave "
                              "it out of targets, or take another pattern")
        term = Patterned(place.out, place.inp, self.width(place), self.index(place))
        term.read(site, lambda W: torch.linalg.svd(W, full_matrices=False))
        if self.pattern == "aligned" and not site.blank:
            alike = (term.R @ term.L).abs().t().flatten()      # i * m + j: |<u_i, v_j>|
            term.index.copy_(alike.topk(term.index.numel()).indices.sort().values)
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward, and no input."""
        return self.width(place)

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        m = self.width(place)
        b = 0 if self.pattern == "plain" else min(self.band, m - 1)
        return m * (2 * b + 1) - b * (b + 1)
