from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bottleneck import Bottleneck, Normed
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import found, mlp_ends, module, post_norm

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Method):
    """Pfeiffer adapter: one bottleneck per block, behind the MLP.

    ``placement="plain"``: ``F <- F + W_up act(W_down F + b_down) + b_up`` on the MLP's result F,
    before its residual. ``placement="library"``, for blocks that normalise last (BERT), is what
    AdapterHub's seq_bn does: with u = F + x the bottleneck reads the normalised state and its
    result is added before the same frozen norm runs,
    ``out = LN(u + W_up act(W_down LN(u) + b_down) + b_up)``; in other blocks it is refused.

    Start: normal weights of deviation 0.02 ("bert") are only near the pre-trained function;
    "zero" is exactly on it in both placements, since u and not LN(u) is carried on.
    Trains 2 d r + r + d per block, r = d // reduction. Kept for backward: the d-wide input and r
    numbers per token. Not mergeable.
    """

    paper: ClassVar[str] = "AdapterFusion (2021), arXiv:2005.00247"
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    reduction: int = setting(16, "d / r", alias=("reduction_factor",), least=1)
    placement: Literal["plain", "library"] = setting("plain", "where it reads and writes")
    act: str = setting("relu", "activation inside", other=("gelu",))
    init: Literal["bert", "truncated", "zero"] = setting("bert", "start of the weights")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            made = Bottleneck(s.width, max(1, s.width // self.reduction), act=self.act,
                              init=self.init)
            if self.placement == "plain":
                yield Branch(s.path, made)
                continue
            norm = post_norm(anatomy, s.block)
            if norm is None:
                raise RecipeError(f"pfeiffer(placement='library'): {s.block.path} normalises "
                                  "first, the library's form is made for blocks that normalise "
                                  "last; use placement='plain'")
            yield Branch(norm, Normed(module(anatomy, norm), made), at="input")

    def count(self, d: int) -> int:
        """Trainable parameters of one block of width d."""
        return Bottleneck.count(d, max(1, d // self.reduction))
