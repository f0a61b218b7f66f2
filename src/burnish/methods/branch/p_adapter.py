from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.attending import open_attentions
from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.laplacian import LEAST, Attended, Messages
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import Site, attention_ends, found, mlp_ends

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy
    from ...core.protocols import Attacher, Installs


@dataclass(frozen=True, kw_only=True)
class PAdapter(Method):
    """p-Adapter: behind attention a bottleneck whose tokens send messages, more to those alike.

    An attention with probabilities A, values V and last projection O answers ``y = O(ctx)``. Of
    the heads of ``F = W_down O(V) + b`` (tokens, r / heads) the p-Laplacian makes

        Abar_ij = A_ij |sqrt(A_ij + e)(F_i - F_j) + e|^(p - 2),  e = 1e-8 for every component
        F'_i = a_i sum_j Abar_ij F_j + a_i (2 mu / p) F_i,  a_i = 1 / (sum_j Abar_ij + 2 mu / p)

    and ``y <- y + W_up (gelu(W_gate y + b') * F') + b''``; mu = `inertia` (2 + tanh(m)); p,
    kept in (1, 2], and m train. Cross-attention: nodes are the queries, as O and W_down make them,
    and `pooled` means of values and of A; messages go from these to those (the second term is 0).
    With ``ffn=True`` the MLP reads ``x + W_up gelu(W_down x + b) + b'`` besides.

    A token's own features count by mu alone. As published a token also meets itself, with a length
    of e: at p = 1.25 a factor of 1e5, so that F' is F, and p and m move nothing
    (``self_loop="code"``).

    Start: weights N(0, 0.02), biases 0, m = 0: only near the pre-trained function; ``init="zero"``,
    W_up = 0: exactly on it. Trains per attention 2 (d r + r) + r d + d + 2, r = d / `reduction`
    (222,146 at d = 768), per MLP 2 d r + r + d (148,320). Kept for backward per attention: q, k,
    O(V), y and some r numbers per token; A is made again. Not mergeable.

    Departures: A before dropout, all of it in fp32; tokens nearer than rounding tells are equal and
    have no gradient there. What the MLP's adapter reads and its activation are the best reading.
    """

    paper: ClassVar[str] = ("p-Laplacian Adaptation for Generative Pre-trained Vision-Language "
                            "Models (2024), arXiv:2312.10613")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"open attention"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    reduction: int = setting(8, "d over r, the width of the bottleneck", other=(2,))
    power: float = setting(1.25, "p at the start", other=(1.5,))
    inertia: float = setting(0.1, "half of the start of what a token's own features count")
    self_loop: Literal["code", "exclude"] = setting("exclude", "messages of a token to itself",
                                                     beside={"power": 1.9})
    pooled: int = setting(16, "nodes that another sequence's values become",
                          unseen="tiny models have fewer values than that: "
                                 "tests/methods/test_p_adapter.py")
    ffn: bool = setting(True, "an adapter before the MLP too")
    init: Literal["bert", "zero"] = setting("bert", "start of the weights")

    def __post_init__(self) -> None:
        if min(self.reduction, self.pooled) < 1 or not (
                self.inertia > 0 and LEAST <= self.power <= 2):
            raise RecipeError(f"{self}: expected reduction and pooled of at least 1, inertia above "
                              "0, power above 1, at most 2")

    def forbids(self) -> dict[str, str]:
        return {"how attention is computed": "p_adapter reads the exact attention's probabilities"}

    def branch(self, anatomy: Anatomy) -> Iterable[Branch | Installs]:
        paths = open_attentions(anatomy, self.name)
        ends = [s for s in attention_ends(anatomy) if s.block.attn in paths]
        mlps = list(mlp_ends(anatomy)) if self.ffn else []
        for s in found(anatomy, [*ends, *mlps], self, "attention or MLP"):
            if s in ends:
                yield Sent(self, s)
            elif s.block.mlp or len(s.block.mlp_in) == 1:
                read = s.block.mlp or s.block.mlp_in[0]
                made = Bottleneck(s.width, self.width(s), act="gelu", init=self.init)
                yield Branch(read, made, read=(read, "input"), at="input")
            else:
                raise RecipeError(f"p_adapter: several linears of {s.block.path} read what its MLP "
                                  "is given; expected ffn=False")

    def width(self, s: Site) -> int:
        if s.width % self.reduction:
            raise RecipeError(f"p_adapter(reduction={self.reduction}) does not divide the width "
                              f"{s.width} of {s.path}")
        return s.width // self.reduction

    def count(self, d: int, mlp: bool = False) -> int:
        """Trainable parameters of one attention of width d, or of one MLP."""
        r = d // self.reduction
        return Bottleneck.count(d, r) + (0 if mlp else d * r + r + 2)


@dataclass(frozen=True)
class Sent:
    """Messages behind one attention."""

    method: PAdapter
    site: Site

    def install(self, attacher: Attacher, part: Method) -> None:
        m, s, state, name = self.method, self.site, attacher.state, attacher.adapter.name
        cross, r = s.path == s.block.cross_out, m.width(s)
        if not s.block.heads or r % s.block.heads:
            raise RecipeError(f"p_adapter: {r} features of {s.path} do not fall into its "
                              f"{s.block.heads or 'unknown number of'} heads; choose another "
                              "reduction")
        read = s.block.cross if cross else s.block.attn
        Attended(state, name).listen(attacher.slot(read or ""), part.name)
        made = Messages(state, name, s.width, r, s.block.heads, p=m.power, mu=m.inertia, zero=m.init
                        == "zero", self_loop=m.self_loop, pooled=m.pooled if cross else None)
        made.to(attacher.device(s.path)).listen(attacher.slot(s.path), part.name)
