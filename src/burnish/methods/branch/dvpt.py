from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.dynamic import Dynamic, Lent
from ...blocks.state.prompts import accepts
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.site import Branch
from ._sites import found, mlp_ends, mlp_norm, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class Dvpt(Method):
    """DVPT: beside the MLP of every block, learned queries that a sample's own features answer.

    ``Z = gelu(X W_d + b_d)`` (N, r), and of queries Q (length, r)

        Q' = softmax(Q Z^T / sqrt(r)) Z,   Z' = Z + softmax(Z Q'^T / sqrt(r)) Q'

    the block's MLP adds ``s (Z' W_u + b_u)`` besides, r = `bottleneck`. Two samples have different
    Q'. X is the residual stream before the MLP's norm, or what the MLP reads (``tap="norm"``); in
    post-norm blocks they are the same. Tokens of padding are not read; a prompt in front of a text
    is.

    Start: W_u and biases 0: the pre-trained function exactly; Q normal. Trains
    2 d r + r + d + length r per block (1.2M on ViT-B/16 at r = 64, 20 queries), or once for all of
    them with ``share=True`` (100,416), beside ``train_scale=True`` with a scale of each block's
    own, without weight decay. Kept for backward: X, a few r and 2 length numbers per token. Not
    mergeable.

    A token's answer goes by all tokens, so models that write on token by token are refused, and
    those that put tokens before samples. Unconfirmed: of the equations the order is the text's, the
    details are the best reading; s = 1 and biases are ours.
    """

    paper: ClassVar[str] = ("DVPT: Dynamic Visual Prompt Tuning of Large Pre-trained Models for "
                            "Medical Image Analysis (2023)")
    needs: ClassVar[frozenset[str]] = frozenset({"whole reading", "mlp"})
    merges: ClassVar[bool] = False

    bottleneck: int = setting(64, "r, width of the bottleneck")
    length: int = setting(20, "queries", alias=("num_tokens",))
    scale: float = setting(1.0, "s, or its start")
    train_scale: bool = setting(False, "s trains too")
    share: bool = setting(False, "one module for all blocks")
    tap: Literal["norm", "residual"] = setting("residual", "what the bottleneck reads")

    def __post_init__(self) -> None:
        if min(self.bottleneck, self.length) < 1:
            raise RecipeError(f"dvpt(bottleneck={self.bottleneck}, length={self.length}): expected "
                              "a width and a query of 1 or more")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        whole: Bottleneck | None = None
        text = not accepts(anatomy.model, "pixel_values")
        for s in found(anatomy, mlp_ends(anatomy), self, "MLP"):
            norm = mlp_norm(anatomy, s.block) if self.tap == "residual" else None
            read = norm or s.block.mlp or s.block.mlp_in[0]
            if self.share:
                new = whole is None
                whole = whole or self._made(s.width, 1.0, False, text)
                made = Lent(whole, new, self.scale, self.train_scale)
            else:
                made = self._made(s.width, self.scale, self.train_scale, text)
            yield Branch(s.block.mlp or s.path, made, read=(read, "input"))

    def _made(self, width: int, scale: float, train_scale: bool, text: bool) -> Bottleneck:
        return Bottleneck(width, self.bottleneck, act="gelu", scale=scale, train_scale=train_scale,
                          mixer=Dynamic(self.length, self.bottleneck, text))

    def count(self, d: int, blocks: int = 1) -> int:
        """Trainable parameters of so many blocks of width d."""
        one = Bottleneck.count(d, self.bottleneck) + self.length * self.bottleneck
        return one * (1 if self.share else blocks) + self.train_scale * blocks
