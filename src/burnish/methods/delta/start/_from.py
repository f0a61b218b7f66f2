"""What the methods share whose update begins with something other than nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....blocks.weight.start import LessStart, begin
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Starting(Method):
    """``W' = W + s (B A - B0 A0)`` with A0, B0 of :meth:`start`; s = alpha / rank, 1 by default."""

    rank: int
    alpha: float | None = setting(None, "numerator of the scale; None means rank (s = 1)",
                                  other=(8.0,))

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def start(self, W: Tensor, seen: Any, rank: int, s: float) -> tuple[Tensor, Tensor]:
        """(A0, B0) of a weight (out, in) and of what the data showed there."""
        raise NotImplementedError

    def delta(self, site: Site) -> LessStart:
        site.place.check_rank(self.rank, self.name)
        return begin(LessStart(site.place, self.rank, self.scale), site, self.start)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * (place.out + place.inp)
