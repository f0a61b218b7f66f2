from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bottleneck import Bottleneck
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch
from ..delta.lowrank.lora import check_dropout
from ._sites import Site, attention_ends, attention_inputs, found, mlp_ends, mlp_norm

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Parallel(Method):
    """Scaled parallel adapter: a bottleneck beside the MLP, reading what the MLP reads.

    ``F(x) <- F(x) + s (W_up act(W_down x + b_down) + b_up)``; s multiplies the whole branch. It is
    fixed, or with ``train_scale=True`` one number per site that trains from `scale` on, without
    weight decay (the authors of both papers start it at 1). x is the MLP's own input (behind its
    norm in pre-norm blocks) with ``tap="norm"``, the residual stream before that norm with
    ``tap="residual"`` (AdaptFormer); in post-norm blocks they are the same. Beside a mixture of
    experts it adds to the whole mixture.

    The unified view's other points: `placement` puts it beside attention (self- and cross-) too, or
    there alone; ``act="linear"`` is LoRA's form; ``compose="blend"`` gates, ``F <- (1 - s) F + s
    f(x)``; ``multi_head=True`` is the multi-head adapter: r falls into runs of r / heads, and each
    widens to one head of what attention's output projection reads, before that projection.

    Start: W_up and biases 0: the pre-trained function exactly, unless blended at s > 0.
    Trains 2 d r + r + d per site, r = `bottleneck`, and s if it does; multi_head d r + d' r / heads
    + r + d', d' the width of all heads. Kept for backward: r numbers per token (multi_head, twice);
    x is made again from the norm's input, which is kept anyway; blended, F too where s trains. Not
    mergeable; s folds into W_up (``Bottleneck.absorb_scale``) unless blended.
    """

    paper: ClassVar[str] = ("Towards a Unified View of Parameter-Efficient Transfer Learning "
                            "(2022), arXiv:2110.04366")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp"})
    merges: ClassVar[bool] = False

    bottleneck: int = setting(512, "r, width of the bottleneck", alias=("reduced", "width"),
                              least=1)
    scale: float = setting(4.0, "s, or its start")
    train_scale: bool = setting(False, "s trains too")
    act: str = setting("relu", "activation inside", other=("gelu",))
    dropout: float = setting(0.0, "dropout on the activation")
    tap: Literal["norm", "residual"] = setting("norm", "what the bottleneck reads")
    placement: Literal["mlp", "attention", "both"] = setting("mlp", "where it reads and writes")
    compose: Literal["add", "blend"] = setting("add", "blend: the output counts 1 - s then",
                                               beside={"scale": 0.5})
    multi_head: bool = setting(False, "beside attention, a bottleneck for each head",
                             beside={"placement": "attention"})

    def __post_init__(self) -> None:
        check_dropout("parallel", self.dropout)
        if self.tap == "residual" and self.placement != "mlp":
            raise RecipeError("parallel: tap='residual' is of the MLP; beside attention expected "
                              "tap='norm'")
        if self.multi_head and self.placement == "mlp":
            raise RecipeError("parallel: multi_head=True is of attention; expected "
                              "placement='attention' or 'both'")
        if self.compose == "blend" and not 0 <= self.scale <= 1:
            raise RecipeError(f"parallel: compose='blend' takes a scale from 0 to 1, not "
                              f"{self.scale}")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        mlp = list(mlp_ends(anatomy)) if self.placement != "attention" else []
        attention = list(attention_ends(anatomy)) if self.placement != "mlp" else []
        what = {"mlp": "MLP", "attention": "attention", "both": "attention or MLP"}
        for s in found(anatomy, [*attention, *mlp], self, what[self.placement]):
            yield self._attention(anatomy, s) if s in attention else self._mlp(anatomy, s)

    def _mlp(self, anatomy: Anatomy, s: Site) -> Branch:
        norm = mlp_norm(anatomy, s.block) if self.tap == "residual" else None
        read = norm or s.block.mlp or s.block.mlp_in[0]
        return Branch(s.block.mlp or s.path, self._made(s.width), read=(read, "input"),
                      compose=self.compose)

    def _attention(self, anatomy: Anatomy, s: Site) -> Branch:
        read = (attention_inputs(s.block, s.path), "input")
        if not self.multi_head:
            return Branch(s.path, self._made(s.width), read=read, compose=self.compose)
        ends = [p for p in anatomy.places if p.path == s.path and p.kind in ("linear", "conv1d")]
        if not ends or not s.block.heads:
            raise RecipeError(f"parallel: the heads of {read[0]} cannot be reached, since its "
                              "output projection is no module that it calls; expected "
                              "multi_head=False")
        heads, wide = s.block.heads, ends[0].inp
        if self.bottleneck % heads or wide % heads:
            raise RecipeError(f"parallel: bottleneck={self.bottleneck} does not fall into the "
                              f"{heads} heads of {read[0]}; expected a multiple of {heads}")
        return Branch(s.path, self._made(s.width, wide, heads), read=read, compose=self.compose,
                      at="input")

    def _made(self, d: int, out: int | None = None, heads: int = 1) -> Bottleneck:
        return Bottleneck(d, self.bottleneck, out, act=self.act, scale=self.scale, heads=heads,
                          train_scale=self.train_scale, dropout=self.dropout)

    def count(self, d: int, out: int | None = None, heads: int = 1) -> int:
        """Trainable parameters of one site of width d; of one for `heads` that are `out` wide."""
        return Bottleneck.count(d, self.bottleneck, out, heads) + self.train_scale
