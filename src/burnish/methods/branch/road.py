from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.state.planes import Planes
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Place
from ...core.targets import match

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Road(Method):
    """RoAd: what a linear returns is turned and scaled, two channels at a time.

    ``z = W x + b``; for each pair (i, j) of outputs ``z_i <- a_i cos(t_i) z_i - a_i sin(t_i) z_j``,
    ``z_j <- a_j sin(t_j) z_i + a_j cos(t_j) z_j``. own=1: the two share one t and one a (a rotation
    and a length); 2: a t and an a for each output; 4: for each of the four entries. Pairs stand
    half a block apart: the k-th of the first `block` / 2 outputs with the k-th of the next (as
    PEFT's group_size; block=2 pairs neighbours, as the paper writes it).

    Start: t = 0, a = 1: the pre-trained function exactly. Trains own * out numbers per matrix (1:
    out / 2 angles, out / 2 lengths). Kept for backward: z. Merges exactly, into rows of W and b.
    No weight decay. Cost: four products and two sums an output, twice that in backward; no
    product of matrices. Rows of a fused weight are turned in place.

    Where attention reads a weight without calling its module there is nothing to turn: refused.
    """

    paper: ClassVar[str] = ("3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient "
                            "Batching and Composability (2024), arXiv:2409.00119")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"linears"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    small: ClassVar[dict[str, int]] = {"block": 8}

    own: int = setting(1, "angles and lengths: 1 of a pair, 2 of an output, 4 of an entry",
                       other=(2, 4))
    block: int = setting(64, "outputs in whose halves the pairs stand", alias=("group_size",))

    def __post_init__(self) -> None:
        if self.own not in (1, 2, 4):
            raise RecipeError(f"road: own={self.own}: expected 1, 2 or 4")
        if self.block < 2 or self.block % 2:
            raise RecipeError(f"road: block={self.block}: an even number from 2 is expected")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        by_path: dict[str, list[Place]] = {}
        asked = wanted(anatomy, self)
        for place in match(anatomy) if asked is None else asked:
            if place.kind in self.kinds and place.param == "weight":
                by_path.setdefault(place.path, []).append(place)
            elif asked is not None:
                raise RecipeError(f"road: {place.name} (kind {place.kind}) is no linear that its "
                                  "module calls, so its output cannot be turned; use a delta such "
                                  "as oft there")
        for path, places in by_path.items():
            for place in places:
                if place.out % self.block:
                    fits = [b for b in (2, 4, 8, 16, 32, 64) if place.out % b == 0]
                    raise RecipeError(f"road: block={self.block} does not divide the {place.out} "
                                      f"outputs of {place.name}; "
                                      f"{', '.join(map(str, fits)) or 'none'} would")
            whole = next(p for p in anatomy.places if p.path == path and p.param == "weight")
            rows = tuple(sorted(p.rows for p in places if p.rows)) or None
            yield Branch(path, Planes(whole.out, self.block, self.own, rows), compose="replace")

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return self.own * place.out
