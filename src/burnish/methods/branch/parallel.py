from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bottleneck import Bottleneck
from ...core.method import Method, setting
from ...core.site import Branch
from ._sites import found, mlp_ends, mlp_norm

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Parallel(Method):
    """Scaled parallel adapter: a bottleneck beside the MLP, reading what the MLP reads.

    ``F(x) <- F(x) + s (W_up act(W_down x + b_down) + b_up)``; s multiplies the whole branch. It is
    fixed, or with ``train_scale=True`` one number per block that trains from `scale` on, without
    weight decay (the authors of both papers start it at 1). x is the MLP's own input (behind its
    norm in pre-norm blocks) with ``tap="norm"``, the residual stream before that norm with
    ``tap="residual"`` (AdaptFormer); in post-norm blocks they are the same. Beside a mixture of
    experts it adds to the whole mixture.

    Start: W_up and biases 0, the pre-trained function exactly. Trains 2 d r + r + d per block,
    r = `bottleneck`, and s if it does. Kept for backward: r numbers per token; x is made again from
    the norm's input, which is kept anyway. Not mergeable; s folds into W_up
    (``Bottleneck.absorb_scale``).
    """

    paper: ClassVar[str] = ("Towards a Unified View of Parameter-Efficient Transfer Learning "
                            "(2022), arXiv:2110.04366")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp"})
    merges: ClassVar[bool] = False

    bottleneck: int = setting(512, "r, width of the bottleneck", alias=("reduced", "width"))
    scale: float = setting(4.0, "s, or its start")
    train_scale: bool = setting(False, "s trains too")
    act: str = setting("relu", "activation inside", other=("gelu",))
    dropout: float = setting(0.0, "dropout on the activation")
    tap: Literal["norm", "residual"] = setting("norm", "what the bottleneck reads")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            made = Bottleneck(s.width, self.bottleneck, act=self.act, scale=self.scale,
                              train_scale=self.train_scale, dropout=self.dropout)
            norm = mlp_norm(anatomy, s.block) if self.tap == "residual" else None
            read = norm or s.block.mlp or s.block.mlp_in[0]
            yield Branch(s.block.mlp or s.path, made, read=(read, "input"))

    def count(self, d: int) -> int:
        """Trainable parameters of one block of width d."""
        return Bottleneck.count(d, self.bottleneck) + self.train_scale
