from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.gates import Affine
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Place

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

_INNER = ("fc2", "down")


@dataclass(frozen=True, kw_only=True)
class Ia3(Method):
    """(IA)^3: keys, values and the inner MLP state are scaled by learned vectors.

    ``K <- l_k * K``, ``V <- l_v * V`` (self- and cross-attention), and ``l_ff`` scales what enters
    the MLP's last matrix: ``W_2 (l_ff * act(.))``. Rows of a fused qkv are scaled in place.

    Start: ones, the pre-trained function exactly. Trains one number per channel: per block twice
    the width of the keys and the inner width. Kept for backward: the three states before scaling,
    from which the scaled ones are made again where attention wants them. Merges exactly: l_k and
    l_v into rows (and biases) of their projections, l_ff into columns of the last matrix.

    Weight decay would pull the vectors to zero; they are left out of it. `targets` names other
    places: what is named as fc2 or down is scaled at its input, everything else at its output;
    ``at="input"`` or ``at="output"`` says it for all that are named.
    Refused where keys and values are not the output of a module (``nn.MultiheadAttention``, qkv
    interleaved head by head); experts held in one 3-D parameter have no inner state to scale. The
    losses that T-Few adds (unlikelihood, length-normalised) are no part of it.
    """

    paper: ClassVar[str] = ("Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than "
                            "In-Context Learning (2022), arXiv:2205.05638")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"scalable states"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    inner: bool = setting(True, "scale the inner state of the MLP too")
    at: Literal["auto", "input", "output"] = setting(
        "auto", "the side of named targets that is scaled", unseen="it is of targets that are "
        "named: tests/methods/test_ia3.py")

    def __post_init__(self) -> None:
        if self.at != "auto" and self.targets is None:
            raise RecipeError(f"ia3(at={self.at!r}) is about targets that are named; give "
                              "ia3(targets='...'), or leave it out")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        outputs: dict[str, list[Place]] = {}
        made = False
        for place in self._places(anatomy):
            if place.kind not in self.kinds or place.param != "weight":
                raise RecipeError(f"ia3: {place.name} is read by its module without a call, so "
                                  "its output cannot be scaled; use a delta such as lora there")
            if self.at == "input" or self.at == "auto" and place.role in _INNER:
                if place.rows:
                    raise RecipeError(f"ia3(at='input'): {place.name} is some rows of a fused "
                                      "weight, which all read one input; name it whole")
                made = True
                yield Branch(place.path, Affine(place.inp, side="input"), compose="replace",
                             at="input")
            else:
                outputs.setdefault(place.path, []).append(place)
        for path, places in outputs.items():
            made = True
            whole = next(p for p in anatomy.places if p.path == path and p.param == "weight")
            rows = tuple(sorted(p.rows for p in places if p.rows)) or None
            yield Branch(path, Affine(whole.out, rows=rows), compose="replace")
        if not made:
            raise RecipeError("ia3: this model has neither keys and values nor an MLP to scale; "
                              "name places with ia3(targets='...') or use ssf")

    def _places(self, anatomy: Anatomy) -> Iterator[Place]:
        if (asked := wanted(anatomy, self)) is not None:
            yield from asked
            return
        for place in anatomy.places:
            if place.block is None:
                continue
            base = place.role.removeprefix("cross_")
            if base in ("k", "v") or base in _INNER and self.inner and place.kind in self.kinds:
                yield place
            elif base in ("qkv", "kv"):
                parts = [s for s in anatomy.slices(place)
                         if s.role.removeprefix("cross_") in ("k", "v")]
                if not parts:
                    raise RecipeError(f"ia3: {place.name} interleaves keys and values with "
                                      "queries; name what to scale with ia3(targets='...')")
                yield from parts

    @staticmethod
    def count(keys: int, inner: int) -> int:
        """Trainable parameters of one block with keys and an inner state of these widths."""
        return 2 * keys + inner
