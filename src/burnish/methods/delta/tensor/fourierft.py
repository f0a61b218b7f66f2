from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ....blocks.choose.masks import as_torch, drawn
from ....blocks.weight.cosines import Cosines
from ....core.errors import RankError, RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class Fourierft(Method):
    """FourierFT: a few coefficients of the update's two-dimensional Fourier transform.

    ``W' = W + alpha Re IDFT2(F)``, F (out, in) zero but for ``F[u_k, v_k] = c_k``, k = 1..n, the
    inverse transform with its 1 / (out in):
    ``Delta[o, i] = alpha / (out in) sum_k c_k cos(2 pi (u_k o / out + v_k i / in))``.
    The positions are drawn once from `seed` and are the same for all matrices of one shape; the c_k
    train. positions: "portable", a permutation that takes n numbers and is the same everywhere, or
    "torch", the first n of ``torch.randperm(out in)`` on the host (8 out in bytes for a moment), as
    PEFT draws them: its folders need that.

    Start: c ~ N(0, 1), so step 0 is *not* the pre-trained function (the factor makes it nearly
    so); ``zero=True`` starts at c = 0, which is. Trains n per matrix, whatever its size. Kept for
    backward: x; the update is made again, panel by panel. The file holds c alone; a load draws the
    positions again. Merges exactly. No weight decay.
    """

    paper: ClassVar[str] = ("Parameter-Efficient Fine-Tuning with Discrete Fourier Transform "
                            "(2024), arXiv:2405.03003")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, float]] = {"n": 40, "alpha": 8.0}

    n: int = setting(1000, "coefficients per matrix", alias=("n_frequency",))
    alpha: float = setting(150.0, "scale of the update", alias=("scaling",))
    zero: bool = setting(False, "start at c = 0, the pre-trained function", alias=("init_weights",))
    seed: int = setting(777, "of the positions", alias=("random_loc_seed",))
    positions: Literal["portable", "torch"] = setting("portable", "how they are drawn")

    def __post_init__(self) -> None:
        if self.n < 1:
            raise RecipeError(f"fourierft: n={self.n}: expected at least 1")

    def delta(self, site: Site) -> Cosines:
        place = site.place
        out, inp = place.out, place.inp
        if self.n > out * inp:
            raise RankError(f"fourierft: n={self.n} coefficients, {place.name} has {out * inp} "
                            "entries")
        index = drawn(out * inp, self.n, self.seed, f"{out}x{inp}") \
            if self.positions == "portable" else as_torch(out * inp, self.n, self.seed)
        return Cosines(out, inp, index.to(site.weight.device), self.alpha,
                       0.0 if self.zero else 1.0)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.n
