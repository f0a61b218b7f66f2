from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.heads import Around
from ...core.asked import wanted
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import mlp_linears
from ...core.site import Branch, Place
from ..delta.lowrank.lora import check_dropout
from ..mixture._linears import linears

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy

_GATED, _LAST = ("gate", "up", "gate_up"), ("fc2", "down")


@dataclass(frozen=True, kw_only=True)
class LlmAdapters(Method):
    """LLM-Adapters: a bottleneck around a linear, beside it or behind it.

    ``y = W x + s W_up act(W_down x)``, W_down (r, in), W_up (out, r), r = `bottleneck`
    (``mode="parallel"``): by default around gate and up of every MLP, around both of its matrices
    where nothing is gated. Or ``h = W x, h <- h + s W_up act(W_down h)``, both r by `out`
    (``mode="series"``): by default behind the last matrix of every MLP, before the residual.
    `targets` names other linears, or rows of fused ones, each with a bottleneck of its own.
    (`parallel` stands beside the whole MLP. Which two matrices the paper's parallel run took, and
    the start, are unconfirmed.)

    Start: W_up = 0: the pre-trained function exactly. Trains r (in + out) per matrix beside, 2 r
    out behind: LLaMA-7B 247,463,936 and 67,108,864; with ``bias=True`` r + out more. Kept for
    backward: r numbers per token beside, out + r behind. Not mergeable. tanh saturates in bf16.
    """

    paper: ClassVar[str] = ("LLM-Adapters: An Adapter Family for Parameter-Efficient Fine-Tuning "
                            "of Large Language Models (2023), arXiv:2304.01933")
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp linears"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d"})
    merges: ClassVar[bool] = False

    bottleneck: int = setting(256, "r, width of the bottleneck", alias=("bottleneck_size",))
    mode: Literal["parallel", "series"] = setting("parallel", "beside a linear, or behind it")
    act: str = setting("tanh", "activation inside", alias=("non_linearity",), other=("relu",))
    scale: float = setting(1.0, "s, what the bottleneck's result is multiplied by")
    dropout: float = setting(0.0, "dropout on the activation")
    bias: bool = setting(False, "give every factor a bias")

    def __post_init__(self) -> None:
        check_dropout("llm_adapters", self.dropout)
        if self.bottleneck < 1:
            raise RecipeError(f"llm_adapters(bottleneck={self.bottleneck}): expected at least 1")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        of: Literal["input", "output"] = "input" if self.mode == "parallel" else "output"
        asked = wanted(anatomy, self)
        for one in self._places(anatomy) if asked is None else asked:
            for place, rows, out in linears(anatomy, self, [one], anywhere=True):
                made = Around(place.inp, out, self.bottleneck, of=of, rows=rows, act=self.act,
                              scale=self.scale, dropout=self.dropout, bias=self.bias)
                yield Branch(place.path, made, read=(place.path, of))

    def _places(self, anatomy: Anatomy) -> Iterator[Place]:
        found = mlp_linears(anatomy)
        gated = {p.block for p in found if p.role in ("gate", "gate_up")}
        for place in found:
            if self.mode == "series":
                mine = place.role in _LAST
            else:
                mine = place.role in _GATED or place.block not in gated
            if mine:
                yield from anatomy.slices(place) or (place,)

    def count(self, place: Place) -> int:
        """Trainable parameters around one matrix."""
        d = place.inp if self.mode == "parallel" else place.out
        return self.bottleneck * (d + place.out) + self.bias * (self.bottleneck + place.out)
