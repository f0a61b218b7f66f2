from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....blocks.choose.masks import as_torch, drawn
from ....blocks.weight.wavelets import FAMILIES, Wavelets
from ....core.errors import RankError, RecipeError, nearest
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Waveft(Method):
    """WaveFT: a few coefficients of the update's wavelet transform.

    ``W' = W + alpha IDWT2(C)``, C zero but for n coefficients that train: one level of the
    transform of orthonormal wavelets (`wavelet`: "db1", Haar's, to "db10", "sym2" to "sym10",
    "coif1" to "coif3"), along outputs and inputs. A coefficient adds an outer product of two short
    wavelets, L of the outputs by L of the inputs (L = 2 for Haar). wavelet="none": single entries,
    which the paper finds worse. C is as large as the transform needs (L - 2 rows and columns more
    than W); the places are drawn in the middle of it, where W's size fits.

    The positions are drawn once from `seed` and are the same for all matrices of one shape.
    positions: "portable", a permutation that takes n numbers and is the same everywhere, or
    "torch", the first n of ``torch.randperm(out in)`` on the host (8 out in bytes for a moment), as
    PEFT draws them: its folders need that. As there, the halves of a detail band are read crosswise
    (see blocks/weight/wavelets.py), which the random places make all one.

    Start: C = 0: the pre-trained function exactly; `std` above 0 draws C from N(0, std^2), which is
    not. Trains n per matrix, whatever its size. Kept for backward: x; the update is made again,
    panel by panel. The file holds C alone; a load draws the positions again. Merges exactly. No
    weight decay.
    """

    paper: ClassVar[str] = ("Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets "
                            "(2025), arXiv:2505.12532")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, float]] = {"n": 40, "alpha": 2.0}

    n: int = setting(2592, "coefficients per matrix", alias=("n_frequency",))
    alpha: float = setting(25.0, "scale of the update", alias=("scaling",))
    wavelet: str = setting("db1", "family of the transform, or none",
                           alias=("wavelet_family",), other=("sym4",))
    std: float = setting(0.0, "deviation of the coefficients at the start")
    seed: int = setting(777, "of the positions", alias=("random_loc_seed",))
    positions: Literal["portable", "torch"] = setting("portable", "how they are drawn")

    def __post_init__(self) -> None:
        if self.n < 1:
            raise RecipeError(f"waveft: n={self.n}: expected at least 1")
        if self.std < 0:
            raise RecipeError(f"waveft: std={self.std}: expected a deviation, from 0")
        if self.wavelet not in FAMILIES:
            raise RecipeError(f"waveft: wavelet={self.wavelet!r} is no family known here"
                              f"{nearest(self.wavelet, FAMILIES)}; they are db1 to db10, sym2 to "
                              "sym10, coif1 to coif3 and none")

    def delta(self, site: Site) -> Wavelets:
        place = site.place
        out, inp = place.out, place.inp
        if self.n > out * inp:
            raise RankError(f"waveft: n={self.n} coefficients, {place.name} has {out * inp} "
                            "entries")
        index = drawn(out * inp, self.n, self.seed, f"{out}x{inp}") \
            if self.positions == "portable" else as_torch(out * inp, self.n, self.seed)
        return Wavelets(out, inp, index.to(site.weight.device), self.alpha, self.wavelet, self.std)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.n
