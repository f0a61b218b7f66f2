from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bottleneck import activation
from ...blocks.state.hypercomplex import HypercomplexAdapter, Slow
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Selection
from ._sites import attention_ends, found, mlp_ends, norm_tensors

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Compacter(Method):
    """Compacter: bottlenecks of parameterised hypercomplex layers that share their slow factors.

    ``a(h) = h + U(act(D(h)))`` behind self-attention and behind the MLP, before the residual;
    ``placement="mlp"`` is Compacter++, behind the MLP alone. D (d to m = d / reduction) and U (m to
    d) are ``y = x H + b``, ``H = sum_{i <= n} A_i (x) (s_i t_i^T)``, A_i (n, n) the same in all
    adapters, s_i (in / n, rank), t_i (out / n, rank) of each layer's own. rank(H) <= n^2 rank.

    Start: A ~ N(0, 0.01^2), s and t Xavier-uniform with gain sqrt 2, b = 0: near the pre-trained
    function, not on it; ``init="zero"`` (not the paper's) has t = 0 in U and is exactly on it.
    Trains 2 rank (d + m) + m + d per adapter, n^3 once, and the norms: T5-base 161,728, of which
    adapters 114,048; Compacter++ 104,704. Kept for backward per site: h; H is never formed, and the
    adapter runs again. Not mergeable. d and m are multiples of n = phm_dim. `targets` narrows it to
    sites behind these weights. (Full B_i, and A_i of each adapter's own, is PHM-Adapter, not this.)
    """

    paper: ClassVar[str] = ("Compacter: Efficient Low-Rank Hypercomplex Adapter Layers (2021), "
                            "arXiv:2106.04647")
    tier: ClassVar[str] = "checked against the paper's numbers"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    reduction: int = setting(32, "d / m", alias=("reduction_factor",), other=(2,))
    phm_dim: int = setting(4, "n, Kronecker products in a layer, and the side of their slow "
                           "factors", alias=("hypercomplex_division",), other=(2,))
    rank: int = setting(1, "of the fast factors", alias=("phm_rank",), other=(2,))
    placement: Literal["both", "mlp"] = setting("both", "where it reads and writes")
    act: str = setting("gelu_new", "activation inside", other=("relu",))
    init: Literal["paper", "zero"] = setting("paper", "start of the weights")
    norms: bool = setting(True, "train the norms too")

    def __post_init__(self) -> None:
        if min(self.reduction, self.phm_dim, self.rank) < 1:
            raise RecipeError("compacter: reduction, phm_dim and rank are at least 1")
        activation(self.act)

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        own = [s for s in attention_ends(anatomy) if s.path != s.block.cross_out] \
            if self.placement == "both" else []
        slow: Slow | None = None
        for s in found(anatomy, [*own, *mlp_ends(anatomy)], self, "attention or MLP"):
            m = s.width // self.reduction
            if s.width % self.phm_dim or m % self.phm_dim or not m:
                other = _instead(s.width, self.reduction, self.phm_dim)
                raise RecipeError(f"compacter: behind {s.path} are {s.width} channels and a "
                                  f"bottleneck of {m}, no whole numbers of "
                                  f"phm_dim={self.phm_dim} blocks; try {other}")
            first, slow = slow is None, slow or Slow(self.phm_dim)
            yield Branch(s.path, HypercomplexAdapter(s.width, m, slow, self.rank, self.act, first,
                                                     self.init == "zero"))

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        return norm_tensors(anatomy) if self.norms else ()

    def count(self, d: int) -> int:
        """Trainable parameters of one adapter of width d, norms and what all share left out."""
        return HypercomplexAdapter.count(d, d // self.reduction, self.rank)


def _instead(d: int, reduction: int, n: int) -> str:
    """The nearest reduction that fits, in words."""
    if d % n:
        return "another phm_dim"
    fit = [k for k in range(1, d + 1) if d // k % n == 0]
    return f"reduction={min(fit, key=lambda k: abs(k - reduction))}"
