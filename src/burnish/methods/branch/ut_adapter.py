from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ...blocks.state.bottleneck import Bottleneck, Resting
from ...blocks.state.mixers import Temporal
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.needs import refuse, unmet
from ...core.site import Branch, Selection
from ._sites import attention_ends, attention_inputs, found, mlp_ends, outer_norms, samples_first

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class UtAdapter(Method):
    """UT-Adapter: beside attention and MLP, a bottleneck that looks at neighbouring tokens.

        UT(x) = LN(gelu(U gelu(conv(gelu(D x + b))) + b') + x)

    D (r, d), U (d, r), conv over `kernel` tokens of a sequence in time, r to r channels, "same".
    What attention and MLP add to the stream is ``Attn(x) + UT_1(x)`` and ``FFN(z) + UT_2(z)``, of
    what they read: ``z = LN_a(x + Attn(x) + UT_1(x))``, ``LN_b(z + FFN(z) + UT_2(z))`` in post-norm
    blocks (wav2vec 2.0), the paper's; behind the norm in others. The norms of the blocks train too.

    Start: as torch draws linears, convolutions and norms: never the pre-trained function (a
    normalised copy of x is added). Trains 2 d r + r + d + r^2 `kernel` + r + 2 d per site, two
    sites a block, and 2 d per norm: 112,256 a block at d = 768, r = 32, kernel = 3. Kept for
    backward per site: x, d and about 4 r numbers per token. Not mergeable.

    Tokens of padding are zeros to others. A token's answer goes by those behind it, so models that
    write on token by token are refused, and those that put tokens before samples.
    """

    paper: ClassVar[str] = ("Audio-Visual Deception Detection: DOLOS Dataset and "
                            "Parameter-Efficient Crossmodal Learning (2023), arXiv:2303.12745")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"whole reading", "mlp"})
    identity: ClassVar[bool] = False
    merges: ClassVar[bool] = False

    bottleneck: int = setting(32, "r, width of the bottleneck")
    kernel: int = setting(3, "tokens that the convolution sees", other=(5,))
    norms: bool = setting(True, "train the norms too")

    def __post_init__(self) -> None:
        if min(self.bottleneck, self.kernel) < 1:
            raise RecipeError(f"{self}: expected a bottleneck and a kernel of 1 or more")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        if unmet(type(self), anatomy):
            refuse(self, anatomy)
        samples_first(anatomy, self)
        attends = list(attention_ends(anatomy))
        for s in found(anatomy, [*attends, *mlp_ends(anatomy)], self, "attention or MLP"):
            mine = s in attends
            path = s.path if mine else s.block.mlp or s.path
            read = attention_inputs(s.block, s.path) if mine else s.block.mlp or s.block.mlp_in[0]
            inner = Bottleneck(s.width, self.bottleneck, act="gelu", init="linear",
                               mixer=Temporal(self.bottleneck, self.kernel))
            yield Branch(path, Resting(inner), read=(read, "input"))

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for norm in (n for b in anatomy.blocks for n in outer_norms(b)) if self.norms else ():
            for leaf, _ in anatomy.model.get_submodule(norm).named_parameters(recurse=False):
                yield Selection(f"{norm}.{leaf}", decay=False)

    def count(self, d: int) -> int:
        """Trainable parameters of one site of width d, the block's own norms left out."""
        r = self.bottleneck
        return Bottleneck.count(d, r) + Temporal.count(r, self.kernel) + 2 * d
