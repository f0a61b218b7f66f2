from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.another import beside
from ...blocks.weight.keyed import Mixed
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.keys import Key
from ...core.method import Method, setting
from ...core.needs import qkv_linears
from ...core.recipe import make
from ...core.site import Branch, Place
from ..branch._sites import samples_first
from ..delta.lowrank.lora import check_dropout
from ._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class PetalFace(Method):
    """PETALface: two LoRAs on every projection of queries, keys and values, mixed by how good the
    picture is.

    ``y = W x + b + s drop(B_1 A_1 (1 - a) x) + s drop(B_2 A_2 a x)``, a = 1/2 + q - middle, cut to
    [0, 1], one for a sample in all layers. A (2, rank, in), B (2, out, rank). The batch names
    ``quality``, q from 0 to 1 (1: the best): the score of a quality measure, oriented and brought
    to that range once for the data set; `middle` is what its pictures have in the middle. The
    measure itself is no part of this.

    Departures: a is cut (raw scores reach far beyond, and some are the lower the better). The
    paper's LoRA on the last linear of features is a part of its own: ``petalface + lora(targets=
    "...")``, with the margin loss as the task's. (rank 8 and s = 1 are unconfirmed.)

    Start: A normal of deviation 1 / rank, B = 0: the pre-trained function exactly, for every a.
    Trains 2 rank (in + out) per matrix. Kept for backward: x; the rest is made again there. Not
    mergeable (it follows the sample); :meth:`lifecycle` makes one quality a ``lora`` of twice the
    rank, which merges. No weight decay. `targets` names other linears.
    """

    paper: ClassVar[str] = ("PETALface: Parameter Efficient Transfer Learning for Low-resolution "
                            "Face Recognition (2024), arXiv:2412.07771")
    needs: ClassVar[frozenset[str]] = frozenset({"queries"})
    context: ClassVar[Mapping[str, Key]] = {
        "quality": Key("how good each sample is, 1 the best", real=True)}
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False

    rank: int = setting(8, "rank of each of the two", alias=("r",))
    scale: float = setting(1.0, "s, what both are multiplied by")
    dropout: float = setting(0.1, "dropout on what each of them gives", alias=("lora_dropout",))
    middle: float = setting(0.5, "quality at which both count alike")

    def __post_init__(self) -> None:
        check_dropout("petalface", self.dropout)
        if not 0 <= self.middle <= 1:
            raise RecipeError(f"petalface(middle={self.middle}): a quality, from 0 to 1")

    def mixture(self, anatomy: Anatomy) -> Iterable[Branch]:
        samples_first(anatomy, self)
        asked = wanted(anatomy, self)
        places = qkv_linears(anatomy) if asked is None else asked
        for place, rows, out in linears(anatomy, self, places, anywhere=True, samples=True,
                                        rank=self.rank):
            yield Branch(place.path, Mixed(
                "quality", place.inp, out, 2, self.rank, scale=self.scale, dropout=self.dropout,
                deviation=1 / self.rank, rows=rows, middle=self.middle),
                read=(place.path, "input"))

    def lifecycle(self, tuned: Any, quality: float, name: str) -> None:
        """Settle one quality: an adapter `name` beside the one in use (which must train this
        method), with a ``lora`` for it, and use that. It reads no key, merges and trains on.
        Raises RecipeError for a number that is no quality."""
        if not (0 <= quality <= 1 and math.isfinite(quality)):
            raise RecipeError(f"petalface reads qualities from 0 to 1, not {quality}")
        made = {path: m.plain(quality) for path, m in tuned.branches(Mixed)}
        rank = max(len(t["A"]) for t in made.values())
        plain = make("lora", {"rank": rank, "alpha": float(rank), "targets": list(made)})
        beside(tuned, self, name, [(plain, made)])

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        return 2 * self.rank * (place.inp + place.out)
