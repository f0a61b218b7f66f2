from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....blocks.weight.provided import Wrap
from ....core.errors import RankError
from ....core.method import Method, setting
from ....core.site import Place, Site


class Guide(Wrap):
    """``W'_pq = W_pq (I + D_p) + D_p`` on blocks (r, r) of W; D: (out / r, r, r)."""

    def __init__(self, place: Place, rank: int):
        super().__init__()
        self.rank = rank
        self.D = nn.Parameter(torch.zeros(place.out // rank, rank, rank))

    def of(self, V: Tensor) -> Tensor:
        D, r = self.D.to(V.dtype), self.rank
        rows = V.reshape(len(D), -1, r)                   # of the blocks of p, (row, q) by column
        moved = torch.baddbmm(rows, rows, D).view(len(D), r, -1, r)
        return moved.add_(D.unsqueeze(2)).view(V.shape)


@dataclass(frozen=True, kw_only=True)
class Bone(Method):
    """Bone ("bat"): every block of the weight is turned and moved by the block of its row.

    W is cut into blocks (r, r), p counting rows of blocks and q columns; D (out / r, r, r):
    ``W'_pq = W_pq (I + D_p) + D_p``. A function of W whose update may have full rank; it acts on
    the dequantised weight and on what other parts add to it. ``dD_p = sum_q (W_pq^T + I) dW'_pq``.

    Start: D = 0: the pre-trained function exactly. Trains rank out per matrix. Merges exactly.
    Kept for backward: x; W' is formed anew in forward and in backward and lives in neither longer
    than its product. Its gradient is a third product beside LoRA's two: 1.4 to 1.5 times its step.
    rank must divide both sides of every target, else RankError. No weight decay on D. The later
    versions of the paper train MiSS instead (`miss`).
    """

    paper: ClassVar[str] = ("Bone: Block-Affine Adaptation of Large Language Models (2024), "
                            "arXiv:2409.15371")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "mha"})

    rank: int = setting(64, "side of a block", alias=("r",))

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Guide:
        place = site.place
        place.check_rank(self.rank, "bone")
        if place.out % self.rank or place.inp % self.rank:
            raise RankError(f"bone: blocks of {self.rank} do not tile {place.name} ({place.out} x "
                            f"{place.inp}); rank must divide both")
        term = Guide(place, self.rank)
        term.D.burnish_decay = False
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.rank * place.out
