from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.natural import Natural
from ...blocks.update.rules import AdamW
from ...blocks.update.step import Subspace, matching
from ...blocks.update.subspace import SubspaceMap
from ...core.method import Method, setting


@dataclass(frozen=True, kw_only=True)
class NaturalGalore(Method):
    """Natural GaLore: GaLore whose projected gradient is multiplied by the inverse empirical Fisher
    matrix of the last h of them.

        R = down(G),  P from the gradient's SVD every T updates (galore),  g = vec(R) in R^k
        F = lambda I + sum of g g^T over the last s <= h updates, this one included
        W <- W - lr alpha back(Adam(F^-1 g)),   then   W <- W - lr wd W

    F^-1 g is ``H (lambda I + H^T H)^-1 e``, an s x s system; F is never made. The state of an m x n
    matrix, a = min, c = max, is that of GaLore, a r + 2 c r, and h c r + h^2 more: with h = 20 ten
    times the moments. ``proj_type="full"``, the authors' two-sided projection, makes it
    h r^2 + h^2; `history` is the other way to save. Which weights are projected, and Adam's form:
    as in ``galore``.

    Adam takes any factor of F^-1 out again (but for eps), and where |g|^2 is far below lambda it is
    the identity: `relative` makes lambda a share of the mean |g|^2. Departure: columns of H are
    forgotten when P changes, since they stood in another basis; ``history_on_refresh="keep"`` as
    the authors have it. lambda is at least what rounding leaves of the trace of H^T H.
    """

    paper: ClassVar[str] = ("Natural GaLore: Accelerating GaLore for memory-efficient LLM Training "
                            "and Fine-tuning (2024), arXiv:2410.16029")
    tier: ClassVar[str] = "checked against an independent equation"

    rank: int = setting(128, "rank of the subspace", alias=("r",), least=1)
    every: int = setting(200, "updates between two singular value decompositions",
                         alias=("update_every", "update_proj_gap", "T"))
    scale: float = setting(0.25, "alpha", alias=("alpha",), above=0.0)
    history: int = setting(20, "h, projected gradients that are remembered")
    damping: float = setting(1e-3, "lambda, added to the diagonal of F")
    relative: bool = setting(False, "lambda is a share of the mean squared norm of the gradients")
    history_on_refresh: Literal["clear", "keep"] = setting(
        "clear", "the remembered gradients when P changes", beside={"every": 1})
    proj_type: Literal["std", "reverse_std", "left", "right", "full"] = setting(
        "std", "side of the factor: std is the short side, full is both")

    def claims(self) -> tuple[str, ...]:
        return ("the subspace of the gradient",)

    def optimizer(self) -> Subspace:
        return Subspace(
            map=SubspaceMap(rank=self.rank, side=self.proj_type), every=self.every,
            scale=self.scale, where=matching(self.targets) if self.targets else None,
            eps_first=True, default=AdamW(eps=1e-6), name="natural_galore",
            image=Natural(length=self.history, damping=self.damping, relative=self.relative,
                          keep=self.history_on_refresh == "keep"))

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a matrix of a block, scalars left out; of others, Adam's."""
        return self.optimizer().state_bytes(shape, itemsize)
