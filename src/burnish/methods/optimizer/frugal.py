from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...blocks.update.residual import Plain, Sign
from ...blocks.update.rota import Rota
from ...blocks.update.rules import AdamW
from ...blocks.update.step import Subspace, matching
from ...blocks.update.subspace import SubspaceMap
from ...core.errors import RecipeError
from ...core.method import Method, setting

_KINDS = {"columns": "columns", "rows": "rows", "randk": "entries", "svd": "svd",
          "random": "orthogonal", "block": "svd"}


@dataclass(frozen=True, kw_only=True)
class Frugal(Method):
    """FRUGAL: Adam on a small part of the gradient that moves, sign descent on all the rest.

        W <- W (1 - lr wd)
        W <- W - lr s_proj (back(Adam(R)) + s_free sign(G - back(R))),     R = down(G)

    Every T updates the part is chosen anew, its moments are zero and Adam counts from 1. The part
    is a share rho of

        columns, rows   of each matrix, drawn                   state 2 rho p, and their numbers
        randk           of each row's entries, drawn again      state 2 rho p
        svd             r = rho min(m, n) singular vectors      state a r + 2 c r    (galore's P)
        random          r orthonormal vectors, drawn            the same
        block           of all the model's matrices, whole      state 2 p for those whose turn it is

    of an m x n matrix of p entries, a = min, c = max. The picked entries and the others are exactly
    disjoint; what a factor leaves over has full rank. rho = 1 is AdamW (if nothing restarts), 0 is
    sign descent. Taken apart are the matrices of blocks (``targets`` names others); embeddings,
    head, norms and biases take Adam whole. Another innermost rule takes its place in all of it:
    ``frugal + lion``, ``frugal + adam8bit``. No temporary has the gradient's size.

    s_free is 1 in pre-training, 0.1 in fine-tuning, where rank 8 is ``density=0.0104``. Signs move
    every weight by lr s_proj s_free: in bf16 weights that are rounded to nearest most such steps
    are lost below 1e-4. Departures: r of each row stand for r m of all entries, so that nothing
    need be stored; shares are rounded, and at least one vector unless rho = 0.
    """

    paper: ClassVar[str] = ("FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for "
                            "Scalable Training, ICML 2025")
    tier: ClassVar[str] = "checked against the paper's numbers"

    density: float = setting(0.25, "rho, share of the weights that have moments", alias=("rho",))
    part: Literal["columns", "rows", "randk", "svd", "random", "block"] = setting(
        "columns", "what the share is taken of", alias=("proj_type",))
    every: int = setting(200, "updates between two choices of the part",
                         alias=("update_gap", "T"))
    order: Literal["random", "ascending", "descending", "mirror"] = setting(
        "random", "of matrices whose turn comes", beside={"part": "block", "every": 1})
    reset: bool = setting(True, "moments begin again with every choice",
                          alias=("reset_statistics",), beside={"every": 1})
    scale: float = setting(1.0, "s_proj, times both parts", alias=("s_proj",), above=0.0)
    scale_free: float = setting(0.1, "s_free, times the part without moments", alias=("s_free",))
    residual: Literal["sign", "sgd", "none"] = setting("sign", "step of the part without moments")

    def __post_init__(self) -> None:
        if self.part == "block" and not self.reset:
            raise RecipeError("frugal(part='block', reset=False): a matrix whose turn comes has no "
                              "moments to go on with; leave reset=True")
        if self.order != "random" and self.part != "block":
            raise RecipeError(f"frugal: order={self.order!r} is that of matrices whose turn comes, "
                              f"and part={self.part!r} draws; take part='block'")

    def claims(self) -> tuple[str, ...]:
        return ("the subspace of the gradient",)

    def optimizer(self) -> Subspace:
        free = self.scale * self.scale_free
        beside = {"sign": Sign(scale=free), "sgd": Plain(scale=free), "none": "none"}
        return Subspace(
            map=SubspaceMap(density=self.density, kind=_KINDS[self.part]), every=self.every,
            rota=Rota(self.density, self.order) if self.part == "block" else None,
            scale=self.scale, residual=beside[self.residual],
            at_refresh="restart" if self.reset else "keep", decay_first=True,
            where=matching(self.targets) if self.targets else None,
            default=AdamW(weight_decay=0.0), name="frugal")

    def state_bytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of state beside a matrix of a block, of one whose turn it is with part="block";
        scalars left out; of other tensors, Adam's."""
        if self.part == "block":
            return 2 * max(itemsize, 4) * math.prod(shape)
        return self.optimizer().state_bytes(shape, itemsize)
