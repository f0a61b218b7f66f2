from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.state.gates import Shift
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Place

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Beft(Method):
    """BEFT: a bias is added to the values of every attention, and nothing else trains.

    ``V <- V + s b_v`` (self- and cross-attention), b_v (out,) beside the bias that the projection
    has or has not; of a fused qkv its rows for values; s is `scale`, 1 as published. (The paper
    finds b_v to bring more than b_q or b_k with few samples; where a model has biases, `bitfit`
    trains them in place.)

    Start: b_v = 0: the pre-trained function exactly. Trains one number per channel of the values,
    9,216 on BERT-base. Kept for backward: nothing. Merges exactly, into the bias of the projection,
    which gets one where it can have one. No weight decay. `targets` names other linears: with
    those of a ``lora`` and its scale it is the bias of that update (PEFT's `lora_bias`),
    ``lora(rank=8, alpha=16, targets="q") + beft(targets="q", scale=2.0)``.
    Refused where values are not the output of a module (``nn.MultiheadAttention``, qkv interleaved
    head by head).
    """

    paper: ClassVar[str] = ("BEFT: Bias-Efficient Fine-Tuning of Language Models (2025), "
                            "arXiv:2509.15974")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"queries", "scalable states"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})

    scale: float = setting(1.0, "s, what a bias is multiplied by")

    def __post_init__(self) -> None:
        if not self.scale:
            raise RecipeError(f"beft(scale={self.scale}): a number other than 0 is expected")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        outputs: dict[str, list[tuple[int, int]]] = {}
        for place in self._places(anatomy):
            if place.kind not in self.kinds or place.param != "weight":
                raise RecipeError(f"beft: {place.name} is read by its module without a call, so "
                                  "nothing can be added to its output; use a delta such as lora")
            outputs.setdefault(place.path, []).append(place.rows or (0, place.out))
        for path, rows in outputs.items():
            yield Branch(path, Shift(tuple(sorted(rows)), self.scale), compose="replace")

    def _places(self, anatomy: Anatomy) -> Iterator[Place]:
        if (asked := wanted(anatomy, self)) is not None:
            yield from asked
            return
        for place in anatomy.places:
            base = place.role.removeprefix("cross_")
            if place.block is None or base not in ("v", "qkv", "kv"):
                continue
            parts = [place] if base == "v" else [
                s for s in anatomy.slices(place) if s.role.removeprefix("cross_") == "v"]
            if not parts:
                raise RecipeError(f"beft: {place.name} interleaves values with queries and keys; "
                                  "name what gets a bias with beft(targets='...')")
            yield from parts

    @staticmethod
    def count(values: int) -> int:
        """Trainable parameters of one attention with values of this width."""
        return values
