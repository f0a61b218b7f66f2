"""What the methods of this folder share that put zeros into frozen weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...blocks.choose.prune import kept, pattern
from ...core.errors import RecipeError, TargetError
from ...core.method import Method, setting
from ...core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Pruning(Method):
    """A share of the entries of every frozen weight is zero, the lowest by a score."""

    identity: ClassVar[bool] = False

    ratio: float = setting(0.5, "share of the entries that are taken out, rounded down")
    mask: str = setting("row", "which entries compete: those of a 'row' (of one output), of the "
                               "'matrix', or '2:4': so many stay of each run of inputs",
                        other=("2:4",))

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise RecipeError(f"{self.name}: ratio={self.ratio}: expected above 0 and below 1")
        if pattern(self.mask) and "ratio" in self.changed():
            raise RecipeError(f"{self.name}: ratio does nothing beside mask={self.mask!r}, which "
                              "says itself how many stay")

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights",)

    def fits(self, place: Place) -> None:
        """TargetError where runs of inputs do not tile a weight."""
        parts = pattern(self.mask)
        if parts is not None and place.inp % parts[1]:
            raise TargetError(f"{self.name}: runs of {parts[1]} inputs do not tile {place.name}, "
                              f"which has {place.inp}; leave it out of targets")

    def keep(self, score: Tensor, site: Site) -> Tensor:
        """The mask of a weight as its module stores it, by a score (out, in) of its entries."""
        self.fits(site.place)
        return site.place.unview(kept(score, self.mask, self.ratio), site.weight)
