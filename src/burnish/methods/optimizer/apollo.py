from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.residual import Scaled
from ...blocks.update.rules import AdamW
from ...blocks.update.step import Subspace, matching
from ...blocks.update.subspace import SubspaceMap
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Apollo(Method):
    """APOLLO: the gradient itself, at learning rates that Adam found in a random projection of it.

        P Gaussian, N(0, 1/r), on the short side, another one every T updates
        R = P^T G or G P^T,  N = m / (sqrt(v) + eps)
        phi_j = ||N_j|| / (||R_j|| + 1e-8)   per channel j of the long side,
                or ||N|| / (||R|| + 1e-8)    once per tensor (APOLLO-Mini)
        U = phi G,   U <- U / (max(||U|| / (||U_last|| + 1e-8), limit) / limit)
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) sqrt(scale) U,   then   W <- W - lr wd W

    The update has the rank of G. State of an m x n matrix, c = max(m, n): 2 c r elements and one
    scalar; P is drawn again from its seed and never stored. APOLLO-Mini is
    ``apollo(rank=1, scale=128.0, by="tensor")``: 2 c numbers per matrix, the memory of SGD.

    Projected: as in ``galore`` (matrices of blocks whose short side exceeds r); all other trained
    tensors take Adam. The seed of P is the weight's name, so the order of parameters changes
    nothing; moments stay when P changes, as published.
    """

    paper: ClassVar[str] = ("APOLLO: SGD-like Memory, AdamW-level Performance (2024), "
                            "arXiv:2412.05270")
    tier: ClassVar[str] = "checked against an independent equation"

    rank: int = setting(256, "rank of the projection; a quarter of the width is published",
                        alias=("r",), least=1)
    every: int = setting(200, "T, updates between two projections",
                                alias=("update_every", "update_proj_gap", "T"))
    scale: float = setting(1.0, "its root multiplies the step; 128 with rank 1", alias=("alpha",),
                           above=0.0)
    by: Literal["channel", "tensor"] = setting("channel", "one rate per channel or per tensor",
                                               alias=("scale_type",))
    scale_front: bool = setting(False, "scale before the limiter instead of behind it",
                                unseen="a limit of growth is relative, so a fixed factor commutes "
                                       "with it: tests/methods/test_apollo.py")
    limit: float = setting(1.01, "growth of the update's norm per update; 0 for no limit")
    proj_type: Literal["std", "reverse_std", "left", "right"] = setting(
        "std", "side of the projection: std is the short side")

    def claims(self) -> tuple[str, ...]:
        return ("the subspace of the gradient",)

    def optimizer(self) -> Subspace:
        rates = Scaled(of="whole", by=self.by, scale=self.scale**0.5, limit=self.limit,
                       scale_first=self.scale_front)
        return Subspace(
            map=SubspaceMap(rank=self.rank, kind="gaussian", side=self.proj_type),
            every=self.every, scale=0.0, residual=rates,
            where=matching(self.targets) if self.targets else None, eps_first=True,
            default=AdamW(eps=1e-6, weight_decay=0.0), name="apollo")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a matrix of a block, scalars left out; of others, Adam's."""
        return self.optimizer().state_bytes(shape, itemsize)
