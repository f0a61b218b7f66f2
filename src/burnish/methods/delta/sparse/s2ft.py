from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ....blocks.choose import masks
from ....blocks.choose.observe import Gradient
from ....blocks.weight.slices import Slice
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class S2ft(Method):
    """S2FT: whole channels of a matrix train, as dense slices.

    ``y = x W^T + x[:, at] V^T``, V (out, k) on the k input channels `at`; with ``rows=True``
    ``y[:, at] += x V^T``, V (k, in) on output channels. ``dV = g^T x[:, at]``.

    mask: "random" draws `density` of all channels of all targets together, so that matrices have
    more and less; "weight" and "gradient" take in each matrix the channels of the largest norm of
    W, or of dL/dW over `samples` calibration samples. Published: ``s2ft(targets="down")``,
    LLaMA-7B 43,282,432.

    Start: V = 0, the pre-trained function exactly. Trains k out (k in) per matrix; rank(Delta) <=
    k. Kept for backward: x[:, at], `density` of the input; of rows the input. Merges exactly.

    Departures: nothing is permuted. The authors bring chosen channels together by turning coupled
    matrices, which changes no function; here the k columns are gathered, and a file holds where
    they are. So channels of attention need not go by heads either, and coupled matrices choose by
    themselves. Not offered of their choices: by activations, by products, the smallest.
    """

    paper: ClassVar[str] = "S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by " \
                           "Structured Sparsity, NeurIPS 2024"
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    keeps_input: ClassVar[bool] = False
    small: ClassVar[dict[str, float]] = {"density": 0.25}

    density: float = setting(0.03, "share of the channels that train")
    rows: bool = setting(False, "output channels instead of input channels")
    mask: Literal["random", "weight", "gradient"] = setting("random", "which channels")
    seed: int = setting(0, "of the random channels")
    samples: int = setting(128, "samples to read for the gradient", other=(1,),
                           beside={"mask": "gradient"})

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1 or self.samples < 1:
            raise RecipeError("s2ft: density is in (0, 1] and samples at least 1, got "
                              f"{self.density} and {self.samples}")
        dead = {"seed": self.mask != "random", "samples": self.mask != "gradient"}
        if idle := [n for n, unread in dead.items() if unread and n in self.changed()]:
            raise RecipeError(f"s2ft: {idle[0]} does nothing beside mask={self.mask!r}")

    def repeats(self) -> int | None:
        """Random channels are drawn over all matrices."""
        return None if self.mask == "random" else 1

    def observe(self, place: Place) -> Gradient | None:
        return Gradient(place.out, place.inp) if self.mask == "gradient" else None

    def channels(self, place: Place) -> int:
        return place.out if self.rows else place.inp

    def delta(self, site: Site) -> Slice | None:
        at = self._drawn(site) if self.mask == "random" else self._largest(site)
        return Slice(site.place, at.to(site.weight.device), self.rows) if at.numel() else None

    def _drawn(self, site: Site) -> Tensor:
        """This matrix' part of a draw over all of them."""
        sizes = [self.channels(p) for p in site.places]
        parts = masks.drawn_over(sizes, max(1, int(sum(sizes) * self.density)), self.seed, "s2ft")
        return parts[site.places.index(site.place)]

    def _largest(self, site: Site) -> Tensor:
        k = self._many(site.place, None)
        if self.mask == "gradient" and site.seen is None:    # a file brings it
            return torch.arange(k)
        W = site.weight.detach() if self.mask == "weight" else site.seen.value
        return W.float().norm(dim=1 if self.rows else 0).topk(k).indices

    def per_token(self, place: Place, channels: int | None = None) -> int:
        """Numbers kept per token; of rows besides the input."""
        return 0 if self.rows else self._many(place, channels)

    def count(self, place: Place, channels: int | None = None) -> int:
        """Trainable parameters on one matrix; channels: how many it has of the draw."""
        return self._many(place, channels) * (place.inp if self.rows else place.out)

    def _many(self, place: Place, channels: int | None) -> int:
        return max(1, int(self.channels(place) * self.density)) if channels is None else channels
