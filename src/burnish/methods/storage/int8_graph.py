from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...blocks.choose.inputs import Ranges
from ...blocks.choose.observe import Statistic
from ...blocks.weight.integer import Grid, Int8Provider, grid_of
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Int8Graph(Method):
    """The int8 graph of training in 256 KB: layers in whole numbers, as microcontrollers run them.

        y = clip(round(e (round(conv(x - z_x, W) + b))) + z_y)       e = s_x s_W / s_y

    W, x and y of 8 bits (clip: to [-128, 127]), b and sums of 32; s_W one per output,
    ``max|W_o| / 127``; s_x, z_x, s_y, z_y one per layer, of the smallest and largest numbers that
    calibration data show there (``tune(..., calibration=batches)``).

    Computed in real units, ``w = s_W W``, ``x = s_x (x - z_x)``: the same numbers. What trains on
    top (`sparse_update`, biases, a LoRA) is in real units too. So no scaling of gradients is
    needed: QAS, ``G_W / s_W^2`` and ``G_b / (s_W s_x)^2`` for integers, is there to make their SGD
    step the real one, and here it is.

    Backward goes straight through the rounding, and is zero where a number was clipped: one bit a
    number is kept for it. A frozen layer keeps nothing besides, convolutions too.

    Holds: 8 bits per weight, and a scale per output. Trains: nothing. Step 0 is the graph of whole
    numbers, whatever adapter is active. Files have the grids: a load needs no data.

    Departures: what stands between the layers (norms, activations, sums of residuals) runs in real
    numbers, and each layer reads on a grid of its own; batch norms are not folded in. The head
    stays as it is. No merge: a plain module has no grids.
    """

    paper: ClassVar[str] = "On-Device Training Under 256KB Memory, NeurIPS 2022, arXiv:2206.15472"
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv"})

    samples: int = setting(128, "samples to read", other=(1,))

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(f"int8_graph: samples={self.samples}: expected at least 1")

    def observe(self, place: Place) -> Ranges | None:
        return None if place.role == "head" else Ranges()

    def settle(self, seen: Mapping[Place, Statistic]) -> Mapping[Place, dict[str, Any]]:
        return {p: {"reads": s.read.tolist(), "gives": s.given.tolist()}
                for p, s in seen.items() if isinstance(s, Ranges)}

    def storage(self, site: Site) -> Int8Provider | None:
        if site.place.role == "head":
            return None

        def grid(which: str) -> Grid:
            said = site.settled.get(which)
            return grid_of(*said) if said else Grid(1.0, 0)      # nothing has values

        return Int8Provider(site.weight, site.place, grid("reads"), grid("gives"))

    def claims(self) -> tuple[str, ...]:
        return ("the grid of the stored weights",)
