from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.residual import Scaled
from ...blocks.update.rules import AdamW
from ...blocks.update.step import Subspace, matching
from ...blocks.update.subspace import SubspaceMap
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class Fira(Method):
    """Fira: GaLore plus the rest of the gradient, at the rate Adam gave its low-rank part.

        R = down(G),  N = m / (sqrt(v) + eps),  P from the gradient's SVD every T updates (galore)
        phi_j = ||N_j|| / (||R_j|| + 1e-8)                per channel j of the long side
        S = phi (G - back(R)),   S <- S / (max(||S|| / (||S_last|| + 1e-8), limit) / limit)
        W <- W - lr sqrt(1 - b2^t) / (1 - b1^t) (alpha back(N) + S),   then   W <- W - lr wd W

    The update has full rank. The limiter lets ||S|| grow by at most 1 % per step (the first is
    free); a norm that is not finite adds nothing. State of an m x n matrix, a = min, c = max:
    a r + 2 c r elements and one scalar. Which weights are projected: as in ``galore``; with r = a
    nothing is left over and it is GaLore.

    Departure: alpha multiplies the outer update only, so G - back(R) is the orthogonal part; the
    authors' projector carries it, ``literal=True`` takes G - alpha back(R) as they do.
    """

    paper: ClassVar[str] = ("Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank "
                            "Constraint? (2024), arXiv:2410.01623")
    tier: ClassVar[str] = "checked against an independent equation"

    rank: int = setting(128, "rank of the subspace", alias=("r",), least=1)
    every: int = setting(200, "updates between two singular value decompositions",
                                alias=("update_every", "update_proj_gap", "T"))
    scale: float = setting(0.25, "alpha, of the low-rank part", alias=("alpha",), least=0.0)
    limit: float = setting(1.01, "growth of the residual's norm per update; 0 for no limit")
    proj_type: Literal["std", "reverse_std", "left", "right"] = setting(
        "std", "side of the factor: std is the short side")
    literal: bool = setting(False, "the residual as the authors' code has it")

    def claims(self) -> tuple[str, ...]:
        return ("the subspace of the gradient",)

    def optimizer(self) -> Subspace:
        return Subspace(
            map=SubspaceMap(rank=self.rank, side=self.proj_type), every=self.every,
            scale=self.scale, residual=Scaled(limit=self.limit, literal=self.literal),
            where=matching(self.targets) if self.targets else None, eps_first=True,
            default=AdamW(eps=1e-6, weight_decay=0.0), name="fira")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a matrix of a block, scalars left out; of others, Adam's."""
        return self.optimizer().state_bytes(shape, itemsize)
