from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import nn

from ...blocks.state.bottleneck import Bottleneck
from ...blocks.state.mixers import Conformer
from ...core.errors import RecipeError
from ...core.method import Method, setting
from ...core.site import Branch, Selection
from ._sites import Site, attention_ends, attention_inputs, found, mlp_ends, norm_before

if TYPE_CHECKING:
    from ...core.anatomy import Anatomy


@dataclass(frozen=True, kw_only=True)
class AstAdapter(Method):
    """Adapters of the audio spectrogram transformer study: four placements, plain or conformer.

    A block reads n1, n2 behind its norms: ``h = x + Attn(n1)``, ``out = h + FFN(n2)``.
    ``mode="parallel"``: ``out = h + FFN(n2) + A(n2)``, and with ``own_residual=True`` n2 once more;
    ``mode="series"``: ``out = h + A(FFN(n2))``, and with residual ``FFN(n2)`` itself, which without
    it is gone: not near the pre-trained function. ``placement="both"`` does the same to attention
    with n1 ("Houlsby"; "mlp" is "Pfeiffer"). ``A(z) = W_up gelu(W_down z + b) + b'``;
    ``mixer="conformer"``: ``A(z) = W_up silu(BN(conv(glu(W_down z + b)))) + b'``, W_down (2 r, d),
    conv over `kernel` tokens, channel by channel, BN a batch norm (so conv has no bias).

    Recommended, and the default: beside the FFN, without a residual of its own. (Which ranks first
    and the kernel are unconfirmed.)

    Start: W_up and b' 0 (the authors' class has both matrices 0, where only b' would have a
    gradient): the pre-trained function exactly in parallel without residual, and in series with it.
    Trains 2 d r + r + d per site (conformer: 3 d r + 2 r + r (kernel + 2) + d), the norm that feeds
    the sub-layer (`norms`) and the head. AST-base, r = 12: 230,544 and 18,432. Kept for backward: r
    numbers per token, what the norm gave is made again; conformer: about 8 r. Not mergeable.
    Checkpointed blocks are refused beside the conformer: a second run would move its statistics.
    """

    paper: ClassVar[str] = ("Parameter-Efficient Transfer Learning of Audio Spectrogram "
                            "Transformers (2023), arXiv:2312.03694")
    tier: ClassVar[str] = "checked against an independent equation"
    needs: ClassVar[frozenset[str]] = frozenset({"mlp"})
    merges: ClassVar[bool] = False

    bottleneck: int = setting(12, "r, width of the bottleneck")
    mode: Literal["parallel", "series"] = setting("parallel", "beside a sub-layer, or behind it")
    placement: Literal["mlp", "both"] = setting("mlp", "where it reads and writes")
    own_residual: bool = setting(False, "what it reads is added once more")
    mixer: Literal["none", "conformer"] = setting("none", "what looks at other tokens inside")
    kernel: int = setting(31, "tokens that the conformer's convolution sees",
                          beside={"mixer": "conformer"}, other=(3,))
    norms: bool = setting(True, "train the norms too")

    def __post_init__(self) -> None:
        if min(self.bottleneck, self.kernel) < 1:
            raise RecipeError("ast_adapter: bottleneck and kernel are at least 1")
        if self.mixer == "none" and "kernel" in self.changed():
            raise RecipeError("ast_adapter: kernel is of the conformer; expected mixer='conformer'")

    def claims(self) -> tuple[str, ...]:
        return ("the mode of the blocks",) if self.mixer == "conformer" else ()

    def _sites(self, anatomy: Anatomy) -> list[Site]:
        sites = [*mlp_ends(anatomy)]
        if self.placement == "both":
            sites = [*attention_ends(anatomy), *sites]
        return found(anatomy, sites, self, "MLP")

    def branch(self, anatomy: Anatomy) -> Iterable[Branch]:
        for s in self._sites(anatomy):
            attends = s.path not in (s.block.mlp_out, s.block.mlp)
            end = s.path if attends else s.block.mlp or s.path
            read = attention_inputs(s.block, s.path) if attends else \
                s.block.mlp or s.block.mlp_in[0]
            if self.mode == "parallel":
                yield Branch(end, self._made(s.width), read=(read, "input"))
                if self.own_residual:
                    yield Branch(end, nn.Identity(), read=(read, "input"))
            else:
                yield Branch(end, self._made(s.width),
                             compose="add" if self.own_residual else "replace")

    def select(self, anatomy: Anatomy) -> Iterable[Selection]:
        for s in self._sites(anatomy) if self.norms else ():
            if norm := norm_before(anatomy, s):
                for leaf, _ in anatomy.model.get_submodule(norm).named_parameters(recurse=False):
                    yield Selection(f"{norm}.{leaf}", decay=False)

    def _made(self, d: int) -> Bottleneck:
        r = self.bottleneck
        if self.mixer == "none":
            return Bottleneck(d, r, act="gelu")
        return Bottleneck(d, 2 * r, act="linear", mixer=Conformer(r, self.kernel), inner=r)

    def count(self, d: int) -> int:
        """Trainable parameters of one site of width d, its norm left out."""
        r = self.bottleneck
        more = d * r + r + Conformer.count(r, self.kernel) if self.mixer == "conformer" else 0
        return Bottleneck.count(d, r) + more
