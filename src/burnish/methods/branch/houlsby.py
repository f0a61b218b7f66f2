from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bottleneck import Bottleneck
from ...core.method import Method, setting
from ...core.site import Branch, Selection
from ._sites import attention_ends, found, mlp_ends, norm_tensors

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """Houlsby adapters: a bottleneck behind every sub-layer, before its residual.

    ``a(h) = h + W_up act(W_down h + b_down) + b_up``, behind the attention's output projection and
    behind the MLP (behind the whole mixture where the MLP is one): ``y = LN(x + a(F(x)))`` in a
    post-norm block. W_down (m, d), W_up (d, m). Norms train too, as in the paper.

    Start: normal weights of deviation 0.02 ("bert"), of 0.01 cut at two deviations ("truncated",
    the paper's), both only near the pre-trained function; "zero" is exactly on it.
    Trains 2 d m + m + d per site, two sites per block, and the norms.
    Kept for backward per site: its d-wide input and m numbers per token. Not mergeable.
    `targets` narrows it to sites behind these weights: ``houlsby(targets="fc2")``.
    """

    paper: ClassVar[str] = ("Parameter-Efficient Transfer Learning for NLP (2019), "
                            "arXiv:1902.00751")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    bottleneck: int = setting(64, "m, width of the bottleneck", alias=("m", "width"), least=1)
    act: str = setting("gelu", "activation inside", other=("relu",))
    init: Literal["bert", "truncated", "zero"] = setting("bert", "start of the weights")
    norms: bool = setting(True, "train the norms too")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        sites = [*attention_ends(anatomy), *mlp_ends(anatomy)]
        for s in found(anatomy, sites, self, "attention or MLP"):
            yield Branch(s.path, Bottleneck(s.width, self.bottleneck, act=self.act, init=self.init))

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        return norm_tensors(anatomy) if self.norms else ()

    def count(self, d: int) -> int:
        """Trainable parameters of one site of width d, norms left out."""
        return Bottleneck.count(d, self.bottleneck)
