from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.rules import AdamW
from ...blocks.update.step import Subspace, matching
from ...blocks.update.subspace import SubspaceMap
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Galore(Method):
    """GaLore: Adam's moments live in a low-rank subspace of the gradient; the full weight trains.

        every T updates:  G = U S V^T,   P = U[:, :r]           (m, r), for m < n
        R = P^T G                                                 (r, n)
        N = Adam(R) = sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
        W <- W - lr alpha P N,   then   W <- W - lr wd W

    and on the other side, R = G Q^T (m, r), for m >= n: the factor sits on the short side. With
    a = min(m, n), c = max(m, n) the state is a r + 2 c r elements instead of 2 m n. m and v stay as
    they are when P changes, and t goes on. eps enters before the correction of bias.

    Projected: matrices and convolutions of the blocks whose short side exceeds r (``targets``
    chooses others); all other trained tensors take the same rule directly. The factor is kept in
    the weight's dtype, products accumulate in fp32, nothing of size m x n is made besides the
    gradient. That gradient is full size, so in_backward is what saves gradient memory: each
    tensor is stepped inside backward; over several micro-batches R accumulates (c r floats),
    with P from the first one at a refresh.

    Wraps another innermost rule if the recipe has one: ``galore + adam8bit``, ``galore + lion``.
    Departures: convolutions are seen as (out, rest), the published tensor projector being broken;
    a gradient that is zero or not finite at a refresh leaves the old P.
    """

    paper: ClassVar[str] = ("GaLore: Memory-Efficient LLM Training by Gradient Low-Rank "
                            "Projection, ICML 2024")
    tier: ClassVar[str] = "checked against the paper's numbers"

    rank: int = setting(128, "rank of the subspace", alias=("r",), least=1)
    every: int = setting(200, "updates between two projections' singular value "
                                "decompositions", alias=("update_every", "update_proj_gap", "T"))
    scale: float = setting(0.25, "alpha; published fine-tuning takes 4 with rank 4 or 8",
                           alias=("alpha",), above=0.0)
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = setting(
        "std", "side of the factor: std is the short side, full is both")
    svd: Literal["exact", "randomized"] = setting("exact", "randomized: a sketch of the range, "
                                                  "oversampling 8, two power iterations")
    at_refresh: Literal["keep", "reset", "rotate"] = setting("keep", "the moments when P changes")
    in_backward: bool = setting(False, "step each tensor inside backward and free its gradient")

    def claims(self) -> tuple[str, ...]:
        return ("the subspace of the gradient",)

    def optimizer(self) -> Subspace:
        kind = "svd" if self.svd == "exact" else "randomized"
        return Subspace(
            map=SubspaceMap(rank=self.rank, kind=kind, side=self.proj_type),
            every=self.every, scale=self.scale, at_refresh=self.at_refresh,
            where=matching(self.targets) if self.targets else None, eps_first=True,
            default=AdamW(eps=1e-6, weight_decay=0.0), in_backward=self.in_backward, name="galore")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a matrix of a block, scalars left out; of others, Adam's."""
        return self.optimizer().state_bytes(shape, itemsize)
