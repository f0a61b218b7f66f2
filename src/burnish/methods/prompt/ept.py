from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from ...blocks.state.generators import Fused
from ...blocks.state.prompts import Positioned
from ...core.errors import RecipeError
from ...core.method import setting
from .dept import Dept


@dataclass(frozen=True, kw_only=True)
class Ept(Dept):
    """EPT: a short prompt that has looked at the edit of the embeddings, seen in several spaces.

    As in `dept` P (length, d) stands before embeddings that T = A B (edited, d) is added to, and

        F = P + softmax((P Q)(T K)^T / sqrt(d)) T
        P* = sum_j g_j (F + (F U_j) V_j),   g = softmax(G mean(F))

    takes the place of P; Q and K (d, fusion), for each of the `spaces` U_j (d, space_rank), V_j
    (space_rank, d) and a row of G. Nothing here follows the input, so a finished file
    (``tuned.save``) holds P*, A and B alone, as of ``fusion=0, spaces=1``, which is `dept`; a
    checkpoint of a run holds all of it.

    Start: B, V and G zero, so P* = P: a prompt of this length. Trains what `dept` does and
    2 d fusion + spaces (2 d space_rank + d): with the defaults 76,800 at d = 768, as a prompt of
    100 rows. Kept for backward: as in `dept`, and a few times length d and edited d in all. All but
    P learns at `edit_rate`. Not mergeable.

    Unconfirmed: the equations are the best reading of the text; that one space stands for none,
    the sizes, and the rate of what makes P* are ours.
    """

    paper: ClassVar[str] = ("Efficient Prompt Tuning by Multi-Space Projection and Prompt Fusion "
                            "(2024)")
    tier: ClassVar[str] = "from the text"

    rank: int = setting(30, "rank of the edit")
    fusion: int = setting(4, "width in which prompt and edit are compared; 0: they are not")
    spaces: int = setting(4, "in which P is seen; 1: as it is")
    space_rank: int = setting(1, "rank of a space's map")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fusion < 0 or min(self.spaces, self.space_rank) < 1:
            raise RecipeError(f"ept(fusion={self.fusion}, spaces={self.spaces}, space_rank="
                              f"{self.space_rank}): expected a width of 0 or more, a space and a "
                              "rank of 1 or more")
        if self.spaces == 1 and self.space_rank != Ept.space_rank:
            raise RecipeError(f"ept: space_rank={self.space_rank} is of the spaces' maps, and "
                              "spaces=1 has none: leave one of them out")

    def beside(self, width: int) -> tuple[Positioned | None, nn.Module | None]:
        edit, _ = super().beside(width)
        if not self.fusion and self.spaces == 1:
            return edit, None
        maker = Fused(width, self.fusion, self.spaces, self.space_rank)
        for p in maker.parameters():
            p.burnish_lr = self.edit_rate                # type: ignore[attr-defined]
        return edit, maker

    def finished(self) -> Ept:
        return replace(self, fusion=0, spaces=1, space_rank=Ept.space_rank)

    def count(self, d: int) -> int:
        """Trainable parameters at embedding width d."""
        maps = self.spaces * (2 * self.space_rank + 1) if self.spaces > 1 else 0
        return super().count(d) + d * (2 * self.fusion + maps)
