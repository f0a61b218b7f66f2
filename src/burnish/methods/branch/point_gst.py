from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.clouds import Noted, Spectral, bases
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import point_groups, refuse, unmet
from ...core.protocols import Attacher
from ...core.site import Branch
from ._sites import found, mlp_ends, mlp_norm, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class PointGst(Method):
    """PointGST: beside the MLP of every block, tokens of points filtered in the cloud's own Fourier
    domain.

    Of the centres c (G, 3) of a cloud's groups: A_ij = d_min / |c_i - c_j|, A_ii = 1, L = I -
    D^{-1/2} A D^{-1/2} with D = diag(sum_j A_ij + 1e-6), Phi (G, G) its eigenvectors as rows; and
    likewise Phi_k of each run of `local` centres along a Z-shaped curve. With h = W_d x + b_d
    (rank) and t those of the G tokens of points

        t <- silu(t) + Phi^T f(Phi t) + Phi_k^T f(Phi_k t),   f(s) = s + silu(W norm(s) + b)

    (one W, b, a norm for each of the two), other tokens silu(h), and the MLP adds W_u t + b_u. x is
    the residual stream before the MLP's norm. The tokens of points are a block's last G.

    Start: W_d Xavier, everything else 0: the pre-trained function exactly. Trains 2 d r + r^2 +
    6 r + d per block (354,528 in twelve of width 384 at r = 36). Kept for backward: x, some 12 r
    numbers a token, and once a cloud G (G + local) numbers. One eigendecomposition a cloud, in
    float32 at least, without a graph, for all blocks. Not mergeable.

    For models with a module ``group_divider`` (Point-MAE, ACT, ReCon, PointGPT) that returns the
    centres, (batch, groups, 3). Departures: d_min is of a cloud, not of the batch, so a cloud's
    answer is its own; Phi are rows of eigenvectors (the authors' code takes columns), each with its
    largest entry positive; centres that coincide count as d_min apart.
    """

    paper: ClassVar[str] = ("Parameter-Efficient Fine-Tuning in Spectral Domain for Point Cloud "
                            "Learning (2024), arXiv:2410.08114")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"groups of points", "mlp behind mixing"})
    merges: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"local": 4}

    rank: int = setting(36, "r, width of the bottleneck", alias=("r",))
    local: int = setting(32, "groups in a run", other=(2,))

    def __post_init__(self) -> None:
        if self.rank < 1 or self.local < 1:
            raise RecipeError(f"point_gst(rank={self.rank}, local={self.local}): expected at least "
                              "1 each")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch | Spectra]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        yield Spectra(point_groups(anatomy) or "", self.local)
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            made = Bottleneck(s.width, self.rank, act="linear",
                              mixer=Spectral(self.rank, self.local))
            nn.init.xavier_uniform_(made.down.weight)
            norm = mlp_norm(anatomy, s.block)
            yield Branch(s.block.mlp or s.path, made,
                         read=(norm or s.block.mlp or s.block.mlp_in[0], "input"))

    def count(self, d: int) -> int:
        """Trainable parameters of one block of width d."""
        return Bottleneck.count(d, self.rank) + self.rank * (self.rank + 5)


@dataclass(frozen=True)
class Spectra:
    """Bases are made where a cloud's groups are."""

    path: str
    local: int

    def install(self, attacher: Attacher, part: Method) -> None:
        Noted(attacher.state, attacher.adapter.name, ("spectrum", self.local),
              functools.partial(bases, local=self.local), "point_gst"
              ).listen(attacher.slot(self.path), part.name)
