from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ....blocks.weight.bits import BitPair
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site


@dataclass(frozen=True, kw_only=True)
class BiLora(Method):
    """Bi-LoRA: LoRA whose factors answer at one bit an entry.

    ``y = x W^T + b + s x A^T B^T``, A = Q(latent (rank, in)), B = Q(latent (out, rank)): ``Q(W) =
    sigma q + m``, m and sigma the latent matrix's mean and deviation, q the nearest of 2^bits
    levels (+-0.6745 at one bit) to ``(W - m) / sigma``. The gradient passes q as if it were the
    identity, and m and sigma as what they are.

    Start: latent of A uniform in +-1/sqrt(in), of B normal of deviation 1e-3 cut at two (sigma = 0
    has no scale): near the pre-trained function. Trains rank (in + out) per matrix, in fp32; the
    file that ``tuned.save`` writes holds `bits` bits of each and two numbers a factor;
    ``whole=True`` what trains, to go on. Kept for backward: x, rank per token; the factors are made
    again. Merges exactly: ``W + s B A``.
    """

    paper: ClassVar[str] = ("Revisiting the Parameter Efficiency of Adapters from the Perspective "
                            "of Precision Redundancy, ICCV 2023, arXiv:2307.16867")
    tier: ClassVar[str] = "checked against an independent equation"
    identity: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})

    rank: int = setting(32, "of the update", alias=("r", "h"))
    bits: Literal[1, 2, 4] = setting(1, "of an entry that answers")
    scale: float = setting(1.0, "s, from 0.01 to 100 in the paper")
    stored: bool = setting(False, "codes of a file, as training leaves them",
                           unseen="these come from a file: tests/methods/test_bi_lora.py")

    def finished(self) -> BiLora:
        return replace(self, stored=True)

    def delta(self, site: Site) -> BitPair:
        site.place.check_rank(self.rank, "bi_lora")
        if self.stored and not site.blank:
            raise RecipeError("bi_lora(stored=True) has the codes of a saved adapter; leave it out "
                              "to train new ones")
        return BitPair(site.place, self.rank, self.bits, self.scale, self.stored)

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return self.rank

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return 0 if self.stored else self.rank * (place.out + place.inp)
