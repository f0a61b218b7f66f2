from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....blocks.weight.kernels import Flat, Polyadic
from ....blocks.weight.magnitude import Magnitude
from ....blocks.weight.term import Term
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Convlora(Method):
    """ConvLoRA, LoRA-C and CP-LoRA: kernels of convolutions by factors, with DoRA's lengths or not.

    A kernel is (out, in / g, k, k), g groups; s = alpha / rank.
    ``form="conv"`` (ConvLoRA): ``Delta = s reshape(B A)``, A (rank k, in k), B (out / g k, rank k).
    ``form="c"`` (LoRA-C): the same with A (rank, in / g k), B (out k, rank).
    ``form="cp"`` (CP-LoRA): ``Delta[o, i, u, v] = s sum_j a[o, j] b[j, i] c[j, u] e[j, v]``.
    ``dora=True`` (convDoRA, DoRA-C, CP-DoRA): ``W' = m * V / |V|``, V = W + Delta, m (out,),
    |V| over all that an output reads, a constant of the gradient.

    Kernels with other sides: A has the last, B the product of the others, and ConvLoRA's inner
    width is rank times the last (the published class is for squares alone; on them it is this one,
    numbers in the same order). Transposed convolutions are seen out first. Depthwise kernels are
    refused: they have one input per output, and no rank to lower.

    Start: B = 0 (a = 0), the others Kaiming-uniform, m the lengths of W: the pre-trained function
    exactly (with m to one rounding). Trains, for squares, rank k^2 (in + out / g), rank k (in / g +
    out), rank (out + in / g + 2 k), and out with `dora`: 36,864, 12,288, 4,144 at 256 x 256 x
    3 x 3 with rank 8. Any rank is taken: the paper finds ranks above the kernel's own to help.
    Kept for backward: nothing; the kernel is made again. Merges exactly. No weight decay.

    Of CP the paper does not say which factor is zero, and of LoRA-C it gives no shapes: these are
    the readings taken. Running statistics of norms are left to the recipe and the model's mode.
    """

    paper: ClassVar[str] = ("LoRA-based methods on Unet for transfer learning in Subarachnoid "
                            "Hematoma Segmentation (2025); LoRA (2021), "
                            "arXiv:2106.09685")
    tier: ClassVar[str] = "from the text"
    kinds: ClassVar[frozenset[str]] = frozenset({"conv"})

    rank: int = setting(8, "rank of the update", alias=("r",))
    alpha: float = setting(16.0, "numerator of the scale", alias=("lora_alpha",))
    form: Literal["conv", "c", "cp"] = setting("conv", "how a kernel is taken apart")
    dora: bool = setting(False, "lengths of outputs train too, as in DoRA", alias=("use_dora",))

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"convlora: rank={self.rank}: expected at least 1")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",) \
            if self.dora else ()

    def sizes(self, place: Place) -> tuple[int, int, int]:
        """Rows of B, columns of A, and their inner width."""
        last, channels = place.axes[-1], place.inp // place.kernel
        others = place.kernel // last
        if self.form == "conv":
            return (place.out // place.groups * others, channels * place.groups * last,
                    self.rank * last)
        return place.out * others, channels * last, self.rank

    def delta(self, site: Site) -> Term | tuple[Term, ...]:
        place = site.place
        if place.inp == place.kernel:
            raise RecipeError(f"convlora: {place.name} is depthwise (one input per output): there "
                              "is no rank to lower; leave it out of targets")
        scale = self.alpha / self.rank
        made: Term = Polyadic(place, self.rank, scale) if self.form == "cp" else \
            Flat(place, *self.sizes(place), scale)
        if not self.dora:
            return made
        length = Magnitude(site.weight)
        length.m.burnish_decay = False
        return made, length

    def count(self, place: Place) -> int:
        """Trainable parameters on one kernel."""
        lengths = place.out if self.dora else 0
        if self.form == "cp":
            return self.rank * (place.out + place.inp // place.kernel + sum(place.axes)) + lengths
        rows, columns, inner = self.sizes(place)
        return inner * (rows + columns) + lengths
