from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ....blocks.weight.rotation import Near, Rotation
from ....core.errors import RecipeError
from ....core.method import Method, setting
from ....core.site import Place, Site
from ..lowrank.lora import check_dropout

if TYPE_CHECKING:
    from ....engine.tuned import Tuned


@dataclass(frozen=True, kw_only=True)
class Oft(Method):
    """OFT: the input space of a weight is turned, block by block; lengths and angles stay.

    ``W' = W R^T``, ``R = blockdiag(R_1 .. R_k)``, ``R_j = (I + Q_j)(I - Q_j)^-1`` (Cayley), Q_j
    skew-symmetric (b, b), k = in / b: ``y = W (R^T x) + b``. Rows of W keep their norms and their
    angles: ``W' W'^T = W W^T``. `share` uses one block for all runs of inputs; `bound` keeps
    ``||Q_j||_F`` below it after every update (COFT). ``terms=n`` takes the first n terms of the
    series of R in Q instead of the solve: cheaper, and orthogonal only nearly; 0 is exact.

    Start: Q = 0: the pre-trained function exactly. Trains in (b - 1) / 2 per matrix, b (b - 1) / 2
    shared. Kept for backward: x, once for all layers that read it; x is turned, never W, which may
    be held in any form. Merges exactly. No weight decay. `in` must be a multiple of b.
    Beside another delta on the same weight that trains, the turned x is kept too. In training
    `block_dropout` (the authors' multiplicative dropout) leaves that share of the blocks, drawn for
    each forward, where they are. A shared block always turns. (They take whole blocks, so that
    little of few is none; here whether the broken part of one counts is drawn too.)
    """

    paper: ClassVar[str] = ("Controlling Text-to-Image Diffusion by Orthogonal Finetuning (2023), "
                            "arXiv:2306.07280")
    tier: ClassVar[str] = "checked against an independent equation"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "conv1d", "conv", "mha"})
    small: ClassVar[dict[str, int]] = {"block": 8}

    block: int = setting(32, "b, inputs that turn together", alias=("oft_block_size",))
    share: bool = setting(False, "one rotation for all blocks", alias=("block_share",))
    bound: float | None = setting(None, "largest norm of a Q_j; None: free", other=(0.01,))
    terms: int = setting(0, "0: exact; n: the first n terms of the series",
                         alias=("num_cayley_neumann_terms",), other=(5,))

    block_dropout: float = setting(0.0, "share of blocks that do not turn in a forward",
                                   alias=("module_dropout",))

    def __post_init__(self) -> None:
        check_dropout("oft", self.block_dropout, "block_dropout")
        if self.block < 2 or self.terms == 1 or self.terms < 0:
            raise RecipeError("oft: block >= 2 and terms 0 (exact) or at least 2 are expected")
        if self.bound is not None and not self.bound > 0:
            raise RecipeError(f"oft: bound is the largest norm of a block, got {self.bound}")

    def claims(self) -> tuple[str, ...]:
        return (f"the function of W on {self.targets or 'the default targets'}",)

    def delta(self, site: Site) -> Rotation:
        if site.place.inp % self.block:
            fits = [b for b in (2, 4, 8, 16, 32, 64) if site.place.inp % b == 0]
            raise RecipeError(f"oft: block={self.block} does not divide the {site.place.inp} "
                              f"inputs of {site.place.name}; "
                              f"{', '.join(map(str, fits)) or 'none'} would")
        term = Rotation(site.place.inp, self.block, self.share, self.terms)
        term.upper.burnish_decay, term.block_dropout = False, self.block_dropout
        return term

    def per_token(self, place: Place) -> int:
        """Numbers per token kept for backward besides the input (no other delta on the weight)."""
        return 0

    def count(self, place: Place) -> int:
        """Trainable parameters on one matrix."""
        blocks = 1 if self.share else place.inp // self.block
        return blocks * self.block * (self.block - 1) // 2

    def controller(self, tuned: Tuned) -> Near | None:
        return None if self.bound is None else \
            Near([t for _, t in tuned.terms(Rotation)], self.bound)
