from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ...blocks.state.routed import Routed
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import inner
from ._routed import divide, router

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.groups import Group
    from ...core.protocols import Attacher
    from ...core.site import Place


@dataclass(frozen=True, kw_only=True)
class RoutedFfn(Method):
    """SPT's routed FFN: each token takes a few of the runs that an MLP's inner channels fall into.

    ``p = sigmoid(W_r x + b_r)``, c_e = 2 p_e for the `k` largest of `experts` runs of F / experts
    channels; ``h_e = act(c_e (W1_e x + b1_e) + B1_e A1 x)`` (gate and up alike),
    ``y = sum_e (c_e W2_e h_e + B2 A2_e h_e) + b2``. The base's products are scaled, with the bias
    of the first; what LoRA adds beside it is not. c is the router's only gradient. All experts with
    c = 1 are the MLP itself.

    Start: W_r (experts, d) and b_r uniform within 1 / sqrt(d), so c is near 1: not the pre-trained
    function, of which k / experts answer. Trains experts (d + 1) per MLP.
    Of the base's products in an MLP k / experts are made; kept for backward are x and k / experts
    of the inner states. Not mergeable: what answers depends on the token.

    Beside it stand low-rank updates without dropout, on any of the MLP's linears; functions of
    their weights, branches there and weights that train whole are refused. MLPs with more between
    their linears than functions of single numbers are refused when they run.

    Departures: which experts take a token is decided in fp32. Data decide how large products are:
    a simulation has all experts take as many tokens.
    """

    paper: ClassVar[str] = ("SPT: Fine-Tuning Transformer-based Language Models Efficiently with "
                            "Sparsification (2023), arXiv:2312.10365")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"inner channels"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    shown_beside: ClassVar[str] = "lora(rank=4)"
    #: all of them: in half precision a token near a tie goes elsewhere, in so small a model too far
    small: ClassVar[Mapping[str, Any]] = {"k": 4}

    experts: int = setting(4, "runs of inner channels")
    k: int | None = setting(None, "experts of a token; None: half of them, a quarter where gated",
                            other=(2, 1))

    def __post_init__(self) -> None:
        if self.experts < 2 or self.k is not None and not 1 <= self.k <= self.experts:
            raise RecipeError(f"routed_ffn(experts={self.experts}, k={self.k}): expected at least "
                              "2 experts, and k from 1 to as many")

    def claims(self) -> tuple[str, ...]:
        return ("which inner channels of an MLP answer",)

    def branch(self, anatomy: Anatomy) -> Iterable[Experts]:
        found = inner(anatomy)
        if not found:
            raise RecipeError("routed_ffn needs MLPs of linears whose inner channels can be told, "
                              "and this model has none")
        return [Experts(self, g) for g in found]

    def taken(self, gated: bool) -> int:
        """k."""
        return self.k or max(1, self.experts // (4 if gated else 2))

    def count(self, d: int) -> int:
        """Trainable parameters of an MLP with inputs of this width."""
        return self.experts * (d + 1)


@dataclass(frozen=True)
class Experts:
    """The inner channels of one MLP are divided."""

    method: RoutedFfn
    group: Group

    def install(self, attacher: Attacher, part: Method) -> None:
        m, g = self.method, self.group

        def made(slot: Any, place: Place, first: bool) -> Routed:
            return Routed(attacher.state, attacher.adapter.name, slot, g.path, place == g.out,
                          m.taken(len(g.rows) > 1),
                          router(attacher, place, m.experts) if first else None)

        divide(attacher, part, g, m.experts, made)
