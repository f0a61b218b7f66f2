"""A product of two factors that answer in a few bits: trained (latent.py), or as a file has them.

    Delta = s Q(B) Q(A)
"""

from __future__ import annotations

from torch import Tensor

from ...core.site import Place
from .latent import Latent, Stored
from .paired import Paired


class BitPair(Paired):
    """A (rank, in), B (out, rank). stored: codes of a file, which do not train."""

    def __init__(self, place: Place, rank: int, bits: int, scale: float, stored: bool = False):
        super().__init__()
        self.scale = scale
        self.A = Stored(rank, place.inp, bits) if stored else Latent(rank, place.inp, bits)
        self.B = Stored(place.out, rank, bits) if stored else \
            Latent(place.out, rank, bits, std=1e-3)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.A.matrix(), self.B.matrix() * self.scale
