from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bits import BitBottleneck
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch
from ..delta.lowrank.lora import check_dropout
from ._sites import found, mlp_ends, mlp_norm

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class BiAdaptFormer(Method):
    """Bi-AdaptFormer: a parallel adapter beside the MLP whose weights answer at one bit each.

    ``F(LN x) <- F(LN x) + s W^_up relu(W^_down x)``, x the residual stream before the MLP's norm,
    without biases. W^ of a matrix W that trains in fp32 is ``sigma Q((W - m) / sigma) + m``, m and
    sigma its mean and deviation, Q the nearest of 2^bits levels that a normal variable is coded in
    with the least mean error: +-0.6745 at one bit. The gradient passes Q as if it were the
    identity, and m and sigma as what they are. Every forward quantises anew.

    Start: W_down uniform in +-1/sqrt(d), W_up normal of deviation 1e-3, cut at two (sigma = 0 has
    no scale): near the pre-trained function. Trains 2 d r per block, r = `bottleneck`. The file
    that ``tuned.save`` writes holds `bits` bits a weight and two numbers a matrix (ViT-B/16 at r =
    32: 73,728 bytes and 192); ``whole=True`` what trains, to go on. Kept for backward: r numbers
    per token, and W^; x is made again from the norm. It saves what is stored and sent, not what
    training takes. Not mergeable. `targets` narrows it to MLPs of these weights.
    """

    paper: ClassVar[str] = ("Revisiting the Parameter Efficiency of Adapters from the Perspective "
                            "of Precision Redundancy, ICCV 2023, arXiv:2307.16867")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp behind mixing"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    excused: ClassVar[dict[str, str]] = {
        "its_dropout_is_differentiated": "the gradient passes steps as if they were none, which "
        "no difference of losses shows: tests/methods/test_bi_adaptformer.py has it by autograd"}

    bottleneck: int = setting(32, "r, width of the bottleneck", alias=("h", "width"))
    bits: Literal[1, 2, 4] = setting(1, "of a weight that answers")
    scale: float = setting(1.0, "s, from 0.01 to 100 in the paper")
    act: str = setting("relu", "activation inside", other=("gelu",))
    dropout: float = setting(0.1, "dropout on the activation", other=(0.4,))
    stored: bool = setting(False, "codes of a file, as training leaves them",
                           unseen="these come from a file: tests/methods/test_bi_adaptformer.py")

    def __post_init__(self) -> None:
        check_dropout("bi_adaptformer", self.dropout)
        if self.bottleneck < 1:
            raise RecipeError(f"bi_adaptformer(bottleneck={self.bottleneck}): expected at least 1")

    def finished(self) -> BiAdaptFormer:
        return replace(self, stored=True)

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            made = BitBottleneck(s.width, self.bottleneck, self.bits, act=self.act,
                                 scale=self.scale, dropout=self.dropout, stored=self.stored)
            read = mlp_norm(anatomy, s.block) or s.block.mlp or s.block.mlp_in[0]
            yield Branch(s.block.mlp or s.path, made, read=(read, "input"))

    def count(self, d: int) -> int:
        """Trainable parameters of one block of width d."""
        return 0 if self.stored else 2 * d * self.bottleneck
