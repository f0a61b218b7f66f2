from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.state.features import Frozen, RandomFeatures
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import attention_ends, found, mlp_ends

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Snnk(Method):
    """SNNK adapter: fixed random features of the state, and one matrix that trains.

    ``a(h) = h + V phi(h) + c``, phi(h) = m^(-1/2) relu(G h), behind attention and MLP, before the
    residual: V (d, m), c (d), G (m, d) Gaussian, frozen, one for all sites of a width, drawn from
    `seed`. ``phi(x) . phi(w)`` estimates the arc-cosine kernel of x and w, so ``V phi`` stands for
    a layer of any width of that kernel whose two matrices are bundled in V. orthogonal=True draws
    the rows of G at right angles, which lessens the error.

    Of the paper's kernels this is the one for ReLU, which its adapters use; it has no exponential
    of the state that could overflow. (Start, placement per task and gates unconfirmed: V = 0, both
    sub-layers, none.)

    Start: V, c = 0: the pre-trained function exactly. Trains d m + d per site. Kept for backward
    per site: m numbers per token, not h. The file holds G, once per width. Not mergeable.
    `targets` narrows it to sites behind these weights.
    """

    paper: ClassVar[str] = "Scalable Neural Network Kernels (2023), arXiv:2310.13225"
    needs: ClassVar[frozenset[str]] = frozenset({"blocks"})
    merges: ClassVar[bool] = False

    features: int = setting(16, "m, random features per site", alias=("num_features",))
    orthogonal: bool = setting(False, "draw them at right angles")
    seed: int = setting(0, "of the features")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        if self.features < 1:
            raise RecipeError(f"snnk(features={self.features}): expected at least 1")
        sites = found(anatomy, [*attention_ends(anatomy), *mlp_ends(anatomy)], self,
                      "attention or MLP")
        frozen: dict[int, Frozen] = {}
        for s in sites:
            if new := s.width not in frozen:
                frozen[s.width] = Frozen(self.features, s.width, self.seed, self.orthogonal)
            yield Branch(s.path, RandomFeatures(frozen[s.width], s.width, owns=new))

    def count(self, d: int) -> int:
        """Trainable parameters of one site of width d."""
        return d * self.features + d
